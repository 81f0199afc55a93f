"""Which ids a trimmed head keeps (VocabTrim, arXiv 2506.22694; FR-Spec, 2502.14856)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..requests import eos_ids


def frequency_order(counts: Tensor, *, force: Iterable[int] = (), backoff: Tensor | None = None) -> Tensor:
    """All ids, best first: what a trimmed head of any size keeps is a beginning of this order.

    Args:
        counts: [V] how often each id was seen.
        force: ids that stand before all others (special tokens, end of text), in ascending order; each counts once.
        backoff: [V] counts of other text, which order the ids that `counts` saw equally often, e.g. a corpus behind
            the fewer tokens that the target wrote.

    Returns:
        [V] int32, the most frequent first, the lower id first among equals.

    Raises:
        ValueError: shapes that differ, or a forced id that is not in 0..V-1.
    """
    counts = torch.as_tensor(counts).cpu()
    if counts.ndim != 1:
        raise ValueError(f"counts: expected shape [V], got {list(counts.shape)}")
    order = torch.arange(len(counts))
    # Stable sorts by the lesser key first.
    for key in (backoff, counts):
        if key is not None:
            key = torch.as_tensor(key).cpu()
            if key.shape != counts.shape:
                raise ValueError(f"backoff: expected shape {list(counts.shape)}, got {list(key.shape)}")
            order = order[key[order].sort(descending=True, stable=True).indices]
    forced = torch.zeros(len(counts), dtype=torch.bool)
    forced[_checked_force(force, len(counts))] = True
    return torch.cat([forced.nonzero()[:, 0], order[~forced[order]]]).to(torch.int32)


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
    order = check_order(order)
    vocab_size = len(order)
    forced = _checked_force(force, vocab_size)
    if not max(len(forced), 1) <= size <= vocab_size:
        raise ValueError(f"size: expected {max(len(forced), 1)}..{vocab_size}, got {size}")
    keep = torch.zeros(vocab_size, dtype=torch.bool)
    keep[forced] = True
    others = order[~keep[order]]
    keep[others[: size - len(forced)]] = True
    return keep.nonzero()[:, 0].to(torch.int32)


def forced_ids(tokenizer, *configs, vocab_size: int, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """The ids that a trimmed head must hold: a drafter that cannot draw the end of text drafts past it every time.

    Args:
        tokenizer: a Hugging Face tokenizer; its named special tokens count, as far as the head has rows for them.
        configs: generation or model configs, whose `eos_token_id` is an int, a list or None.
        vocab_size: V, rows of the head.
        extra: more ids, e.g. those that open a tool call.

    Returns:
        Ascending ids, each once.

    Raises:
        ValueError: an end or extra id that is not in 0..V-1.
    """
    # A padding token that was added without resizing the head is never drawn by anything.
    special = {int(number) for number in tokenizer.all_special_ids if number < vocab_size}
    ends = set().union(*(eos_ids(None, config) for config in configs))
    for name, ids in (("eos_token_id", sorted(ends)), ("extra", sorted(set(map(int, extra))))):
        _checked_force(ids, vocab_size, name)
        special.update(ids)
    return tuple(sorted(special))


def check_rows(name: str, rows, vocab_size: int) -> Tensor:
    """Check ids that name rows of a head: integers, ascending, in range, each once.

    Returns:
        [R] int32 on the CPU.

    Raises:
        TypeError, ValueError: names `name`, what came and what was expected.
    """
    rows = check_ids(name, rows, vocab_size)
    falls = (rows.diff() < 0).nonzero()
    if len(falls):
        place = int(falls[0]) + 1
        raise ValueError(f"{name}: expected ascending ids, got {int(rows[place])} behind {int(rows[place - 1])}")
    return rows.to(torch.int32)


def check_ids(name: str, ids, vocab_size: int) -> Tensor:
    """Check ids in any order: integers, in range, each once. Returns [R] int64 on the CPU."""
    ids = torch.as_tensor(ids).cpu()
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"{name}: expected integer ids, got {str(ids.dtype).removeprefix('torch.')}")
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"{name}: expected shape [R] with R >= 1, got {list(ids.shape)}")
    ids = ids.to(torch.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(f"{name}: expected ids in 0..{vocab_size - 1}, got {int(outside[0])}")
    twice = (torch.bincount(ids) > 1).nonzero()[:, 0]
    if len(twice):
        places = (ids == twice[0]).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{name}: expected each id once, got {len(twice)} ids several times, the first {int(twice[0])} at {places}"
        )
    return ids


def check_order(order: Tensor) -> Tensor:
    """Check a permutation of all ids. Returns [V] int64 on the CPU."""
    order = torch.as_tensor(order).to(torch.int64).cpu()
    if order.ndim != 1 or not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(f"order: expected a permutation of 0..{len(order) - 1}, got {list(order.shape)} values")
    return order


def _checked_force(force: Iterable[int], vocab_size: int, name: str = "force") -> list[int]:
    forced = sorted(set(map(int, force)))
    if forced and not (forced[0] >= 0 and forced[-1] < vocab_size):
        raise ValueError(f"{name}: expected ids in 0..{vocab_size - 1}, got {forced}")
    return forced
