"""The file of a trimmed vocabulary: ascending ids, and what they were made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from .identity import check_hash, kind_of, read, tokenizer_hash, write
from .rows import check_rows

KIND = "specdec vocabulary map"


class VocabMap(NamedTuple):
    """The rows that a trimmed head keeps, as the head ops (`rows`) and `draft_vocab` take them."""

    rows: Tensor  # [R] int32, ascending target ids
    vocab_size: int  # V, rows of the whole head, which may be more than the tokenizer has tokens
    tokenizer_hash: str  # see `tokenizer_hash`
    forced: tuple[int, ...] = ()  # ids that were kept whatever their rank


def save_map(path: Path | str, vocab_map: VocabMap) -> None:
    """Write a map as safetensors: int32 [R] `rows`, with the rest as metadata.

    Raises:
        TypeError, ValueError: rows that `load_map` would refuse.
    """
    rows = _checked(vocab_map, "rows")
    metadata = {
        "vocab_size": str(vocab_map.vocab_size),
        "tokenizer_hash": tokenizer_hash(vocab_map.tokenizer_hash),
        "forced": json.dumps([int(number) for number in vocab_map.forced]),
    }
    write(path, KIND, {"rows": rows}, metadata)


def load_map(path: Path | str, tokenizer, *, vocab_size: int | None = None) -> VocabMap:
    """Read a map and check that it fits: with a foreign one nothing fails but the acceptance.

    Args:
        path: what `save_map` wrote.
        tokenizer: the target's (see `tokenizer_hash`).
        vocab_size: rows of the head that it is for, where they are known.

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: another kind of file or version, a map for another vocabulary or head, ids that are not
            ascending, not in range or not there once, or a forced id that is missing.
    """
    (rows,), metadata = read(path, KIND, ("rows",))
    try:
        found = VocabMap(
            rows, int(metadata["vocab_size"]), metadata["tokenizer_hash"], tuple(json.loads(metadata["forced"]))
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: expected vocab_size, tokenizer_hash and forced in its metadata, got {metadata}"
        ) from error
    check_hash(Path(path), found.tokenizer_hash, tokenizer)
    if vocab_size is not None and found.vocab_size != vocab_size:
        raise ValueError(
            f"vocab_size: expected a map for a head of {vocab_size} rows, got {path} for {found.vocab_size}"
        )
    return found._replace(rows=_checked(found, f"rows of {path}"))


def load_rows(path: Path | str, tokenizer, vocab_size: int) -> Tensor:
    """[R] int32 ascending ids of a map, or of a plain safetensors file with one tensor of ids in any order.

    A plain file says nothing of the tokenizer it was made for, so only its ids are checked.

    Raises:
        FileNotFoundError, TypeError, ValueError: as for `load_map`.
    """
    if not Path(path).is_file() or kind_of(path) is not None:
        return load_map(path, tokenizer, vocab_size=vocab_size).rows
    tensors = load_file(path)
    if len(tensors) != 1:
        raise ValueError(f"rows: expected one tensor in {path}, got {sorted(tensors)}")
    return check_rows("rows", next(iter(tensors.values())).sort().values, vocab_size)


def _checked(vocab_map: VocabMap, name: str) -> Tensor:
    rows = check_rows(name, vocab_map.rows, vocab_map.vocab_size)
    missing = sorted(set(vocab_map.forced) - set(rows.tolist()))
    if missing:
        raise ValueError(f"forced: expected ids that are among the {name}, got {missing}, which are not")
    return rows
