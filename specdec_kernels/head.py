"""The drafter's LM head over a trimmed vocabulary, fused with what is done to its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends, library
from .checks import DEBUG, FLOATS, INT32, INT64, REFERENCE_FLOATS, check_int, check_tensor, check_values
from .quantize import check_quantized
from .reference import head as reference
from .types import HeadPart, HeadSample, HeadTopK, Philox, QuantizedHead

MAX_K = 64

# `temperatures` [B] fp32, where given, replaces `temperature`, so that a plain number costs no launch.
_ROWS = (
    "Tensor? rows, Tensor? row_groups, Tensor? token_ids, Tensor? bias, Tensor? scale, float temperature, "
    "Tensor? temperatures"
)
_REST = _ROWS + ", bool return_logits) -> (Tensor logits, Tensor tokens, Tensor lse, Tensor entropy, Tensor all_logits)"


def _fake(hidden, weight, k, rows, return_logits):
    batch, count = hidden.shape[0], weight.shape[0] if rows is None else rows.shape[-1]
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((batch, k), dtype=exact),
        hidden.new_empty((batch, k), dtype=torch.int32),
        hidden.new_empty((batch,), dtype=exact),
        hidden.new_empty((batch,), dtype=exact),
        hidden.new_empty((batch, count if return_logits else 0), dtype=exact),
    )


def _topk_fake(hidden, weight, k, rows, *rest):
    return _fake(hidden, weight, k, rows, rest[-1])


def _sample_fake(hidden, weight, k, seed, offset, row, rows, *rest):
    return _fake(hidden, weight, k, rows, rest[-1])


def _part_fake(hidden, weight, k, seed, offset, row, rows, *rest):
    logits, tokens, *_ = _fake(hidden, weight, k, rows, False)
    return logits.double(), logits, tokens, hidden.new_empty((hidden.shape[0], 3), dtype=torch.float64)


def _triton(name: str):
    """The Triton kernels import triton, so they are looked up when they are first called."""

    def call(*args):
        from .triton import head

        return getattr(head, name)(*args)

    return call


library.declare(
    "head_topk",
    "(Tensor hidden, Tensor weight, int k, " + _REST,
    reference=reference.head_topk,
    fake=_topk_fake,
    triton=_triton("head_topk"),
)
library.declare(
    "head_sample",
    "(Tensor hidden, Tensor weight, int k, Tensor seed, Tensor offset, Tensor? row, " + _REST,
    reference=reference.head_sample,
    fake=_sample_fake,
    triton=_triton("head_sample"),
)
# One rank's share of a sharded head: candidates with their keys, and sums that merge (see reference.head_part).
library.declare(
    "head_part",
    "(Tensor hidden, Tensor weight, int k, Tensor? seed, Tensor? offset, Tensor? row, "
    + _ROWS
    + ") -> (Tensor keys, Tensor logits, Tensor tokens, Tensor sums)",
    reference=reference.head_part,
    fake=_part_fake,
    triton=_triton("head_part"),
)


def _facts(hidden: Tensor, rows: Tensor | None, row_groups: Tensor | None) -> dict:
    """What backends look at; `together` is how many hidden vectors look at a row, on average."""
    batch, dim = hidden.shape
    together = batch
    if row_groups is not None:
        together = -(-batch // max(rows.shape[0], 1))
    elif rows is not None and rows.ndim == 2:
        together = 1
    return {"dtype": hidden.dtype, "dim": dim, "together": together}


def _cpu_limit(*, dtype, **_) -> str | None:
    return None if dtype in FLOATS else f"hidden is {dtype}"


def _cuda_limit(*, dtype, dim, **_) -> str | None:
    if dtype not in FLOATS:
        return f"hidden is {dtype}"
    most = 32768 // dtype.itemsize  # a hidden vector lies in shared memory, of which the smallest devices have 99 KB
    return None if dim <= most else f"hidden has {dim} columns, more than {most} of {dtype}"


backends.serves("head_topk", "cpu", _cpu_limit)
backends.serves("head_sample", "cpu", _cpu_limit)
backends.serves("head_part", "cpu", _cpu_limit)
for _op in ("head_topk", "head_sample", "head_part"):
    backends.serves(_op, "triton", _cpu_limit)
    backends.serves(_op, "cuda", _cuda_limit)


def arguments(hidden, weight, k, rows, row_groups, token_ids, bias, scale, temperature, *, greedy: bool):
    """Check what the ops share; returns the sizes, the weight and what the ops' schemas call rows .. temperatures.

    `greedy`: temperature 0 is allowed.
    """
    sizes: dict[str, int] = {}
    check_tensor("hidden", hidden, sizes, "B D", REFERENCE_FLOATS)
    device = hidden.device
    if isinstance(weight, QuantizedHead):
        if scale is not None:
            raise ValueError("scale: expected None beside a QuantizedHead, which has its own, got a tensor")
        check_quantized(weight, sizes, device)
        weight, scale, _ = weight
    else:
        check_tensor("weight", weight, sizes, "V D", (hidden.dtype,), device)
        if scale is not None:
            check_tensor("scale", scale, sizes, "V", (torch.float32,), device)
    check_int("k", k, 1, MAX_K)
    if rows is not None and token_ids is not None:
        raise ValueError(
            "token_ids: expected None beside rows (rows gathers from an untouched weight, token_ids names the rows of "
            "a trimmed one), got both"
        )
    if row_groups is not None:
        if rows is None:
            raise ValueError("row_groups: expected None without rows, got a tensor")
        check_tensor("row_groups", row_groups, sizes, "B", INT32, device)
        check_tensor("rows", rows, sizes, "G R", INT32, device)
    elif rows is not None:
        shape = "B R" if isinstance(rows, Tensor) and rows.ndim == 2 else "R"
        check_tensor("rows", rows, sizes, shape, INT32, device)
    if token_ids is not None:
        check_tensor("token_ids", token_ids, sizes, "V", INT32, device)
    if bias is not None:
        check_tensor("bias", bias, sizes, "V", tuple({torch.float32, hidden.dtype}), device)
    temperatures = None
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, sizes, "B", (torch.float32,), device)
        temperature, temperatures = 1.0, temperature
    elif isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: expected a number or a [B] tensor, got {type(temperature).__name__}")
    elif not math.isfinite(temperature) or temperature < 0 or (temperature == 0 and not greedy):
        raise ValueError(f"temperature: expected a finite number {'>=' if greedy else '>'} 0, got {temperature}")
    if DEBUG:
        if rows is not None:
            check_values("rows", (rows >= -1) & (rows < sizes["V"]), rows, f"row ids in -1..{sizes['V'] - 1}")
        if row_groups is not None:
            known = (row_groups >= 0) & (row_groups < sizes["G"])
            check_values("row_groups", known, row_groups, f"lines of rows, 0..{sizes['G'] - 1}")
        if token_ids is not None:
            check_values("token_ids", token_ids >= 0, token_ids, "target ids >= 0")
        if temperatures is not None:
            positive = temperatures >= 0 if greedy else temperatures > 0
            fine = positive & temperatures.isfinite()
            check_values("temperature", fine, temperatures, f"finite numbers {'>=' if greedy else '>'} 0")
    return sizes, weight, (rows, row_groups, token_ids, bias, scale, float(temperature), temperatures)


def check_rng(rng, sizes: dict[str, int], device) -> None:
    """Raise unless `rng` is a Philox of the batch's size."""
    if not isinstance(rng, Philox):
        raise TypeError(f"rng: expected a Philox, got {type(rng).__name__}")
    check_tensor("rng.seed", rng.seed, sizes, "B", INT64, device)
    check_tensor("rng.offset", rng.offset, sizes, "B", INT64, device)
    if rng.row is not None:
        check_tensor("rng.row", rng.row, sizes, "B", INT32, device)


