"""The reference loop: draft -> attend -> verify -> compact, until every request is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import Philox, SamplingParams, Verified, compact_kv_, verify_chain, verify_tree
from specdec_kernels.verify import CHAIN_METHODS, TREE_METHODS

from . import attend
from .drafters import Draft, Drafter, ModelDrafter, NoDrafter, Plan, Tree
from .requests import Limits, Request, eos_ids, last_positions, make_requests, pad, random_streams, rows_of
from .statistics import Statistics, parameter_bytes

GREEDY = SamplingParams(temperature=0.0)


class Generated(NamedTuple):
    """What the loop returns, in the order of the caller's batch."""

    sequences: Tensor  # [B, longest] int64: each prompt as it was given, its new tokens, padding on the right
    tokens: list[list[int]]  # the new tokens of each request
    from_draft: list[list[bool]]  # for each of them, whether it was an accepted draft
    finish_reasons: list[str]  # "eos", "stop" (a criterion), "length" or "invalid" (NaN or nothing finite in logits)
    statistics: Statistics


@torch.no_grad()
def generate(
    target: PreTrainedModel,
    drafter: Drafter | PreTrainedModel | None,
    input_ids: Tensor | Sequence,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    draft_length: int = 4,
    tree: Tree | None = None,
    method: str | None = None,
    params: SamplingParams = GREEDY,
    seeds: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stopping_criteria: Sequence[Callable] | None = None,
    token_callback: Callable[[int, list[int]], None] | None = None,
    backend: str | None = None,
) -> Generated:
    """Decode with speculation; the output law stays the target's own (with every method but `typical`).

    Each round the target runs one forward of shape [1, N] over the draft trees of all requests in flight. A finished
    request leaves the batch. A request's draws and decisions depend on its prompt, seed and parameters, not on its
    neighbours; its logits do as far as the model's own arithmetic does (a matrix product may round differently in a
    larger batch, and rotary tables that depend on the longest request follow it).

    Args:
        target: a Hugging Face causal LM whose attention goes through AttentionInterface.
        drafter: a Drafter, a smaller model of the same vocabulary, or None for plain autoregressive decoding.
        input_ids: [B, P] integer, or a sequence of ragged prompts.
        attention_mask: [B, P], 1 at tokens, 0 at padding, which may be left or right.
        max_new_tokens: tokens for each request, unless it ends before.
        draft_length: drafts in a chain, K.
        tree: draft trees of this shape instead of chains.
        method: verification method (see `verify_chain`, `verify_tree`). Default: `greedy` at temperature 0, else
            `token` for chains and the drafter's own for trees.
        params: temperature, top_k, top_p, min_p; numbers for all requests or [B] tensors. `allowed` is not taken.
        seeds: one for each request, or a number that counts up from the first; None draws them from torch's generator.
        eos_token_id: ids that end a request; an empty sequence for none; default: those of the target's config.
        pad_token_id: fills `sequences`; default: the config's, else the lowest end id, else 0.
        stopping_criteria: callables of Hugging Face's signature, asked after every token with that request's [1, n]
            ids and None for the scores.
        token_callback: called every round with a request's index and its new tokens.
        backend: force a backend of specdec_kernels for verification, heads and compaction; attention uses what serves.

    Raises:
        TypeError, ValueError: an argument that does not fit; names it, what came and what was expected.
    """
    began = time.perf_counter()
    device = target.device
    requests = make_requests(input_ids, attention_mask, seeds, device)
    eos = eos_ids(eos_token_id, target.generation_config)
    limits = Limits(max_new_tokens, eos, list(stopping_criteria or ()))
    drafter = ModelDrafter(drafter) if isinstance(drafter, PreTrainedModel) else drafter or NoDrafter()
    params = _checked(params, max_new_tokens, len(requests), device)
    plan = _plan(drafter, draft_length, tree, method, params, backend)
    drafter.check(target, plan)

    active = limits.begin(requests)
    # A request's last root stands at prompt + new - 2 at most, and its draft behind that.
    room = max((len(request.prompt) for request in active), default=0) + max_new_tokens
    cache = attend.SlotCache(room + drafter.max_nodes(plan), last_positions(active, max_new_tokens, device))
    stats = Statistics(drafter_bytes=drafter.bytes_read(), target_bytes=parameter_bytes(target))
    with attend.attending(target), drafter.session(active, max_new_tokens, plan, stats):
        with stats.phase("prefill", device):
            attend.prefill(target, cache, [request.prompt for request in active], logits_to_keep=1)
            drafter.prefill()
        while active:
            rng = random_streams(active, device)
            prefix_lens = rng.offset.to(torch.int32)
            mine = rows_of(params, active)
            with stats.phase("draft", device):
                draft = drafter.propose(active, rng, mine)
            with stats.phase("target", device):
                positions, step = attend.tree_step(draft.tree, prefix_lens)
                logits = attend.forward(target, cache, draft.tree.tokens, positions, step).logits[0]
            with stats.phase("verify", device):
                verified = verify(draft, logits, plan, mine, rng)
                paths = verified_paths(verified)
            with stats.phase("compact", device):
                if plan.tree is not None:  # the path of a chain stands where it belongs
                    compact_kv_(cache.buffers(len(active)), verified.nodes, prefix_lens, backend=backend)
            kept = [limits.extend(request, path) for request, path in zip(active, paths, strict=True)]
            with stats.phase("draft", device):
                drafter.commit(verified.nodes, kept)
            stats.count_round(draft.tree, paths, kept)
            if token_callback is not None:
                for request, tokens in zip(active, kept, strict=True):
                    token_callback(request.index, tokens)
            _leave(active, cache, drafter)
    stats.wall_seconds = time.perf_counter() - began
    return Generated(
        pad(requests, _fill(pad_token_id, target, eos)),
        [request.tokens for request in requests],
        [request.from_draft for request in requests],
        [request.finish_reason for request in requests],
        stats,
    )


