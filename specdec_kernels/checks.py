"""Argument checks shared by the public functions. Messages name the argument, what came and what was expected."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The references also take float64, in which the law tests enumerate.
REFERENCE_FLOATS = (*FLOATS, torch.float64)
INT32 = (torch.int32,)
INT64 = (torch.int64,)

# Checks that must read device memory synchronise, so they run only on request.
DEBUG = os.environ.get("SPECDEC_DEBUG", "0") not in ("", "0")


def check_tensor(name: str, value, sizes: dict[str, int], shape: str, dtypes, device=None) -> None:
    """Check type, dtype, device and shape; `shape` names dimensions, and names met first bind in `sizes`.

    >>> check_tensor("hidden", hidden, sizes, "B D", FLOATS)

    Raises:
        TypeError: not a tensor, or a dtype that is not in `dtypes`.
        ValueError: a number of dimensions, a size or a device that does not fit.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")
    names, got = shape.split(), value.shape
    if len(names) != len(got):
        raise ValueError(f"{name}: expected shape [{', '.join(names)}], got {list(got)}")
    # Every op pays for this on each of its tensors, so what is looked up is looked up once.
    for axis, size in zip(names, got, strict=True):
        wanted = sizes.get(axis)
        if wanted is None:
            wanted = sizes[axis] = int(axis) if axis.isdigit() else size
        if wanted != size:
            expected = ", ".join(n if n.isdigit() or n not in sizes else f"{n}={sizes[n]}" for n in names)
            raise ValueError(f"{name}: expected shape [{expected}], got {list(got)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_choice(name: str, value, choices) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_int(name: str, value, low: int, high: int | None = None) -> None:
    """Raise TypeError/ValueError unless `value` is an integer in [low, high]."""
    if isinstance(value, (bool, float, str)) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bound = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name}: expected {bound}, got {value}")


def check_draft_vocab(draft_vocab: Tensor, vocabulary: int | None = None) -> None:
    """Under SPECDEC_DEBUG=1 raise ValueError unless the ids ascend and lie in the vocabulary, where it is known."""
    fine, expected = draft_vocab >= 0, "ids >= 0"
    if vocabulary is not None:
        fine, expected = fine & (draft_vocab < vocabulary), f"ids in 0..{vocabulary - 1}"
    check_values("draft_vocab", fine, draft_vocab, expected)
    check_values("draft_vocab", draft_vocab[1:] > draft_vocab[:-1], draft_vocab[1:], "strictly ascending ids")


def check_values(name: str, ok: Tensor, value: Tensor, expected: str) -> None:
    """Raise ValueError unless all of `ok` holds; shows the first offender. Reads the device."""
    if not bool(ok.all()):
        index = int((~ok).reshape(-1).nonzero()[0])
        raise ValueError(f"{name}: expected {expected}, got {value.reshape(-1)[index].item()} at index {index}")
