"""Which backends this machine has, which op each can serve, and why not."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

from . import library
from .checks import check_choice

NAMES = ("reference", "cpu", "triton", "cuda")
# Tried in this order where nobody forces a backend and PREFERENCE says nothing else.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# Of an op on a device type, lines (most, order): the first line counts whose `most` is not below the fact `together` of
# the call, the hidden vectors that look at a row of the head's weight. For bench/bench_gpu_head.py to set; NOT MEASURED
# yet: the CUDA kernels were written for few vectors, the Triton kernels for many.
_FEW_VECTORS = ((8, ("cuda", "triton", "reference")), (None, ("triton", "cuda", "reference")))
PREFERENCE: dict[tuple[str, str], tuple[tuple[int | None, tuple[str, ...]], ...]] = {
    ("head_topk", "cuda"): _FEW_VECTORS,
    ("head_sample", "cuda"): _FEW_VECTORS,
    ("head_part", "cuda"): _FEW_VECTORS,
}

# Read once: an environment that changes under a running program would make traced graphs lie.
FORCED = os.environ.get("SPECDEC_BACKEND") or None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if FORCED is not None:
    check_choice("SPECDEC_BACKEND", FORCED, NAMES)


class BackendError(RuntimeError):
    """A forced backend cannot serve a call; the message says why."""


def _load(module: str) -> str | None:
    """Import a compiled module; None if it is there, else the reason why not."""
    if importlib.util.find_spec(f"specdec_kernels.{module}") is None:
        return f"specdec_kernels.{module} was not built (no compiler, or SPECDEC_NO_EXT=1, at install time)"
    try:
        importlib.import_module(f"specdec_kernels.{module}")
    except (ImportError, OSError) as error:
        return f"specdec_kernels.{module} does not load: {error}"
    return None


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or INTERPRETED:
        return None
    return "triton needs a GPU, or TRITON_INTERPRET=1 before the import"


def _cuda_missing() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _load("_C_cuda")


# backend -> why it cannot be used on this machine (None: it can). The reference always can.
MISSING: dict[str, str | None] = {"reference": None}


def initialise() -> None:
    """Load the compiled modules once all schemas are declared (called by the package's import)."""
    MISSING.update(cpu=_load("_C"), triton=_triton_missing(), cuda=_cuda_missing())


# (op, backend) -> function of the call's facts that returns None, or why the backend cannot serve that call.
_LIMITS: dict[tuple[str, str], Callable[..., str | None]] = {}


def serves(op: str, backend: str, limit: Callable[..., str | None] = lambda **facts: None) -> None:
    """Declare that `backend` has a kernel for `op`; `limit(**facts)` says why it cannot serve a call, or None."""
    _LIMITS[op, backend] = limit


def why_not(op: str, backend: str, device: str, **facts) -> str | None:
    """None if `backend` can serve this call of `op` on tensors of `device`, else one clause that says why not."""
    if backend == "reference":
        return None
    if (op, backend) not in _LIMITS:
        return f"has no kernel for {op}"
    if MISSING[backend] is not None:
        return MISSING[backend]
    if backend in ("cpu", "cuda") and backend != device:
        return f"serves {backend} tensors, got {device}"
    if backend == "triton" and device != "cuda" and not INTERPRETED:
        return f"serves cuda tensors (any under TRITON_INTERPRET=1), got {device}"
    return _LIMITS[op, backend](**facts)


def _order(op: str, device: str, together: int) -> tuple[str, ...]:
    for most, order in PREFERENCE.get((op, device), ()):
        if most is None or together <= most:
            return order
    return _ORDER.get(device, ("reference",))


def select(op: str, device: str, forced: str | None, **facts) -> str:
    """The backend that serves a call: the forced one, or the first of the device's order that can.

    Args:
        op: name of the op, e.g. `verify_chain`.
        device: device type of its tensors.
        forced: the caller's `backend=`; None falls back to SPECDEC_BACKEND, then to the order.
        facts: what the op's limits and PREFERENCE look at (method, dtypes, filters in use, sizes).

    Raises:
        ValueError: a backend of no such name.
        BackendError: the forced backend cannot serve this call.
    """
    forced = forced if forced is not None else FORCED
    if forced is not None:
        check_choice("backend", forced, NAMES)
        reason = why_not(op, forced, device, **facts)
        if reason is not None:
            raise BackendError(f"backend={forced!r} cannot serve {op}: {reason}")
        return forced
    for backend in _order(op, device, facts.get("together", 1)):
        if why_not(op, backend, device, **facts) is None:
            return backend
    return "reference"


def table() -> dict[str, dict]:
    """For each backend: whether it is available, why not, and the ops it has kernels for."""
    ops = {backend: sorted(op for op, name in _LIMITS if name == backend) for backend in NAMES}
    ops["reference"] = sorted(library.OPS)
    return {b: {"available": MISSING[b] is None, "reason": MISSING[b], "ops": ops[b]} for b in NAMES}
