"""The head of tensor parallelism: every rank looks at its rows, and ranks exchange candidates and three sums."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_int
from .head import head_part
from .types import HeadPart, HeadSample, HeadTopK, Philox, QuantizedHead

_LN_2 = math.log(2.0)


def merge_head_parts(parts: HeadPart) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The head that the parts of several ranks make together.

    Args:
        parts: of P ranks, stacked along a new first dimension: keys [P, B, k], ..., sums [P, B, 3].

    Returns:
        logits [B, k], tokens [B, k], lse [B] and entropy [B], as in HeadTopK and HeadSample.
    """
    keys, logits, tokens = (values.transpose(0, 1).flatten(1) for values in parts[:3])
    k = parts.keys.shape[2]
    # As in the op: descending keys, the lowest id first among equals, wherever it was found.
    by_id = torch.argsort(tokens, dim=1, stable=True)
    ranked = by_id.gather(1, torch.argsort(keys.gather(1, by_id), dim=1, descending=True, stable=True))[:, :k]
    logits, tokens = logits.gather(1, ranked), tokens.gather(1, ranked)
    anchors, mass, moment = parts.sums.unbind(2)
    anchor = anchors.amax(0)
    # A rank without a finite logit adds nothing, and -inf - -inf is no number.
    below = torch.where(anchors > -torch.inf, anchors - anchor, 0.0)
    factor = torch.exp2(below)
    moment = ((moment + mass * below) * factor).sum(0)
    mass = (mass * factor).sum(0)
    nothing = mass == 0
    lse = torch.where(nothing, -torch.inf, _LN_2 * (anchor + torch.log2(mass)))
    # Rounded as in the op, to a grid: near 0 two sums of about 1 cancel, and their last bits tell how rows were cut.
    entropy = torch.round(_LN_2 * (torch.log2(mass) - moment / mass) * 2.0**30) / 2.0**30
    entropy = torch.where(nothing, 0.0, entropy).clamp(min=0)
    # One rank's NaN leaves no distribution, whatever the others found.
    broken = mass.isnan()[:, None]
    return (
        torch.where(broken, -torch.inf, logits),
        torch.where(broken, -1, tokens),
        lse.to(logits.dtype),
        entropy.to(logits.dtype),
    )


def _shared(hidden: Tensor, weight_shard, k: int, group, first_row, token_ids, **options) -> tuple[Tensor, ...]:
    """The whole head, from this rank's part and those of the others; one collective of [B, 3k + 3] fp64."""
    if not dist.is_available() or not (dist.is_initialized() or group is not None):
        raise ValueError("group: expected a process group, or torch.distributed to be initialised")
    if dist.get_rank(group) < 0:
        raise ValueError("group: expected a process group that this rank is a member of")
    if (first_row is None) == (token_ids is None):
        got = "neither" if first_row is None else "both"
        raise ValueError(f"first_row: expected it (a shard of consecutive rows) or token_ids, got {got}")
    if token_ids is None:
        values = weight_shard.values if isinstance(weight_shard, QuantizedHead) else weight_shard
        check_int("first_row", first_row, 0, 2**31 - len(values))
        # Ties and noise go by target ids, so the op itself has to know them.
        token_ids = torch.arange(first_row, first_row + len(values), dtype=torch.int32, device=values.device)
    part = head_part(hidden, weight_shard, k, token_ids=token_ids, **options)
    # fp32 and int32 pass through fp64 unchanged.
    message = torch.cat([part.keys, part.logits.double(), part.tokens.double(), part.sums], 1)
    ranks = dist.get_world_size(group)
    everyone = message.new_empty((ranks * len(message), message.shape[1]))
    if len(message):
        # torch 2.13 gave it another name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(everyone, message, group=group)
    keys, logits, tokens, sums = everyone.view(ranks, *message.shape).split([k, k, k, 3], dim=2)
    return merge_head_parts(HeadPart(keys, logits.to(part.logits.dtype), tokens.to(torch.int32), sums))


def sharded_head_topk(
    hidden: Tensor,
    weight_shard: Tensor | QuantizedHead,
    k: int = 1,
    *,
    group=None,
    first_row: int | None = None,
    token_ids: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> HeadTopK:
    """`head_topk` of a head whose rows lie on several ranks; every rank returns the whole head's answer.

    Each rank reads its own rows; ranks exchange k candidates and three sums of each request in one all_gather, never
    logits. The answer does not depend on the sharding: logits, tokens, lse and entropy are those of one rank that
    holds all rows, bit for bit on the cpu backend (lse and entropy but for a sum in fp64 that falls on the edge between
    two results, about once in 10^7).

    Args:
        hidden: [B, D] fp32, bf16 or fp16 (fp64 on the reference), the same on every rank.
        weight_shard: [n, D] of hidden's dtype or a QuantizedHead, this rank's rows; ranks may hold different numbers
            of them, also none.
        k: how many tokens to keep, 1..64; the same on every rank, as are `temperature` and B.
        group: a torch.distributed process group; None is the default one.
        first_row: target id of the shard's first row, where its rows are consecutive.
        token_ids: [n] int32, target id of each row, e.g. of this rank's part of a trimmed head. Instead of first_row.
        bias: [n] fp32 or hidden's dtype, of this rank's rows.
        scale: [n] fp32, of this rank's rows; None beside a QuantizedHead.
        temperature: as for `head_topk`.
        backend: force `reference`, `cpu`, `triton` or `cuda`.

    Returns:
        HeadTopK without all_logits.

    Raises:
        TypeError, ValueError: as by `head_topk`; both or neither of first_row and token_ids; no process group.
        BackendError: `backend` cannot serve the call.
    """
    options = {"bias": bias, "scale": scale, "temperature": temperature, "backend": backend}
    return HeadTopK(*_shared(hidden, weight_shard, k, group, first_row, token_ids, **options), None)


def sharded_head_sample(
    hidden: Tensor,
    weight_shard: Tensor | QuantizedHead,
    k: int = 1,
    *,
    rng: Philox,
    group=None,
    first_row: int | None = None,
    token_ids: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> HeadSample:
    """`head_sample` of a head whose rows lie on several ranks: every rank returns the same draws, those of one rank.

    The noise of a token depends on the stream and its target id alone, so whoever holds a row gives it the same key.

    Args:
        hidden, weight_shard, k, group, first_row, token_ids, bias, scale, backend: as for `sharded_head_topk`.
        rng, temperature: as for `head_sample`; the same on every rank.

    Returns:
        HeadSample without all_logits: verification that reads q needs the logits of all rows, which is the exchange
        that this avoids. `greedy`, `target_only` and `typical` do without.

    Raises:
        TypeError, ValueError, BackendError: as for `sharded_head_topk`.
    """
    if rng is None:
        raise TypeError("rng: expected a Philox, got NoneType")
    options = {"rng": rng, "bias": bias, "scale": scale, "temperature": temperature, "backend": backend}
    return HeadSample(*_shared(hidden, weight_shard, k, group, first_row, token_ids, **options), None)