def head_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int = 1,
    *,
    rows: Tensor | None = None,
    row_groups: Tensor | None = None,
    token_ids: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_logits: bool = False,
    backend: str | None = None,
) -> HeadTopK:
    """The k best tokens of a drafter's head, with log-sum-exp and entropy, and no [B, R] logits unless asked for.

    logits[b, i] = (hidden[b] . weight[r_i]) * scale[r_i] + bias[r_i], accumulated in fp32. A vocabulary is trimmed
    (VocabTrim, arXiv 2506.22694; FR-Spec, 2502.14856) by `rows`, which needs no second copy of the weight, or by a
    weight that holds fewer rows and `token_ids` that name them.

    Args:
        hidden: [B, D] fp32, bf16 or fp16 (fp64 on the reference).
        weight: [V, D] of hidden's dtype, or a QuantizedHead (see `quantize_head`), of which logits are within
            1e-3 |hidden| |row| of those of the dequantised weight.
        k: how many tokens to keep, 1..64.
        rows: [R] or [B, R] int32, rows of the weight to look at, for all requests or for each its own; with
            `row_groups` [G, R], for each group its own. A row's index is its target id; -1 pads. Default: all of them.
        row_groups: [B] int32, the line of `rows` that each hidden vector looks at. Neighbours of one group, such as
            the nodes of one tree, read the weight once.
        token_ids: [V] int32, target id of each row of a weight that is already trimmed.
        bias: [V] fp32 or hidden's dtype, by row of the weight; -inf bans a token.
        scale: [V] fp32, multiplies the dot product of each row; None beside a QuantizedHead.
        temperature: > 0, a number or [B] fp32; divides the logits in `lse` and `entropy` and never changes the order.
        return_logits: also return all logits, [B, R].
        backend: force `reference`, `cpu`, `triton` or `cuda`.

    Returns:
        HeadTopK. Equal logits come in ascending id order; places that no token of a logit above -inf fills hold token
        -1 and logit -inf. A request with NaN or +inf among its logits gets tokens -1 and NaN for lse and entropy; one
        without any finite logit gets lse -inf and entropy 0.

    Raises:
        TypeError, ValueError: an argument that does not fit; names it, what came and what was expected. Values of
            `rows`, `row_groups`, `token_ids` and tensor temperatures are checked under SPECDEC_DEBUG=1; without it a
            row id that the weight does not have counts as logit -inf, so does every row of a group that `rows` does
            not have, and a temperature of 0 counts as 1.
        BackendError: `backend` cannot serve the call.
    """
    _, weight, rest = arguments(
        hidden, weight, k, rows, row_groups, token_ids, bias, scale, temperature, greedy=False
    )  # fmt: skip
    chosen = backends.select("head_topk", hidden.device.type, backend, **_facts(hidden, rows, row_groups))
    op = library.overload("head_topk", chosen)
    logits, tokens, lse, entropy, all_logits = op(hidden, weight, k, *rest, return_logits)
    return HeadTopK(logits, tokens, lse, entropy, all_logits if return_logits else None)


