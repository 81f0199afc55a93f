"""Compile attention, trees and kv in Triton for absent GPUs: `python tests/attention_triton_aot.py [--full]`.

Prints as tests/triton_aot.py does, whose process it needs to be separate from for the same reason.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.compiler import ASTSource

from specdec_kernels.triton import attention, kv, trees
from triton_aot import POINTERS, TARGETS

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8


def source(kernel, arguments: dict) -> ASTSource:
    """What a launch with `arguments` compiles, tuples included: the same types, the same specialisation of values."""
    constants, attributes = {}, {}

    def kind(value, path, special):
        if isinstance(value, tuple):
            return tuple(kind(item, (*path, i), special) for i, item in enumerate(value))
        if value is None or (special and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if special and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        if parameter.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", arguments[name]
        else:
            signature[name] = kind(arguments[name], (i,), not parameter.do_not_specialize)
    return ASTSource(kernel, signature, constants, attributes)


def empty(*shape, dtype=torch.int32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def attend(
    target, nodes=64, D=128, DV=None, query=BF16, cache=None, *, group=4, batch=4, length=16384, page=0, window=0,
    softcap=0.0, extras=False, shared=False,
):  # fmt: skip
    """The launches of one call of tree_attention on tensors without data."""
    DV, cache, heads = DV or D, cache or query, 8
    N = batch * nodes
    shape = (batch * length // page, page, heads) if page else (batch, heads, length)
    scales = empty(heads, dtype=FP32) if extras or cache.itemsize == 1 else None
    groups = empty(batch) if shared else None
    launch = attention.Launch(
        empty(N, heads * group, D, dtype=query), empty(*shape, D, dtype=cache), empty(*shape, DV, dtype=cache),
        empty(N), empty(N, (nodes + 63) // 64, dtype=torch.int64), empty(batch + 1), nodes, empty(batch),
        empty(batch, length // page) if page else None, groups, groups, D**-0.5, window, softcap,
        empty(heads * group, dtype=FP32) if extras else None, scales, scales, extras, arch=target,
        sms=PROCESSORS[target],
    )  # fmt: skip
    return [(kernel, item[0], item[1]) for kernel, item in launch.kernels()]


def layout(target, nodes=64, prefix=True):
    _, arguments, options, _ = trees.layout_arguments(empty(4 * nodes), empty(5), nodes, empty(4) if prefix else None)
    return [(trees.layout_kernel, arguments, options)]


def compact(target, layers=32, page=0, sizes=(128, 128), dtype=BF16, strided=False):
    """One launch for all layers; its caches are real, because their addresses are arguments."""
    shape = (8, 16, 2) if page else (2, 2, 64)
    step = 2 if strided else 1
    caches = [torch.empty(*shape, size * step, dtype=dtype)[..., ::step] for _ in range(layers) for size in sizes]
    launches = kv.compact_launches(caches, empty(2, 9), empty(2), empty(2, 4) if page else None)
    assert len(launches) == 1
    return [(kv.compact_kernel, arguments, options) for arguments, options, _ in launches]


def configurations(full: bool):
    """(name, targets, what gives the launches, its arguments but the target)."""
    targets = list(TARGETS)
    all_on = {"window": 1024, "softcap": 30.0, "extras": True, "shared": True, "page": 16}
    if not full:  # one target after another
        yield "bf16, all on", [targets[1]], attend, {"nodes": 4, **all_on}
        some = [
            ("int8, D 256", attend, {"nodes": 4, "D": 256, "cache": INT8}),
            ("layout", layout, {}),
            ("compact", compact, {"sizes": (128, 80)}),
            ("e4m3, windows", attend, {"nodes": 16, "D": 96, "cache": E4M3, "window": 512}),
            ("fp32, unsplit", attend, {"nodes": 2, "query": FP32, "length": 64}),
        ]
        for i, (name, launches, arguments) in enumerate(some):
            yield name, [targets[-1 - i]], launches, arguments
        return
    for D in (64, 80, 128, 256, 512):
        for nodes in (1, 16, 64) if D != 80 else (16,):
            for page, query in ((16, BF16), (0, FP32 if nodes == 16 else BF16)):
                arguments = {"nodes": nodes, "D": D, "page": page, "query": query}
                yield f"D {D}, {nodes} nodes, page {page}", targets, attend, arguments
    for nodes in (1, 16, 64):
        for query, cache in ((BF16, E4M3), (FP16, E5M2), (BF16, INT8)):
            arguments = {"nodes": nodes, "query": query, "cache": cache, "page": 16}
            yield f"{nodes} nodes, {cache}", targets, attend, arguments
    for name, arguments in (
        ("all on", all_on),
        ("all on, dense", all_on | {"page": 0}),
        ("all on, fp32", all_on | {"query": FP32}),
        ("all on, e4m3", all_on | {"cache": E4M3}),
        ("unsplit", {"length": 64}),
        ("1024 nodes, 100 requests", {"nodes": 1024, "batch": 100, "window": 4096}),
        ("1024 requests that share", {"nodes": 2, "batch": 1024, "shared": True}),
        ("MHA", {"group": 1}),
        ("odd group, values of 64", {"group": 7, "DV": 64}),
        ("query in bf16, cache in fp32", {"cache": FP32}),
    ):
        yield name, targets, attend, arguments
    yield "layout", targets, layout, {}
    yield "layout, 1024 nodes", targets, layout, {"nodes": 1024, "prefix": False}
    for name, arguments in (
        ("160 caches, paged", {"layers": 80, "page": 16}),
        ("two sizes", {"sizes": (192, 128)}),
        ("fp8", {"dtype": E4M3, "sizes": (80, 80)}),
        ("strided", {"strided": True}),
    ):
        yield f"compact, {name}", targets, compact, arguments


def main() -> None:
    for name, targets, launches, arguments in configurations("--full" in sys.argv[1:]):
        for target_name in targets:
            target = TARGETS[target_name]
            for kernel, values, options in launches(target_name, **arguments):
                compiled = triton.compile(source(kernel, values), target=target, options=options)
                binary = compiled.asm["hsaco" if target.backend == "hip" else "cubin"]
                row = {"name": f"{name}: {kernel.fn.__name__}", "target": target_name, "bytes": len(binary)}
                print(json.dumps(row | {"shared": compiled.metadata.shared}), flush=True)


if __name__ == "__main__":
    main()
