"""Compile the Triton kernels for GPUs that need not be here: `python tests/triton_aot.py [--full]`.

Prints one JSON object a line: what was compiled, for which target, bytes of binary, bytes of shared memory. Runs in a
process of its own, because a process interprets Triton or compiles it, never both.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specdec_kernels.triton import verify

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def source(kernel, arguments: dict) -> ASTSource:
    """What a launch with `arguments` compiles: the same types and the same specialisation of values."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def walk(
    method, V=111, dtype=torch.float32, q="dense", *, nodes=5, K=4, masks=False, filters=False, rng=False,
    logprobs=False, counts=False, lossy=False, column_stride=1,
):  # fmt: skip
    """One configuration of the verification kernel, on tensors without data; `chain `-methods are verify_chain's."""
    chain, name = method.startswith("chain "), method.removeprefix("chain ")
    B, N, R = 3, 3 * nodes, max(V // 4, 1)

    def empty(*shape, dtype=torch.int32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def logits(columns):
        return empty(N, columns * column_stride, dtype=dtype)[:, ::column_stride]

    draft = None if q == "none" else logits(R if q == "compact" else V)
    vocab = empty(R) if q == "compact" else None
    numbers = empty(B, 4, dtype=torch.float32) if filters else None
    mask = empty(N, (V + 31) // 32) if masks else None
    hooks = (None, None, 0.0, empty(K, dtype=torch.float32) if name == "synthetic" else None, 1.0)
    if lossy:
        hooks = (empty(N, dtype=torch.bool), logits(V), 0.3, None, 0.9)
    seed = empty(B, dtype=torch.int64) if rng else None
    uniforms = (None, None) if rng else (empty(N, dtype=torch.float32), empty(B, dtype=torch.float32))
    off = (1.0, 0.0, 1.0, 0.0)
    sampling = (numbers, off, mask, numbers, off, mask, *hooks, seed, seed, *uniforms, logprobs)
    name = "greedy" if name == "synthetic" else name
    if chain:
        _, arguments = verify.chain_arguments(empty(N), empty(B + 1), logits(V), draft, vocab, K, name, *sampling)
    else:
        _, arguments = verify.tree_arguments(
            empty(N), empty(N), empty(B + 1), empty(N) if counts else None, logits(V), draft, vocab, nodes, K, name,
            *sampling,
        )  # fmt: skip
    options = verify.launch_options(V, 1 if chain else nodes, K)
    sizes = {name: options.pop(name) for name in ("NODES", "WIDTH", "BLOCK")}
    return verify.verify_kernel, arguments | sizes, options


METHODS = [
    *(f"chain {method}" for method in ("token", "block", "greedy", "typical")),
    "greedy", "target_only", "multi_round", "without_replacement", "k_seq", "greedy_multi", "typical", "traversal",
    "traversal_iid", "synthetic",
]  # fmt: skip
COUNTED = ("multi_round", "k_seq")
FILTERED = ("chain token", "k_seq", "traversal")  # the code of the filters is large, and the same for all
JUDGED = ("chain token", "greedy", "target_only", "multi_round", "without_replacement", "k_seq", "typical")


def configurations(full: bool):
    """(name, targets, (kernel, arguments, options)) of what is compiled."""
    most = {"masks": True, "rng": True, "logprobs": True}
    tree = {"nodes": 64, "K": 8, **most}
    large = walk("chain token", 128256, torch.bfloat16, "compact", **most)
    yield "chain token, bf16 compact", list(TARGETS), large
    if not full:  # every method, on one target after another
        for i, method in enumerate(METHODS):
            q = "compact" if i % 2 else "dense"
            yield method, [list(TARGETS)[i % len(TARGETS)]], walk(method, q=q, logprobs=True)
        everything = walk("multi_round", 111, torch.bfloat16, "compact", filters=True, lossy=True, counts=True, **tree)
        yield "everything on", ["sm_90"], everything
        return
    for method in METHODS:
        extras = {"counts": method in COUNTED, "lossy": method in JUDGED, "filters": method in FILTERED}
        yield f"{method}, bf16 compact, all on", list(TARGETS), walk(
            method, 128256, torch.bfloat16, "compact", **tree, **extras
        )  # fmt: skip
        for q in ("dense",) if method in ("k_seq", "greedy_multi") else ("dense", "none"):
            yield f"{method}, fp32 {q}", list(TARGETS), walk(method, 32000, q=q)
    everything = {"column_stride": 3, **most}
    yield "by column", list(TARGETS), walk("chain token", 111, torch.bfloat16, "compact", **everything)
    yield "long chains", list(TARGETS), walk("chain block", 32000, torch.bfloat16, "dense", K=128, **most)
    yield "wide trees", list(TARGETS), walk("traversal", 32000, torch.bfloat16, "dense", nodes=1024, K=64, **most)


def main() -> None:
    for name, targets, (kernel, arguments, options) in configurations("--full" in sys.argv[1:]):
        for target_name in targets:
            target = TARGETS[target_name]
            compiled = triton.compile(source(kernel, arguments), target=target, options=options)
            binary = compiled.asm["hsaco" if target.backend == "hip" else "cubin"]
            row = {"name": name, "target": target_name, "bytes": len(binary), "shared": compiled.metadata.shared}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
