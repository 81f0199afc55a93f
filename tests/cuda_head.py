"""The head's CUDA code behind the public functions: on the host (cuda_host.h), or on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import subprocess
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from cuda_verify import FLAGS, ROOT, compiler
from specdec_kernels import backends, library

SOURCES = ("cuda_host.cpp", "cuda_head_host.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {**TYPES, torch.int8: 3, torch.float8_e4m3fn: 4, torch.uint8: 5}
# Shared memory of a multiprocessor and of one of its thread blocks: H200, A100, and one on which little fits.
H200, A100, SMALL = (233472, 232448), (167936, 166912), (102400, 40960)

_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Launch(ctypes.Structure):
    """`Launch` of csrc/cuda/head.h."""

    _fields_ = [
        ("format", _I32), ("hidden", _P), ("hidden_stride", _I64), ("hidden_step", _I64), ("hidden_type", _I32),
        ("weight", _P), ("weight_stride", _I64), ("row_bytes", _I64), ("width", _I32),
        ("dim", _I32), ("height", _I32), ("count", _I32),
        ("rows", _P), ("rows_stride", _I64), ("row_groups", _P), ("lists", _I32), ("token_ids", _P),
        ("bias", _P), ("bias_type", _I32), ("scale", _P), ("temperature", _F32), ("temperatures", _P),
        ("batch", _I32), ("k", _I32), ("seed", _P), ("offset", _P), ("row", _P),
        ("out_logits", _P), ("out_tokens", _P), ("out_lse", _P), ("out_entropy", _P), ("out_keys", _P),
        ("out_sums", _P), ("all_logits", _P),
        ("blocks", _I32), ("groups", _I32), ("columns", _I32), ("shared", _I64 * 10), ("scratch", _P * 4),
    ]  # fmt: skip


class Machine(ctypes.Structure):
    """`Machine` of cuda_head_host.cpp."""

    _fields_ = [("of_multiprocessor", _I64), ("of_block", _I64), ("blocks", _I32)]


def build(folder: Path, sanitiser: str | None = None, *, kernels: Path = ROOT / "csrc/cuda") -> Path:
    """The library or, with a sanitiser, the program, of the device code in `kernels`; returns its path."""
    output = folder / ("head_host.so" if sanitiser is None else f"head_host_{sanitiser}")
    scheduler, head = (folder / f"{source}.{sanitiser}.o" for source in SOURCES)
    sanitise = [] if sanitiser is None else [f"-fsanitize={sanitiser}"]
    kind = ["-shared"] if sanitiser is None else []
    of_scheduler = ["-DSPECDEC_SANITISED"] * bool(sanitise) + ["-DSPECDEC_TSAN"] * (sanitiser == "thread")
    of_head = [f"-I{kernels}", *sanitise, *["-DSPECDEC_PROGRAM"] * bool(sanitise)]
    for source, target, flags in zip(SOURCES, (scheduler, head), (of_scheduler, of_head), strict=True):
        subprocess.run([compiler(), *FLAGS, *flags, "-c", str(ROOT / "tests" / source), "-o", str(target)], check=True)
    subprocess.run([compiler(), str(scheduler), str(head), *sanitise, *kind, "-o", str(output)], check=True)
    return output


class Ops:
    """The head's ops under the name of backend `cuda`, as the public functions call them."""

    @contextlib.contextmanager
    def instead(self):
        """The public functions find these ops where they look for those of `cuda`."""
        select, overload = backends.select, library.overload

        def chosen(op, device, forced, **facts):
            return "cuda" if forced == "cuda" else select(op, device, forced, **facts)

        def found(name, backend):
            return getattr(self, name) if backend == "cuda" else overload(name, backend)

        with mock.patch.object(backends, "select", chosen), mock.patch.object(library, "overload", found):
            yield self


class Gpu(Ops):
    """The compiled ops, between copies of all tensors."""

    def __init__(self):
        assert backends.MISSING["cuda"] is None, backends.MISSING["cuda"]

    def __getattr__(self, name):
        def call(*arguments):
            there = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
            return tuple(out.cpu() for out in library.overload(name, "cuda")(*there))

        return call


class Host(Ops):
    """The device code on the host, as a machine with `blocks` thread blocks at a time would run it."""

    def __init__(self, path: Path, *, machine=H200, blocks: int = 3):
        self.library = ctypes.CDLL(str(path))
        self.library.head_on_host.restype = ctypes.c_char_p
        assert self.library.launch_size() == ctypes.sizeof(Launch)
        self.machine = Machine(*machine, blocks)

    def head_topk(self, hidden, weight, k, *rest):
        return self.head_sample(hidden, weight, k, None, None, None, *rest)

    def head_sample(self, hidden, weight, k, seed, offset, row, *rest):
        *rest, return_logits = rest
        call = Call(hidden, weight, k, seed, offset, row, *rest)
        batch, count = call.launch.batch, call.launch.count
        outputs = (
            call.output("out_logits", (batch, k)), call.output("out_tokens", (batch, k), torch.int32),
            call.output("out_lse", (batch,)), call.output("out_entropy", (batch,)),
            call.output("all_logits", (batch, count)) if return_logits else torch.empty(batch, 0),
        )  # fmt: skip
        return self._run(call, outputs)

    def head_part(self, hidden, weight, k, *rest):
        call = Call(hidden, weight, k, *rest)
        batch = call.launch.batch
        outputs = (
            call.output("out_keys", (batch, k), torch.float64), call.output("out_logits", (batch, k)),
            call.output("out_tokens", (batch, k), torch.int32), call.output("out_sums", (batch, 3), torch.float64),
        )  # fmt: skip
        return self._run(call, outputs)

    def _run(self, call, outputs):
        failure = self.library.head_on_host(ctypes.byref(call.launch), ctypes.byref(self.machine))
        assert failure is None, failure.decode()
        return outputs


