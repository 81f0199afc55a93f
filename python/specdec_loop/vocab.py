"""Choice of the rows of a trimmed drafter head (VocabTrim, arXiv 2506.22694; FR-Spec, 2502.14856)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def count_tokens(texts: Iterable[Tensor | list[int]], vocab_size: int) -> Tensor:
    """How often each id occurs in token sequences, best in text that the target generated.

    Args:
        texts: integer tensors or lists of ids, any shapes.
        vocab_size: V.

    Returns:
        [V] int64 counts.

    Raises:
        ValueError: an id outside 0..V-1.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        ids = torch.as_tensor(text, dtype=torch.int64).flatten().cpu()
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
            raise ValueError(f"texts: expected ids in 0..{vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}")
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def frequency_order(counts: Tensor) -> Tensor:
    """[V] int32: all ids, the most frequent first, the lower id first among equals."""
    return torch.as_tensor(counts).sort(descending=True, stable=True).indices.to(torch.int32)


def select_rows(order: Tensor, size: int, force: Iterable[int] = ()) -> Tensor:
    """The ids that a trimmed head keeps, as the head ops and `draft_vocab` take them.

    Args:
        order: [V] integer, all ids, best first (see `frequency_order`).
        size: how many ids to keep, the forced ones included.
        force: ids that are kept whatever their rank (special tokens, end of text); each counts once.

    Returns:
        [size] int32, ascending.

    Raises:
        ValueError: `order` is not a permutation of the ids, a forced id is not one of them, or `size` is below the
            number of forced ids or above V.
    """
    order = torch.as_tensor(order).to(torch.int64).cpu()
    vocab_size = len(order)
    if order.ndim != 1 or not torch.equal(order.sort().values, torch.arange(vocab_size)):
        raise ValueError(f"order: expected a permutation of 0..{vocab_size - 1}, got {list(order.shape)} values")
    forced = sorted(set(map(int, force)))
    if forced and not (forced[0] >= 0 and forced[-1] < vocab_size):
        raise ValueError(f"force: expected ids in 0..{vocab_size - 1}, got {forced}")
    if not max(len(forced), 1) <= size <= vocab_size:
        raise ValueError(f"size: expected {max(len(forced), 1)}..{vocab_size}, got {size}")
    keep = torch.zeros(vocab_size, dtype=torch.bool)
    keep[forced] = True
    others = order[~keep[order]]
    keep[others[: size - len(forced)]] = True
    return keep.nonzero()[:, 0].to(torch.int32)
