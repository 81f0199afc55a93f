"""Compile the Triton kernels for GPUs that need not be here: `python tests/triton_aot.py [--full]`.

Prints one JSON object a line: what was compiled, for which target, bytes of binary, bytes of shared memory. Runs in a
process of its own, because a process interprets Triton or compiles it, never both.
"""

from __future__ import annotations

import itertools
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
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
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


def chain(V, dtype, q, *, K=4, masks=False, tensors=False, rng=False, logprobs=False, method="token", column_stride=1):
    """One configuration of verify_chain, on tensors without data."""
    B, N, R = 3, 3 * (K + 1), V // 4

    def empty(*shape, dtype=torch.int32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def logits(columns):
        return empty(N, columns * column_stride, dtype=dtype)[:, ::column_stride]

    draft = None if q == "none" else logits(R if q == "compact" else V)
    vocab = empty(R) if q == "compact" else None
    numbers = empty(B, 4, dtype=torch.float32) if tensors else None
    mask = empty(N, (V + 31) // 32) if masks else None
    seed = empty(B, dtype=torch.int64) if rng else None
    uniforms = (None, None) if rng else (empty(N, dtype=torch.float32), empty(B, dtype=torch.float32))
    _, arguments = verify.chain_arguments(
        empty(N), empty(B + 1), logits(V), draft, vocab, K, method,
        numbers, (1.0, 0.0, 1.0, 0.0), mask, numbers, (1.0, 0.0, 1.0, 0.0), mask, None, None, 0.0, None, 1.0,
        seed, seed, *uniforms, logprobs,
    )  # fmt: skip
    options = verify.launch_options(V, K)
    sizes = {name: options.pop(name) for name in ("WIDTH", "BLOCK")}
    return verify.verify_chain_kernel, arguments | sizes, options


def configurations(full: bool):
    """(name, kernel, arguments, options) of what is compiled."""
    everything = {"masks": True, "tensors": True, "rng": True, "logprobs": True}
    chosen = {
        "verify_chain bf16 compact, all on": chain(128256, torch.bfloat16, "compact", **everything),
        "verify_chain fp32 dense": chain(32000, torch.float32, "dense"),
        "verify_chain fp16 greedy": chain(111, torch.float16, "none", method="greedy", logprobs=True),
    }
    if full:
        dtypes, kinds = (torch.float32, torch.bfloat16, torch.float16), ("none", "dense", "compact")
        for dtype, q, masks, rng in itertools.product(dtypes, kinds, (False, True), (False, True)):
            name = f"verify_chain {dtype} {q} masks={masks} rng={rng}"
            chosen[name] = chain(32000, dtype, q, masks=masks, rng=rng, tensors=masks, logprobs=rng)
        chosen["verify_chain by column"] = chain(111, torch.bfloat16, "compact", column_stride=3, **everything)
        chosen["verify_chain long"] = chain(32000, torch.bfloat16, "dense", K=100, **everything)
    return [(name, *configuration) for name, configuration in chosen.items()]


def main() -> None:
    for name, kernel, arguments, options in configurations("--full" in sys.argv[1:]):
        for target_name, target in TARGETS.items():
            compiled = triton.compile(source(kernel, arguments), target=target, options=options)
            binary = compiled.asm["hsaco" if target.backend == "hip" else "cubin"]
            row = {"name": name, "target": target_name, "bytes": len(binary), "shared": compiled.metadata.shared}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
