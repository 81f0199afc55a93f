"""Compile the head's Triton kernels for GPUs that need not be here: `python tests/head_triton_aot.py [--full]`.

Prints as tests/triton_aot.py does, whose process it needs to be separate from for the same reason.
"""

from __future__ import annotations

import json
import sys

import torch
import triton

from specdec_kernels.triton import head
from triton_aot import TARGETS, source

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
BATCHES = (1, 2, 4, 16, 32, 64, 256)  # each meets another entry of head_configs
DIM, HEIGHT = 4096, 128256


def empty(*shape, dtype=torch.int32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def calls(
    target, batch, dtype=torch.bfloat16, weight=None, k=8, *, dim=DIM, height=HEIGHT, rows=None, names=False,
    draws=False, extras=False, part=False, all_logits=False, strided=False,
):  # fmt: skip
    """The launches of a call on tensors without data; `rows`: shared, own or groups."""
    width = dim if weight != "int4" else -(-dim // 128) * 64
    step = 2 if strided else 1
    values = empty(height, width * step, dtype=FORMATS.get(weight, dtype))[:, ::step]
    hidden = empty(batch, dim * step, dtype=dtype)[:, ::step]
    scale = None
    if weight is not None or extras:
        scale = empty(height, *([-(-dim // 128)] if weight == "int4" else []), dtype=torch.float32)
    lines = {"shared": (32000,), "own": (batch, 2048), "groups": (3, 2048)}
    seed = empty(batch, dtype=torch.int64) if draws else None
    _, found = head.launches(
        target, PROCESSORS[target], hidden, values, k, seed, seed, empty(batch) if draws else None,
        empty(*lines[rows]) if rows else None, empty(batch) if rows == "groups" else None,
        empty(height) if names else None, empty(height, dtype=dtype) if extras else None, scale, 0.7,
        empty(batch, dtype=torch.float32) if extras else None, all_logits, part=part,
    )  # fmt: skip
    return found


def configurations(full: bool):
    """(name, targets, arguments of `calls` but the target) of what is compiled."""
    everything = {"draws": True, "extras": True, "all_logits": True}
    targets = list(TARGETS)
    if not full:  # one target after another
        yield "bf16 dot", targets, {"batch": 16}
        some = [
            ("bf16 gemv, draws", {"batch": 2, "draws": True}),
            ("fp32 dot, shared rows, all on", {"batch": 16, "dtype": torch.float32, "rows": "shared", **everything}),
            ("bf16 groups, draws", {"batch": 60, "rows": "groups", "draws": True}),
            ("int4 dot", {"batch": 16, "weight": "int4"}),
            ("fp8 dot, k = 64", {"batch": 64, "weight": "fp8", "k": 64, "names": True}),
            ("part of 256, draws", {"batch": 256, "part": True, "draws": True}),
            ("int8 gemv, own rows", {"batch": 10, "weight": "int8", "rows": "own"}),
        ]
        for i, (name, how) in enumerate(some):
            yield name, [targets[(i + 1) % len(targets)]], how
        return
    for batch in BATCHES:
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            yield f"{kind} x {batch}", targets, {"batch": batch, "dtype": dtype}
            most = {"rows": "shared", "k": 64, **everything}
            yield f"{kind} x {batch}, all on", targets, {"batch": batch, "dtype": dtype, **most}
    for batch in (1, 16, 64):
        yield f"float16 x {batch}", targets, {"batch": batch, "dtype": torch.float16}
        for weight in FORMATS:
            yield f"{weight} x {batch}", targets, {"batch": batch, "weight": weight, "draws": True}
            yield f"{weight} x {batch}, fp32", targets, {"batch": batch, "weight": weight, "dtype": torch.float32}
    for rows in ("own", "groups"):
        for weight in (None, *FORMATS):
            yield f"{weight}, {rows}", targets, {"batch": 60, "weight": weight, "rows": rows, "draws": True}
    for batch in (1, 16, 256):
        for draws in (False, True):
            yield f"part x {batch}, draws {draws}", targets, {"batch": batch, "part": True, "draws": draws}
        awkward = {"dim": 60, "height": 111, "names": True, "strided": True}
        yield f"awkward x {batch}", targets, {"batch": batch, **awkward, **everything}
        yield f"awkward int4 x {batch}", targets, {"batch": batch, "weight": "int4", **awkward, **everything}


def main() -> None:
    for name, targets, how in configurations("--full" in sys.argv[1:]):
        for target_name in targets:
            target = TARGETS[target_name]
            for kernel, _, arguments, options in calls(target_name, **how):
                compiled = triton.compile(source(kernel, arguments), target=target, options=options)
                binary = compiled.asm["hsaco" if target.backend == "hip" else "cubin"]
                row = {"name": f"{name}: {kernel.__name__}", "target": target_name, "bytes": len(binary)}
                print(json.dumps(row | {"shared": compiled.metadata.shared}), flush=True)


if __name__ == "__main__":
    main()
