"""How often each token occurs, and files that keep it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .identity import check_hash, read, tokenizer_hash, write

KIND = "specdec token counts"


class Counts(NamedTuple):
    """Counts of the tokens of one vocabulary."""

    values: Tensor  # [V] int64
    tokenizer_hash: str  # see `tokenizer_hash`


def count_tokens(texts: Iterable[Tensor | list[int]], vocab_size: int) -> Tensor:
    """How often each id occurs in token sequences, best in text that the target generated.

    Args:
        texts: integer tensors or lists of ids, any shapes; for strings and files see `encode_texts`, for the target's
            own text `generate_texts`.
        vocab_size: V, rows of the head.

    Returns:
        [V] int64 counts.

    Raises:
        ValueError: an id outside 0..V-1.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        ids = torch.as_tensor(text)
        if ids.is_floating_point() and ids.numel():
            raise TypeError(f"texts: expected integer ids, got {str(ids.dtype).removeprefix('torch.')}")
        ids = ids.to(torch.int64).flatten().cpu()
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
            raise ValueError(f"texts: expected ids in 0..{vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}")
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def merge_counts(parts: Iterable[Counts]) -> Counts:
    """The sum of counts that were taken apart from each other.

    Raises:
        ValueError: none, or counts of vocabularies that differ.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("parts: expected at least one Counts, got none")
    first = parts[0]
    for number, part in enumerate(parts):
        if part.tokenizer_hash != first.tokenizer_hash or part.values.shape != first.values.shape:
            raise ValueError(
                f"parts: expected counts of one vocabulary, {len(first.values)} ids of {first.tokenizer_hash[:12]}..., "
                f"got {len(part.values)} of {part.tokenizer_hash[:12]}... at {number}"
            )
    return Counts(torch.stack([part.values for part in parts]).sum(0), first.tokenizer_hash)


def save_counts(path: Path | str, counts: Counts) -> None:
    """Write counts as safetensors.

    Raises:
        ValueError: counts that are not [V] int64 >= 0.
    """
    write(
        path, KIND, {"counts": _checked(path, counts.values)}, {"tokenizer_hash": tokenizer_hash(counts.tokenizer_hash)}
    )


def load_counts(path: Path | str, tokenizer, *, vocab_size: int | None = None) -> Counts:
    """Read counts.

    Args:
        path: what `save_counts` wrote.
        tokenizer: the one they must be of (see `tokenizer_hash`).
        vocab_size: V that they must have, where it is known.

    Raises:
        FileNotFoundError, ValueError: no such file, another kind of file, or another vocabulary.
    """
    (values,), metadata = read(path, KIND, ("counts",))
    found = metadata.get("tokenizer_hash", "")
    check_hash(Path(path), found, tokenizer)
    _checked(path, values)
    if vocab_size is not None and len(values) != vocab_size:
        raise ValueError(f"vocab_size: expected {vocab_size}, got counts of {len(values)} ids in {path}")
    return Counts(values, found)


def _checked(path: Path | str, values: Tensor) -> Tensor:
    if values.ndim != 1 or values.dtype != torch.int64 or not bool((values >= 0).all()):
        raise ValueError(f"{path}: expected counts [V] int64 >= 0, got {values.dtype} {list(values.shape)}")
    return values
