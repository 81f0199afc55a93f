"""Where ops meet the dispatcher: one schema, one fake and one reference for each.

Every op has three overloads of one signature. The default one is what the dispatcher resolves by device: compiled
modules register CPU and CUDA kernels on it, and the reference stands behind them. `.reference` and `.triton` always run
that backend, which is how a forced backend stays visible to `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "specdec_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_KEY = "CompositeExplicitAutograd"
OPS: list[str] = []  # every op that was declared, which the reference therefore serves


def declare(name: str, signature: str, *, reference: Callable, fake: Callable, triton: Callable | None = None) -> None:
    """Define `name` + `signature` for every backend; `fake` gives shapes and dtypes without data."""
    OPS.append(name)
    kernels = {"": reference, ".reference": reference}
    if triton is not None:
        kernels[".triton"] = triton
    for overload, kernel in kernels.items():
        _LIBRARY.define(f"{name}{overload}{signature}")
        _LIBRARY.impl(f"{name}{overload}", kernel, _KEY)
        torch.library.register_fake(f"{NAMESPACE}::{name}{overload}", fake, lib=_LIBRARY)


def overload(name: str, backend: str):
    """The overload that runs `backend`: `cpu` and `cuda` are what the dispatcher key resolves to."""
    packet = getattr(torch.ops.specdec_kernels, name)
    return packet.default if backend in ("cpu", "cuda") else getattr(packet, backend)