def autoregressive(target: PreTrainedModel, input_ids: Tensor | Sequence, **options) -> Generated:
    """The same loop without drafts, one token for each target call: the baseline. Options are those of `generate`."""
    return generate(target, None, input_ids, **options)


def verify(draft: Draft, logits: Tensor, plan: Plan, params: SamplingParams, rng: Philox) -> Verified:
    """Verify a round's draft against the target's logits [N, V]."""
    options = {"method": plan.method, "params": params, "rng": rng, "draft_vocab": draft.vocab, "backend": plan.backend}
    tree = draft.tree
    if plan.tree is not None:
        return verify_tree(tree, logits, draft.logits, **options)
    return verify_chain(tree.tokens, tree.cu_nodes, logits, draft.logits, max_depth=tree.max_depth, **options)


def verified_paths(verified: Verified) -> list[list[int]]:
    """The tokens that each request commits; none where its logits were invalid."""
    rows = zip(verified.tokens.tolist(), verified.num_tokens.tolist(), strict=True)
    return [tokens[:count] for tokens, count in rows]


def _leave(active: list[Request], cache: attend.SlotCache, drafter: Drafter) -> None:
    """Take finished requests out; the last row moves into the gap, so that the rows in use stay dense."""
    for row in reversed(range(len(active))):
        if active[row].finish_reason is not None:
            last = len(active) - 1
            if row != last:
                cache.move_row(last, row, active[last].prefix_len)
                active[row] = active[last]
            drafter.drop(row, last)
            active.pop()


def _plan(drafter: Drafter, draft_length: int, tree: Tree | None, method: str | None, params, backend) -> Plan:
    """The method that fits the shape of the drafts and the temperature."""
    greedy = not isinstance(params.temperature, Tensor) and params.temperature == 0
    if isinstance(drafter, NoDrafter):
        tree = None
    if method is None:
        sampled = "token" if tree is None else drafter.tree_method
        method = "greedy" if greedy else sampled
    choices = CHAIN_METHODS if tree is None else TREE_METHODS
    if method not in choices:
        shape = "chains" if tree is None else "trees"
        raise ValueError(f"method: expected one of {', '.join(map(repr, choices))} for {shape}, got {method!r}")
    if method == "greedy" and not greedy:
        raise ValueError(f"method: 'greedy' decodes at temperature 0, got params.temperature={params.temperature}")
    if not isinstance(draft_length, int) or draft_length < 1:
        raise ValueError(f"draft_length: expected an int >= 1, got {draft_length!r}")
    if tree is not None:
        tree.check()
    return Plan(draft_length, tree, method, backend)


def _checked(params: SamplingParams, max_new_tokens: int, batch: int, device: torch.device) -> SamplingParams:
    """The parameters, on the target's device."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an int >= 0, got {max_new_tokens!r}")
    if params.allowed is not None:
        raise ValueError("params.allowed: expected None, got a mask; its rows are nodes, which only the loop knows")
    for name, value in zip(params._fields, params, strict=True):
        if isinstance(value, Tensor) and value.shape != (batch,):
            raise ValueError(f"params.{name}: expected a number or shape [{batch}], got {list(value.shape)}")
    params = params._replace(temperature=1.0 if params.temperature is None else params.temperature)
    return SamplingParams(
        *(value.to(device, torch.float32) if isinstance(value, Tensor) else value for value in params)
    )


def _fill(pad_token_id: int | None, target: PreTrainedModel, eos: frozenset[int]) -> int:
    """What pads the result."""
    if pad_token_id is None:
        pad_token_id = getattr(target.generation_config, "pad_token_id", None)
    return min(eos, default=0) if pad_token_id is None else pad_token_id
