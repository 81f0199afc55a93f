"""A drafter's head in two thin stages (SlimSpec, arXiv 2605.10453): all of the vocabulary, a fraction of the bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .checks import FLOATS, REFERENCE_FLOATS, check_int, check_tensor
from .head import head_sample, head_topk
from .types import HeadSample, HeadTopK, Philox, QuantizedHead

# Up to so many requests the CPU's head op multiplies faster than torch, or as fast, and what a request gets does not
# depend on the others; its top-k is a small part of that.
_FEW = 16
# Rows of a weight that are upcast at a time.
_SLICE = 16384
# Added to the second moments of the hidden states, as a share of their mean: directions that the calibration never
# took are approximated last, but are not lost.
_RIDGE = 1e-4


def low_rank_head(
    hidden: Tensor, down: Tensor, up: Tensor | QuantizedHead, k: int = 1, *, rng: Philox | None = None, **options
) -> HeadTopK | HeadSample:
    """`head_topk`, or `head_sample` where `rng` is given, of the head up @ down: logits = up (down hidden).

    The head reads (V + D) r numbers instead of V D, so r a fraction of D drafts over the whole vocabulary at the price
    of a trimmed one. What is drawn follows softmax(logits / temperature) of these logits, which is the q of
    verification. down @ hidden is rounded to hidden's dtype once.

    Args:
        hidden: [B, D] fp32, bf16 or fp16 (fp64 on the reference).
        down: [r, D] of hidden's dtype.
        up: [V, r] of hidden's dtype, or a QuantizedHead of dimension r.
        k: how many tokens, 1..64.
        rng: random stream of each request; None keeps the k best tokens instead of drawing.
        options: the other arguments of `head_topk` and `head_sample`: rows, row_groups, token_ids, bias, scale,
            temperature, return_logits, backend.

    Returns:
        HeadTopK, or HeadSample with `rng`.

    Raises:
        TypeError, ValueError, BackendError: as by `head_topk`; factors that do not fit are named `down` and `weight`
            (up).
    """
    sizes: dict[str, int] = {}
    check_tensor("hidden", hidden, sizes, "B D", REFERENCE_FLOATS)
    check_tensor("down", down, sizes, "r D", (hidden.dtype,), hidden.device)
    inner = product(hidden, down, options.get("backend")).to(hidden.dtype)
    if rng is None:
        return head_topk(inner, up, k, **options)
    return head_sample(inner, up, k, rng=rng, **options)


def product(hidden: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """[B, n] hidden @ weight.T of a weight of a few thousand rows, in hidden's dtype or wider."""
    chosen = backends.select("head_topk", hidden.device.type, backend, dtype=hidden.dtype, dim=hidden.shape[1])
    if chosen == "cpu" and len(hidden) <= _FEW:
        return head_topk(hidden, weight, return_logits=True, backend=backend).all_logits
    return torch.nn.functional.linear(hidden, weight)


def low_rank_factors(weight: Tensor, rank: int, *, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two stages of a head of lower rank that comes closest to `weight`.

    Without `hidden` that is the truncated SVD of the weight. With hidden states of a calibration run it is the product
    that makes the smallest squared error of their logits, which a truncated SVD of weight @ (second moments)^(1/2)
    gives. A start for training the factors (SlimSpec trains them with the drafter), and a head on its own.

    Args:
        weight: [V, D] fp32, bf16, fp16 or fp64.
        rank: r, 1..D.
        hidden: [n, D] of any float dtype, hidden states that the head is applied to; a few thousand do.

    Returns:
        down [r, D] and up [V, r] of weight's dtype and device. Deterministic up to the sign of each pair.

    Raises:
        TypeError, ValueError: an argument that does not fit, or hidden states that are not finite.
    """
    sizes: dict[str, int] = {}
    check_tensor("weight", weight, sizes, "V D", REFERENCE_FLOATS)
    dim = sizes["D"]
    check_int("rank", rank, 1, dim)
    # D x D matrices in fp64 stand for the V x D ones: their eigenvectors are the singular vectors that are needed.
    root, inverse = _square_roots(hidden, dim, weight.device)
    gram = torch.zeros(dim, dim, dtype=torch.float64, device=weight.device)
    for part in weight.split(_SLICE):
        part = part.double()
        gram.addmm_(part.T, part)
    basis = torch.linalg.eigh(root @ gram @ root).eigenvectors[:, -rank:].flip(1)
    down = (basis.T @ inverse).to(weight.dtype)
    project = root @ basis
    up = torch.cat([(part.double() @ project).to(weight.dtype) for part in weight.split(_SLICE)])
    return down, up


def _square_roots(hidden: Tensor | None, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(S^(1/2), S^(-1/2)) [D, D] fp64 of the second moments S of the hidden states; the identity without any."""
    if hidden is None:
        one = torch.eye(dim, dtype=torch.float64, device=device)
        return one, one
    check_tensor("hidden", hidden, {"D": dim}, "n D", (*FLOATS, torch.float64), device)
    if not len(hidden) or not bool(hidden.isfinite().all()):
        raise ValueError(f"hidden: expected finite states, at least one, got {list(hidden.shape)}")
    moments = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    for part in hidden.split(_SLICE):
        part = part.double()
        moments.addmm_(part.T, part)
    values, vectors = torch.linalg.eigh(moments / len(hidden))
    values = values.clamp(min=0) + _RIDGE * values.clamp(min=0).mean().clamp(min=torch.finfo(torch.float64).tiny)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
