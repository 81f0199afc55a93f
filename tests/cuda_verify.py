"""Verification's CUDA code on the host (cuda_host.h) behind the public functions: builds it and hands it arguments."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import specdec_kernels as sk
from specdec_kernels import backends, library

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("cuda_host.cpp", "cuda_verify_host.cpp")
METHODS = (
    "greedy", "target_only", "multi_round", "without_replacement", "k_seq", "greedy_multi", "typical", "traversal",
    "traversal_iid",
)  # fmt: skip
CHAINS = {"token": "multi_round", "block": "traversal"}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# _FORTIFY_SOURCE takes a jump to another fiber's stack for an error.
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
FLAGS += ["-ffp-contract=off", "-fPIC", f"-I{ROOT / 'csrc/include'}"]

_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Side(ctypes.Structure):
    """`Side` of csrc/cuda/verify.h."""

    _fields_ = [
        ("data", _P), ("mixed", _P), ("stride", _I64), ("mixed_stride", _I64), ("mix", _F32), ("type", _I32),
        ("columns", _I64), ("vocabulary", _I64), ("ids", _P), ("allowed", _P), ("allowed_stride", _I64),
        ("params", _P), ("common", _F32 * 4),
    ]  # fmt: skip


class Launch(ctypes.Structure):
    """`Launch` of csrc/cuda/verify.h."""

    _fields_ = [
        ("sides", Side * 2), ("tokens", _P), ("parents", _P), ("cu_nodes", _P), ("counts", _P), ("judge", _P),
        ("synthetic", _P), ("lenience", _F32), ("seed", _P), ("offset", _P), ("accept_uniforms", _P),
        ("final_uniforms", _P), ("out_tokens", _P), ("out_nodes", _P), ("out_number", _P), ("out_logprobs", _P),
        ("nodes", _I64), ("vocabulary", _I64), ("batch", _I32), ("max_nodes", _I32), ("max_depth", _I32),
        ("team", _I32), ("scratch", _I64 * 8),
    ]  # fmt: skip


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build(folder: Path, sanitiser: str | None = None, *, kernels: Path = ROOT / "csrc/cuda") -> Path:
    """The library or, with a sanitiser, the program, of the device code in `kernels`; returns its path."""
    output = folder / ("verify_host.so" if sanitiser is None else f"verify_host_{sanitiser}")
    scheduler, verify = (folder / f"{source}.{sanitiser}.o" for source in SOURCES)
    sanitise = [] if sanitiser is None else [f"-fsanitize={sanitiser}"]
    kind = ["-shared"] if sanitiser is None else []
    of_scheduler = ["-DSPECDEC_SANITISED"] * bool(sanitise) + ["-DSPECDEC_TSAN"] * (sanitiser == "thread")
    of_verify = [f"-I{kernels}", *sanitise, *["-DSPECDEC_PROGRAM"] * bool(sanitise)]
    for source, target, flags in zip(SOURCES, (scheduler, verify), (of_scheduler, of_verify), strict=True):
        subprocess.run([compiler(), *FLAGS, *flags, "-c", str(ROOT / "tests" / source), "-o", str(target)], check=True)
    subprocess.run([compiler(), str(scheduler), str(verify), *sanitise, *kind, "-o", str(output)], check=True)
    return output


class Host:
    """The ops as they would run on a device that gives each request `team` thread blocks."""

    def __init__(self, path: Path, *, team: int = 2, readers: int = 2):
        self.library = ctypes.CDLL(str(path))
        self.library.verify_on_host.restype = ctypes.c_char_p
        assert self.library.launch_size() == ctypes.sizeof(Launch)
        self.team, self.readers = team, readers
        self.calls = 0

    def run(self, case, **changes) -> sk.Verified:
        """`case`, of tree_cases.py."""
        return self._instead(case.run, None, **changes)

    def chain(self, *arguments, **options) -> sk.Verified:
        """`specdec_kernels.verify_chain`."""
        return self._instead(sk.verify_chain, *arguments, **options)

    def _instead(self, function, *arguments, **options):
        """Calls a public function, which finds these ops where it looks for a backend's."""
        calls = self.calls
        with (
            mock.patch.object(backends, "select", lambda *_, **__: "host"),
            mock.patch.object(library, "overload", lambda name, _: getattr(self, name)),
        ):
            answer = function(*arguments, **options)
        assert self.calls == calls + 1
        return answer

    def verify_chain(self, tokens, cu_nodes, target, draft, draft_vocab, max_depth, method, *tail):
        sizes = (max_depth + 1, max_depth, CHAINS.get(method, method))
        return self.verify_tree(tokens, None, cu_nodes, None, target, draft, draft_vocab, *sizes, *tail)

    def verify_tree(self, *arguments):
        call = Call(self.team, *arguments)
        failure = self.library.verify_on_host(ctypes.byref(call.launch), call.method, self.readers)
        assert failure is None, failure.decode()
        self.calls += 1
        return call.outputs


