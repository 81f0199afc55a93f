"""Token maps of other engines: EAGLE-3's d2t and t2d, and the .pt lists of SGLang and FR-Spec.

    EAGLE-3 (2503.01840)  d2t [R] int64, offsets: target id = i + d2t[i]; t2d [V] bool: which target ids have a draft id
    SGLang, FR-Spec       absolute target ids, a list or a tensor, usually the most frequent first

An engine that reads one as the other, or does not find the map at all, drafts the wrong tokens, and all that shows is a
low acceptance. Here the numbers must be able to be what the format says: absolute ids do not repeat, and offsets of
ascending ids do not fall and stay at or below V - R. What can be both, or only the other, is refused unless `kind` says
which it is.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec_kernels.checks import check_choice

from .rows import check_ids, check_rows

KINDS = ("ids", "offsets")


def read_eagle3(
    source: Path | str | Mapping[str, Tensor],
    vocab_size: int,
    *,
    draft_vocab_size: int | None = None,
    kind: str | None = None,
) -> Tensor:
    """The target ids of an EAGLE-3 draft head, row by row.

    Args:
        source: a checkpoint (safetensors, or .bin/.pt/.pth, which is loaded without running code) or its tensors, with
            `d2t` [R] and perhaps `t2d` [V] bool, whatever module they stand in.
        vocab_size: V, the target's.
        draft_vocab_size: R, rows of the draft head, where they are known.
        kind: what d2t holds, "offsets" or "ids"; default: what t2d says, without it offsets that cannot be ids.

    Returns:
        [R] int32, ascending: row i of the draft head belongs to target id rows[i] (`token_ids`, `draft_vocab`).

    Raises:
        FileNotFoundError, TypeError, ValueError: no file, no d2t, ids out of range, doubled or not ascending, a d2t
            that can be both kinds, or that names other ids than t2d.
    """
    tensors = source if isinstance(source, Mapping) else _load(source)
    d2t, t2d = (_find(tensors, name) for name in ("d2t", "t2d"))
    if d2t is None:
        raise ValueError(
            f"d2t: expected a tensor of this name, got {sorted(tensors)[:8]}; without it row i of a trimmed head would "
            "be taken for token i"
        )
    if draft_vocab_size is not None and len(d2t) != draft_vocab_size:
        raise ValueError(f"d2t: expected one entry for each of {draft_vocab_size} rows, got {list(d2t.shape)}")
    named = None if t2d is None else _marked(t2d, vocab_size)
    if kind is None and named is not None:
        readings = _readings("d2t", d2t, vocab_size, ascending=True)
        kind = next((each for each, ids in readings.items() if _same(ids, named)), None)
    ids = _target_ids("d2t", d2t, vocab_size, kind, "offsets", ascending=True)
    if named is not None and not _same(ids, named):
        others = int(torch.isin(ids, named, invert=True).sum())
        raise ValueError(
            f"d2t: expected the {len(named)} ids that t2d marks, got {len(ids)}, of which {others} are not marked; "
            "the two contradict each other"
        )
    return ids.to(torch.int32)


def write_eagle3(path: Path | str, rows: Tensor, vocab_size: int) -> None:
    """Write d2t [R] int64 offsets and t2d [V] bool, as safetensors or, with another suffix, by torch.save.

    Raises:
        TypeError, ValueError: `rows` are not ascending ids in 0..V-1.
    """
    rows = check_rows("rows", rows, vocab_size).to(torch.int64)
    tensors = {"d2t": rows - torch.arange(len(rows)), "t2d": torch.zeros(vocab_size, dtype=torch.bool)}
    tensors["t2d"][rows] = True
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def read_token_map(
    path: Path | str, vocab_size: int, *, kind: str | None = None, drop_repeated: bool = False
) -> Tensor:
    """The ids of a token map of SGLang (`--speculative-token-map`) or FR-Spec (`freq_*.pt`).

    Such a map gathers rows of the whole head, so its order says nothing and is not kept.

    Args:
        path: a list or a tensor [R] of ids that torch.save wrote, or safetensors with one tensor.
        vocab_size: V, rows of the head.
        kind: what it holds, "ids" or "offsets"; default: ids that cannot be offsets.
        drop_repeated: keep ids that stand there several times once, instead of refusing the file. FR-Spec's own script
            appends the end of text to a list that holds it already.

    Returns:
        [R] int32, ascending.

    Raises:
        FileNotFoundError, TypeError, ValueError: no file, not a list of ids, ids out of range or doubled, offsets where
            ids were asked for, or numbers that can be both.
    """
    values = _load(path)
    if isinstance(values, Mapping):
        if len(values) != 1:
            raise ValueError(f"{path}: expected a list of ids, got {sorted(map(str, values))}; see read_eagle3")
        values = next(iter(values.values()))
    if not isinstance(values, Tensor):
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise TypeError(f"{path}: expected a list or a tensor of ids, got {_described(values)}")
        values = torch.tensor(values, dtype=torch.int64)
    if drop_repeated and kind != "offsets" and values.ndim == 1:
        # Offsets repeat wherever two kept ids are neighbours, so that ids were meant must be said or seen.
        if kind is None and isinstance(_readings(str(path), values, vocab_size, ascending=False)["offsets"], Tensor):
            raise ValueError(f"kind: expected 'ids' beside drop_repeated, got None; {path} can be offsets too")
        values, kind = values.unique(), "ids"
    ids = _target_ids(str(path), values, vocab_size, kind, "ids", ascending=False)
    return check_rows(str(path), ids.sort().values, vocab_size)


def write_token_map(path: Path | str, rows: Tensor, vocab_size: int) -> None:
    """Write absolute ids as the list that SGLang and FR-Spec read.

    Raises:
        TypeError, ValueError: `rows` are not ascending ids in 0..V-1.
    """
    rows = check_rows("rows", rows, vocab_size)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(rows.tolist(), path)


def _target_ids(name: str, values: Tensor, vocab_size: int, kind: str | None, usual: str, *, ascending: bool) -> Tensor:
    """[R] int64 target ids of numbers that are ids or offsets; `usual` is what the format says they are."""
    check_choice("kind", kind, (None, *KINDS))
    readings = _readings(name, values, vocab_size, ascending=ascending)
    fitting = [each for each, reading in readings.items() if isinstance(reading, Tensor)]
    if kind is None and len(fitting) == 2 and not _same(*readings.values()):
        raise ValueError(
            f"kind: expected 'ids' or 'offsets', got None; the {len(values)} numbers of {name} can be both"
        )
    found = readings[kind or usual]
    if isinstance(found, Tensor):
        return found
    hint = f"; the numbers can be {fitting[0]}, which kind={fitting[0]!r} reads" if fitting else ""
    raise type(found)(f"{found}{hint}")


def _readings(name: str, values: Tensor, vocab_size: int, *, ascending: bool) -> dict[str, Tensor | Exception]:
    """For both kinds the target ids, or why the numbers cannot be that."""
    readings: dict[str, Tensor | Exception] = {}
    for kind in KINDS:
        try:
            ids, label = values.cpu(), name
            # A sum of numbers that are no ids would look as if they were.
            if kind == "offsets" and ids.ndim == 1 and not ids.is_floating_point() and ids.dtype != torch.bool:
                ids, label = ids + torch.arange(len(ids)), f"i + {name}[i]"
            ids = check_ids(label, ids, vocab_size)
            # The numbers of a draft head name its rows, whose order cannot be changed; offsets are of ascending ids.
            readings[kind] = check_rows(label, ids, vocab_size).long() if ascending or kind == "offsets" else ids
        except (TypeError, ValueError) as error:
            readings[kind] = error
    return readings


def _marked(t2d: Tensor, vocab_size: int) -> Tensor:
    """[R] int64: the target ids that t2d marks."""
    if t2d.dtype != torch.bool or t2d.shape != (vocab_size,):
        dtype = str(t2d.dtype).removeprefix("torch.")
        raise ValueError(f"t2d: expected shape [{vocab_size}] and dtype bool, got {list(t2d.shape)} and {dtype}")
    return t2d.cpu().nonzero()[:, 0]


def _same(left, right) -> bool:
    return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)


def _find(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    found = [key for key in tensors if str(key).split(".")[-1] == name]
    if len(found) > 1:
        raise ValueError(f"{name}: expected one tensor of this name, got {sorted(found)}")
    value = tensors[found[0]] if found else None
    if value is not None and not (isinstance(value, Tensor) and value.ndim == 1):
        raise TypeError(f"{name}: expected a tensor of one dimension, got {_described(value)}")
    return value


def _load(path: Path | str):
    """What a file holds, without running any code that it may hold."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a token map, got no such file")
    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path}: expected tensors or a list of ids that load without running code, got {reason}"
        ) from error


def _described(value) -> str:
    return f"{type(value).__name__} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
