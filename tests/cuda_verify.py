"""Verification's CUDA code on the host (cuda_host.h), behind the public functions: builds it, hands it arguments."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import specdec_kernels as sk
from specdec_kernels import backends, library

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("cuda_host.cpp", "cuda_verify_host.cpp")
HEADERS = [*(ROOT / "csrc/cuda").glob("verify*"), *(ROOT / "csrc/include/specdec").glob("*.h")]
METHODS = (
    "greedy", "target_only", "multi_round", "without_replacement", "k_seq", "greedy_multi", "typical", "traversal",
    "traversal_iid",
)  # fmt: skip
CHAINS = {"token": "multi_round", "block": "traversal"}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
FLAGS += ["-U_FORTIFY_SOURCE", f"-I{ROOT / 'csrc/include'}"]  # which takes a jump to another stack for an error

_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Side(ctypes.Structure):
    _fields_ = [
        ("data", _P), ("mixed", _P), ("stride", _I64), ("mixed_stride", _I64), ("mix", _F32), ("type", _I32),
        ("columns", _I64), ("vocabulary", _I64), ("ids", _P), ("allowed", _P), ("allowed_stride", _I64),
        ("params", _P), ("common", _F32 * 4),
    ]  # fmt: skip


class Launch(ctypes.Structure):
    _fields_ = [
        ("sides", Side * 2), ("tokens", _P), ("parents", _P), ("cu_nodes", _P), ("counts", _P), ("judge", _P),
        ("synthetic", _P), ("lenience", _F32), ("seed", _P), ("offset", _P), ("accept_uniforms", _P),
        ("final_uniforms", _P), ("out_tokens", _P), ("out_nodes", _P), ("out_number", _P), ("out_logprobs", _P),
        ("nodes", _I64), ("vocabulary", _I64), ("batch", _I32), ("max_nodes", _I32), ("max_depth", _I32),
        ("team", _I32), ("scratch", _I64 * 8),
    ]  # fmt: skip


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build(folder: Path, *flags: str) -> Path:
    """A library, or a program where -fsanitize is among the flags; returns its path."""
    sanitised = [flag for flag in flags if flag.startswith("-fsanitize=")]
    output = folder / ("verify_host" if sanitised else "verify_host.so")
    objects = []
    for source in SOURCES:
        # The scheduler is not instrumented: what it does is no thread's.
        own = [flag for flag in flags if source != SOURCES[0] or flag not in sanitised]
        objects.append(str(folder / f"{source}.o"))
        command = [compiler(), *FLAGS, *own, "-fPIC", "-c", str(ROOT / "tests" / source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    link = [compiler(), *objects, *sanitised, "-o", str(output), *([] if sanitised else ["-shared"])]
    subprocess.run(link, check=True)
    return output


class Host:
    """The op's overloads, as they would be called on a device with few multiprocessors."""

    def __init__(self, path: Path, *, team: int = 2, readers: int = 2):
        self.library = ctypes.CDLL(str(path))
        self.library.verify_on_host.restype = ctypes.c_char_p
        assert self.library.launch_size() == ctypes.sizeof(Launch)
        self.team, self.readers = team, readers

    def run(self, case, **changes) -> sk.Verified:
        """`case`, of tree_cases, by way of the public functions."""
        with self.installed():
            return case.run(None, **changes)

    @contextlib.contextmanager
    def installed(self):
        with (
            mock.patch.object(backends, "select", lambda *_, **__: "host"),
            mock.patch.object(library, "overload", lambda name, _: getattr(self, name)),
        ):
            yield

    def verify_chain(self, tokens, cu_nodes, target, draft, draft_vocab, max_depth, method, *tail):
        parents = counts = None
        method = CHAINS.get(method, method)
        return self.verify_tree(
            tokens, parents, cu_nodes, counts, target, draft, draft_vocab, max_depth + 1, max_depth, method, *tail
        )

    def verify_tree(self, *arguments):
        launch, method, outputs, _kept = launch_of(*arguments)
        launch.team = self.team
        failure = self.library.verify_on_host(ctypes.byref(launch), METHODS.index(method), self.readers)
        assert failure is None, failure.decode()
        return outputs


def launch_of(
    tokens, parents, cu_nodes, counts, target, draft, draft_vocab, max_nodes, max_depth, method,
    params, scalars, allowed, draft_params, draft_scalars, draft_allowed,
    judge, reflect, reflect_weight, synthetic, lenience, seed, offset, accept, final, logprobs,
):  # fmt: skip
    """(Launch, the tree's method, outputs, what must live as long) of the op's arguments, as csrc/cuda makes them."""
    kept: list[Tensor] = []

    def pointer(tensor: Tensor | None):
        if tensor is None:
            return None
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    def rows(tensor: Tensor | None) -> tuple:
        """(address, bytes between rows)"""
        if tensor is None:
            return None, 0
        kept.append(tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous())
        return kept[-1].data_ptr(), kept[-1].stride(0) * tensor.element_size()

    nodes, vocabulary = target.shape
    batch, width = len(cu_nodes) - 1, max_depth + 1
    if method == "greedy" and synthetic is None:
        params, scalars, draft = None, (0.0, 0.0, 1.0, 0.0), None
    launch = Launch()
    sides = (
        (target, reflect, None, allowed, params, scalars),
        (draft, None, draft_vocab, draft_allowed, draft_params, draft_scalars),
    )
    for side, (logits, mixed, ids, mask, of_requests, common) in zip(launch.sides, sides, strict=True):
        if logits is None:
            continue
        side.data, side.stride = rows(logits)
        side.mixed, side.mixed_stride = rows(mixed)
        side.mix, side.type = reflect_weight, TYPES[logits.dtype]
        side.columns, side.vocabulary, side.ids = logits.shape[1], vocabulary, pointer(ids)
        side.allowed, side.allowed_stride = rows(mask)
        side.allowed_stride //= 4
        side.params, side.common = pointer(of_requests), (ctypes.c_float * 4)(*common)
    outputs = (
        torch.full((batch, width), -7777, dtype=torch.int32),
        torch.full((batch, width), -7777, dtype=torch.int32),
        torch.full((batch,), -7777, dtype=torch.int32),
        torch.full((batch, width if logprobs else 0), -7777.0),
    )
    given = {
        "tokens": tokens, "parents": parents, "cu_nodes": cu_nodes, "counts": counts, "judge": judge,
        "synthetic": synthetic, "seed": seed, "offset": offset, "accept_uniforms": accept, "final_uniforms": final,
    }  # fmt: skip
    for name, tensor in given.items():
        setattr(launch, name, pointer(tensor))
    for name, tensor in zip(("out_tokens", "out_nodes", "out_number"), outputs, strict=False):
        setattr(launch, name, tensor.data_ptr())
    launch.out_logprobs = outputs[3].data_ptr() if logprobs else None
    launch.lenience, launch.nodes, launch.vocabulary = lenience, nodes, vocabulary
    launch.batch, launch.max_nodes, launch.max_depth, launch.team = batch, max_nodes, max_depth, 1
    return launch, method, outputs, kept