class Program(Host):
    """The same in a process of its own, which a sanitiser watches."""

    def __init__(self, path: Path, folder: Path, *, team: int = 2, readers: int = 2):
        self.path, self.file = path, folder / "arguments"
        self.team, self.readers = team, readers
        self.calls = 0

    def verify_tree(self, *arguments):
        call = Call(self.team, *arguments)
        self.file.write_bytes(call.packed(self.readers))
        done = subprocess.run([str(self.path), str(self.file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:6000]
        for output, line in zip(call.outputs, done.stdout.splitlines(), strict=False):
            output.copy_(torch.tensor([int(x) for x in line.split()], dtype=torch.int32).view_as(output))
        self.calls += 1
        return call.outputs


class Call:
    """The op's arguments as csrc/cuda/verify.cu lays them out, and its outputs, poisoned."""

    def __init__(
        self, team, tokens, parents, cu_nodes, counts, target, draft, draft_vocab, max_nodes, max_depth, method,
        params, scalars, allowed, draft_params, draft_scalars, draft_allowed,
        judge, reflect, reflect_weight, synthetic, lenience, seed, offset, accept, final, logprobs,
    ):  # fmt: skip
        self.launch, self.method = Launch(), METHODS.index(method)
        self.kept: list[tuple[int, Tensor]] = []  # where its address stands, and the tensor
        batch, width = len(cu_nodes) - 1, max_depth + 1
        if method == "greedy":
            params, scalars = None, (0.0, 0.0, 1.0, 0.0)
        if method in ("greedy", "target_only", "typical") or synthetic is not None:
            draft = None
        sides = (
            (target, reflect, None, allowed, params, scalars),
            (draft, None, draft_vocab, draft_allowed, draft_params, draft_scalars),
        )
        for i, (logits, mixed, ids, mask, of_requests, common) in enumerate(sides):
            if logits is None:
                continue
            side, at = self.launch.sides[i], Launch.sides.offset + i * ctypes.sizeof(Side)
            side.stride = self._rows(side, "data", logits, at) * logits.element_size()
            side.mixed_stride = self._rows(side, "mixed", mixed, at) * logits.element_size()
            side.allowed_stride = self._rows(side, "allowed", mask, at)
            side.mix, side.type = reflect_weight, TYPES[logits.dtype]
            side.columns, side.vocabulary = logits.shape[1], target.shape[1]
            self._set(side, "ids", ids, at)
            self._set(side, "params", of_requests, at)
            side.common = (ctypes.c_float * 4)(*common)
        self.outputs = tuple(
            torch.full(shape, -7777, dtype=dtype)
            for shape, dtype in (
                ((batch, width), torch.int32),
                ((batch, width), torch.int32),
                ((batch,), torch.int32),
                ((batch, width if logprobs else 0), torch.float32),
            )
        )
        given = {
            "tokens": tokens, "parents": parents, "cu_nodes": cu_nodes, "counts": counts, "judge": judge,
            "synthetic": synthetic, "seed": seed, "offset": offset, "accept_uniforms": accept,
            "final_uniforms": final, "out_tokens": self.outputs[0], "out_nodes": self.outputs[1],
            "out_number": self.outputs[2], "out_logprobs": self.outputs[3] if logprobs else None,
        }  # fmt: skip
        for name, tensor in given.items():
            self._set(self.launch, name, tensor)
        self.launch.lenience, self.launch.nodes, self.launch.vocabulary = lenience, *target.shape
        self.launch.batch, self.launch.max_nodes, self.launch.max_depth = batch, max_nodes, max_depth
        self.launch.team = team

    def _set(self, struct_, name: str, tensor: Tensor | None, base: int = 0) -> None:
        if tensor is not None:
            tensor = tensor.contiguous()
            self.kept.append((base + getattr(type(struct_), name).offset, tensor))
            setattr(struct_, name, tensor.data_ptr())

    def _rows(self, side: Side, name: str, tensor: Tensor | None, base: int) -> int:
        """Returns the elements between rows, which are read where they lie."""
        if tensor is None:
            return 0
        tensor = tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()
        self.kept.append((base + getattr(Side, name).offset, tensor))
        setattr(side, name, tensor.data_ptr())
        return tensor.stride(0)

    def packed(self, readers: int) -> bytes:
        """What the program reads: every tensor with just the memory between its first and its last element."""
        parts = [struct.pack("<3q", self.method, readers, len(self.kept))]
        for field, tensor in self.kept:
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            size = tensor.element_size() * (reach if tensor.numel() else 0)
            parts += [
                struct.pack("<3q", field, tensor.data_ptr() % 16, size),
                ctypes.string_at(tensor.data_ptr(), size),
            ]
        return b"".join([*parts, bytes(self.launch)])