def head_sample(
    hidden: Tensor,
    weight: Tensor,
    k: int = 1,
    *,
    rng: Philox,
    rows: Tensor | None = None,
    row_groups: Tensor | None = None,
    token_ids: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_logits: bool = False,
    backend: str | None = None,
) -> HeadSample:
    """Draw k tokens without replacement from softmax(logits / temperature), in draw order; no logits are written.

    Gumbel-Top-k (Kool et al., arXiv 1903.06059): the k largest of logits / temperature + noise, where the noise of a
    token depends on (rng.seed, rng.offset, rng.row, target id) alone, so a draw is the same whatever the batch, the
    order of the rows or the number of threads, and on every backend up to the rounding of its logits. The first draw
    is a draw of the softmax; the k draws have the Plackett-Luce law that `without_replacement` and `traversal`
    verification expect.

    Args:
        hidden, weight, k, rows, row_groups, token_ids, bias, scale, return_logits, backend: as for `head_topk`.
        rng: random stream of each request: seed [B] int64, offset [B] int64 (absolute position), row [B] int32
            (several draws at one position, e.g. nodes of a tree; default 0).
        temperature: >= 0, a number or [B] fp32. At 0 the draws are the k best tokens, and lse and entropy are those
            of temperature 1. Below about 1e-12 equal logits are drawn in ascending order of their ids.

    Returns:
        HeadSample; padded, and NaN handled, as by `head_topk`.

    Raises:
        TypeError, ValueError, BackendError: as for `head_topk`.
    """
    sizes, weight, rest = arguments(
        hidden, weight, k, rows, row_groups, token_ids, bias, scale, temperature, greedy=True
    )  # fmt: skip
    check_rng(rng, sizes, hidden.device)
    chosen = backends.select("head_sample", hidden.device.type, backend, **_facts(hidden, rows, row_groups))
    op = library.overload("head_sample", chosen)
    logits, tokens, lse, entropy, all_logits = op(hidden, weight, k, *rng, *rest, return_logits)
    return HeadSample(logits, tokens, lse, entropy, all_logits if return_logits else None)


def head_part(
    hidden: Tensor,
    weight: Tensor,
    k: int = 1,
    *,
    rng: Philox | None = None,
    rows: Tensor | None = None,
    row_groups: Tensor | None = None,
    token_ids: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> HeadPart:
    """One rank's share of a head whose rows are spread over several, for engines with collectives of their own.

    Candidates of all ranks, sorted by (key descending, token ascending), begin with the k best or drawn of the whole
    head; sums of two ranks add once the ones with the lower anchor are brought to the higher: both times
    2^(difference), the third minus difference times the second. Every term is the same whoever adds it. With a, s, m of
    all ranks, lse = ln 2 (a + log2 s) and entropy = ln 2 (log2 s - m / s), which `head_topk` rounds to multiples of
    2^-30; `merge_head_parts` does all of this.

    Args:
        rng: as for `head_sample`; None ranks by the logits, as `head_topk` does.
        hidden, weight, k, rows, row_groups, token_ids, bias, scale, temperature, backend: as for `head_sample`.
            `token_ids` names the rows of a shard.

    Returns:
        HeadPart.

    Raises:
        TypeError, ValueError, BackendError: as for `head_topk`.
    """
    sizes, weight, rest = arguments(
        hidden, weight, k, rows, row_groups, token_ids, bias, scale, temperature, greedy=rng is not None
    )  # fmt: skip
    if rng is not None:
        check_rng(rng, sizes, hidden.device)
    chosen = backends.select("head_part", hidden.device.type, backend, **_facts(hidden, rows, row_groups))
    return HeadPart(*library.overload("head_part", chosen)(hidden, weight, k, *(rng or (None,) * 3), *rest))