class Program(Host):
    """The same in a process of its own, which a sanitiser watches."""

    def __init__(self, path: Path, folder: Path, *, machine=H200, blocks: int = 3):
        self.path, self.files = path, (folder / "arguments", folder / "results")
        self.machine = Machine(*machine, blocks)

    def _run(self, call, outputs):
        self.files[0].write_bytes(call.packed(self.machine))
        done = subprocess.run([str(self.path), *map(str, self.files)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:6000]
        call.unpack(self.files[1].read_bytes())
        return outputs


class Call:
    """The op's arguments as csrc/cuda/head.cu lays them out."""

    def __init__(
        self, hidden, weight, k, seed, offset, row, rows, row_groups, token_ids, bias, scale, temperature, temperatures
    ):  # fmt: skip
        self.launch, self.kept = Launch(), []
        launch, size = self.launch, hidden.element_size()
        launch.format, launch.hidden_type = FORMATS[weight.dtype], TYPES[hidden.dtype]
        launch.hidden_stride, launch.hidden_step = (stride * size for stride in hidden.stride())
        weight = weight if weight.shape[1] <= 1 or weight.stride(1) == 1 else weight.contiguous()
        launch.weight_stride = weight.stride(0) * weight.element_size()
        launch.row_bytes = weight.shape[1] * weight.element_size()
        (launch.batch, launch.dim), launch.height, launch.k = hidden.shape, weight.shape[0], k
        launch.count = weight.shape[0] if rows is None else rows.shape[-1]
        launch.lists = -1 if rows is None else rows.shape[0] if rows.ndim == 2 else 1
        launch.rows_stride = launch.count
        launch.temperature = temperature
        if bias is not None:
            launch.bias_type = TYPES[bias.dtype]
        self._set(hidden=hidden, weight=weight)
        vectors = {
            "rows": rows, "row_groups": row_groups, "token_ids": token_ids, "bias": bias, "scale": scale,
            "temperatures": temperatures, "seed": seed, "offset": offset, "row": row,
        }  # fmt: skip
        self._set(**{name: tensor.contiguous() for name, tensor in vectors.items() if tensor is not None})

    def output(self, name: str, shape, dtype=torch.float32) -> Tensor:
        """A tensor that the call fills, poisoned."""
        tensor = torch.full(shape, -7777, dtype=dtype)
        self._set(**{name: tensor})
        return tensor

    def _set(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.kept.append((getattr(Launch, name).offset, tensor))
            setattr(self.launch, name, tensor.data_ptr() or None)

    def packed(self, machine: Machine) -> bytes:
        """What the program reads: every tensor with just the memory between its first and its last element."""
        parts = [struct.pack("<q", len(self.kept))]
        for field, tensor in self.kept:
            size = _bytes_of(tensor)
            parts.append(struct.pack("<3q", field, tensor.data_ptr() % 16, size))
            parts.append(ctypes.string_at(tensor.data_ptr(), size) if size else b"")
        return b"".join([*parts, bytes(machine), bytes(self.launch)])

    def unpack(self, results: bytes) -> None:
        """Puts what the program wrote back into the tensors."""
        at = 0
        for _, tensor in self.kept:
            size = _bytes_of(tensor)
            if size:
                ctypes.memmove(tensor.data_ptr(), results[at : at + size], size)
            at += size
        assert at == len(results)


def _bytes_of(tensor: Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.element_size() * reach if tensor.numel() else 0


def same_bits(got, expected, what="") -> None:
    for a, b in zip(got, expected, strict=True):
        integers = {4: torch.int32, 8: torch.int64}[a.element_size()]
        assert torch.equal(a.view(integers), b.view(integers)), what


def quantised(weight, kind: str):
    """(values, scales, dequantised weight in float64), as the op's schema has them."""
    height, dim = weight.shape
    if kind == "int4":
        groups = -(-dim // 128)
        padded = torch.nn.functional.pad(weight.float(), (0, groups * 128 - dim)).view(height, groups, 128)
        scales = padded.abs().amax(2).clamp(min=1e-6) / 7
        q = (padded / scales[:, :, None]).round().clamp(-8, 7)
        codes = (q + 8).to(torch.uint8)
        values = (codes[..., :64] | codes[..., 64:] << 4).view(height, groups * 64)
        return values, scales, (q.double() * scales.double()[:, :, None]).view(height, -1)[:, :dim]
    most, dtype = {"int8": (127, torch.int8), "fp8": (448, torch.float8_e4m3fn)}[kind]
    scales = weight.float().abs().amax(1).clamp(min=1e-6) / most
    scaled = weight.float() / scales[:, None]
    values = (scaled.round() if kind == "int8" else scaled).to(dtype)
    return values, scales, values.double() * scales.double()[:, None]
