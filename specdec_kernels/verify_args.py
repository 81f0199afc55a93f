"""Argument checks of verification, and the form in which its ops take sampling parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import DEBUG, FLOATS, INT32, INT64, REFERENCE_FLOATS, check_draft_vocab, check_tensor, check_values
from .reference.verify import TARGET_METHODS
from .tree_checks import check_cu_nodes, check_tree_values
from .types import DraftTree, Lossy, Philox, SamplingParams

_OFF = (1.0, 0.0, 1.0, 0.0)  # temperature, top_k, top_p, min_p that change nothing
_EXACT = (None, None, 0.0, None, 1.0)  # judge, reflect_logits, reflect_weight, synthetic, lenience that change nothing
_LARGEST = torch.finfo(torch.float32).max
_NEEDS_DRAFT_LOGITS = ("k_seq", "greedy_multi")
_WHOLE_PATHS = ("block", "traversal", "traversal_iid")
_TESTS_Q = ("token", "multi_round", "without_replacement", "k_seq")


def _sampling(params: SamplingParams, name: str, sizes: dict[str, int], device) -> tuple:
    """(params [B, 4] or None, the four numbers, allowed, whether a filter is on) of checked SamplingParams."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"{name}: expected SamplingParams, got {type(params).__name__}")
    limits = {"temperature": (0.0, None), "top_k": (0, None), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
    numbers, columns, per_request = [], [], False
    filters = False
    for (field, (low, high)), off in zip(limits.items(), _OFF, strict=True):
        value = getattr(params, field)
        label = f"{name}.{field}"
        if isinstance(value, Tensor):
            check_tensor(label, value, sizes, "B", (torch.float32, torch.float64, torch.int32, torch.int64), device)
            if DEBUG:
                ok = (value >= low) & (value <= high if high is not None else value.isfinite())
                check_values(label, ok, value, f">= {low}" if high is None else f"in [{low}, {high}]")
            per_request, filters = True, filters or field != "temperature"
            numbers.append(off)
        else:
            value = off if value is None else value
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{label}: expected a number, a [B] tensor or None, got {type(value).__name__}")
            if not low <= value <= (_LARGEST if high is None else high):
                expected = f">= {low}, finite in fp32" if high is None else f"in [{low}, {high}]"
                raise ValueError(f"{label}: expected {expected}, got {value}")
            if field == "top_k" and value != int(value):
                raise ValueError(f"{label}: expected a whole number, got {value}")
            numbers.append(float(value))
            filters = filters or (field != "temperature" and value != off)
        columns.append(value)
    packed = None
    if per_request:
        packed = torch.empty(sizes["B"], 4, dtype=torch.float32, device=device)
        for i, value in enumerate(columns):
            packed[:, i] = value
    return packed, numbers, params.allowed, filters


def _number(name: str, value, fits, expected: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number {expected}, got {type(value).__name__}")
    if not fits(value):
        raise ValueError(f"{name}: expected a number {expected}, got {value}")
    return float(value)


def _hooks(lossy: Lossy | None, method: str, max_depth: int, sizes: dict[str, int], logits: Tensor) -> tuple:
    """What the ops take of a checked Lossy: judge, reflect_logits, reflect_weight, synthetic, lenience."""
    if lossy is None:
        return _EXACT
    if not isinstance(lossy, Lossy):
        raise TypeError(f"lossy: expected a Lossy or None, got {type(lossy).__name__}")
    judge, reflect, _, synthetic, _ = lossy
    weight = _number("lossy.reflect_weight", lossy.reflect_weight, lambda x: 0 <= x < 1, "in [0, 1)")
    lenience = _number("lossy.lenience", lossy.lenience, lambda x: 0 < x <= 1, "in (0, 1]")
    if judge is not None:
        if method in _WHOLE_PATHS:
            raise ValueError(
                f"lossy.judge: expected None with method {method!r}, which accepts or rejects whole paths bottom-up, "
                f"so that no node has a test of its own that a judge could overrule"
            )
        check_tensor("lossy.judge", judge, sizes, "N", (torch.bool,), logits.device)
    if lenience != 1 and method not in _TESTS_Q:
        raise ValueError(
            f"lossy.lenience: expected 1 with method {method!r}, got {lenience}; only "
            f"{', '.join(map(repr, _TESTS_Q))} test a coin against p / q"
        )
    if reflect is not None:
        check_tensor("lossy.reflect_logits", reflect, sizes, "N V", (logits.dtype,), logits.device)
        if weight == 0:
            reflect = None  # 0 * -inf is no logit
    if synthetic is not None:
        for name, given in (("judge", judge is not None), ("lenience", lenience != 1)):
            if given:
                raise ValueError(
                    f"lossy.synthetic: expected None beside lossy.{name}, because rates replace every rule"
                )
        if isinstance(synthetic, Tensor):
            check_tensor(
                "lossy.synthetic", synthetic, {"max_depth": max_depth}, "max_depth", (torch.float32,), logits.device
            )
            if DEBUG:
                check_values("lossy.synthetic", (synthetic >= 0) & (synthetic <= 1), synthetic, "rates in [0, 1]")
        else:
            rate = _number(
                "lossy.synthetic", synthetic, lambda x: 0 <= x <= 1, "in [0, 1], a [max_depth] tensor or None"
            )
            synthetic = torch.full((max_depth,), rate, dtype=torch.float32, device=logits.device)
    return judge, reflect, weight if reflect is not None else 0.0, synthetic, lenience


def check_arguments(
    tree, prefix, target_logits, draft_logits, draft_vocab, method, params, draft_params, lossy, rng, accept, final,
    logprobs,
):  # fmt: skip
    """Check everything the two ops share.

    Returns:
        (draft_logits, draft_vocab), both None where the method reads no draft logits; the tail of the op's arguments;
        the facts for the backends.
    """
    sizes: dict[str, int] = {}
    device = target_logits.device if isinstance(target_logits, Tensor) else None
    check_tensor("target_logits", target_logits, sizes, "N V", REFERENCE_FLOATS)
    if sizes["V"] < 1:
        raise ValueError(f"target_logits: expected V >= 1, got {list(target_logits.shape)}")
    check_tensor(f"{prefix}tokens", tree.tokens, sizes, "N", INT32, device)
    check_tensor(f"{prefix}cu_nodes", tree.cu_nodes, sizes, "B+1", INT32, device)
    if sizes["B+1"] < 1:
        raise ValueError(f"{prefix}cu_nodes: expected shape [B+1] with B >= 0, got [0]")
    sizes["B"] = sizes["B+1"] - 1
    if draft_logits is not None:
        check_tensor(
            "draft_logits", draft_logits, sizes, "N V" if draft_vocab is None else "N R", REFERENCE_FLOATS, device
        )
    elif method in _NEEDS_DRAFT_LOGITS:
        raise ValueError(f"draft_logits: method {method!r} needs the distribution of the draws, got None")
    if draft_vocab is not None:
        if draft_logits is None:
            raise ValueError("draft_vocab: expected draft_logits [N, R] beside it, got draft_logits=None")
        check_tensor("draft_vocab", draft_vocab, sizes, "R", INT32, device)
        if sizes["R"] < 1:
            raise ValueError("draft_vocab: expected shape [R] with R >= 1, got [0]")
    packed, numbers, allowed, filters = _sampling(params, "params", sizes, device)
    if draft_params is None:
        draft_packed, draft_numbers, draft_allowed = packed, [numbers[0], *_OFF[1:]], None
        if packed is not None:
            draft_packed = _only_temperature(packed)
    else:
        draft_packed, draft_numbers, draft_allowed, draft_filters = _sampling(
            draft_params, "draft_params", sizes, device
        )
        filters = filters or draft_filters
    sizes["W"] = (sizes["V"] + 31) // 32
    for name, mask in (("params.allowed", allowed), ("draft_params.allowed", draft_allowed)):
        if mask is not None:
            check_tensor(name, mask, sizes, "N W", INT32, device)
    hooks = _hooks(lossy, method, tree.max_depth, sizes, target_logits)
    judge, reflect, _, synthetic, lenience = hooks
    rated = synthetic is not None
    seed = offset = None
    if rng is not None:
        if not isinstance(rng, Philox):
            raise TypeError(f"rng: expected a Philox, got {type(rng).__name__}")
        check_tensor("rng.seed", rng.seed, sizes, "B", INT64, device)
        check_tensor("rng.offset", rng.offset, sizes, "B", INT64, device)
        if rng.row is not None:
            raise ValueError("rng.row: expected None, nodes tell the draws of a request apart; got a row")
        seed, offset = rng.seed, rng.offset
    for name, value, shape in (("accept_uniforms", accept, "N"), ("final_uniforms", final, "B")):
        if value is not None:
            check_tensor(name, value, sizes, shape, (torch.float32,), device)
        elif rng is None and (rated or not (method == "greedy" or (name, method) == ("accept_uniforms", "typical"))):
            raise ValueError(f"{name}: method {method!r} needs rng or {name}, got neither")
    if tree.counts is not None and rng is None:
        raise ValueError("rng: merged draws (tree.counts) are tried in a random order that only rng gives, got None")
    if rated or method in TARGET_METHODS:
        draft_logits = draft_vocab = None
    facts = {
        "method": method,
        "dtype": target_logits.dtype,
        "filters": filters,
        "lossy": judge is not None or reflect is not None or rated or lenience != 1,
        "counts": tree.counts is not None,
    }
    if draft_logits is not None and target_logits.dtype in FLOATS:
        facts["dtype"] = draft_logits.dtype
    tail = (
        packed, numbers, allowed, draft_packed, draft_numbers, draft_allowed, *hooks,
        seed, offset, accept, final, logprobs,
    )  # fmt: skip
    return (draft_logits, draft_vocab), tail, facts


def _only_temperature(packed: Tensor) -> Tensor:
    """The default of the draft's parameters: the target's temperature, no filters."""
    draft = packed.clone()
    for column, off in enumerate(_OFF[1:], start=1):
        draft[:, column] = off
    return draft


def check_values_of(tree: DraftTree, prefix: str, vocabulary: int, draft_vocab, accept, final) -> None:
    """Checks that read device memory (SPECDEC_DEBUG=1); a tree without parents is a chain."""
    if tree.parents is None:
        check_cu_nodes("cu_nodes", tree.cu_nodes, len(tree.tokens), tree.max_nodes)
    else:
        check_tree_values(tree)
    fine = (tree.tokens >= -1) & (tree.tokens < vocabulary)
    fine[tree.cu_nodes[:-1].long()] = True  # roots are never looked at
    check_values(f"{prefix}tokens", fine, tree.tokens, f"ids in 0..{vocabulary - 1}, or -1 for no draft")
    if tree.counts is not None:
        check_values(f"{prefix}counts", tree.counts >= 1, tree.counts, "numbers of draws >= 1")
    if draft_vocab is not None:
        check_draft_vocab(draft_vocab, vocabulary)
    for name, value in (("accept_uniforms", accept), ("final_uniforms", final)):
        if value is not None:
            check_values(name, (value >= 0) & (value < 1), value, "numbers in [0, 1)")
