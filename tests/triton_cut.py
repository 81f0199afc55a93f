"""A kernel that writes what the filters keep of each row; `python tests/triton_cut.py [--full]` compiles it for GPUs.

Compiling needs a process of its own, as in triton_aot.py, and prints the same lines.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl

from specdec_kernels.triton import verify
from specdec_kernels.triton.cut import cut
from specdec_kernels.triton.rows import Rows, lse, row_at


@triton.jit
def cut_kernel(
    logits,  # [N, C]
    vocab,  # [C] int32 ascending, or None: column = token
    other,  # [N, C] logits mixed in, or None
    allowed,  # [N, W] int32, or None
    params,  # [N, 4] fp32
    out,  # [N] fp32 smallest logit kept
    masses,  # [N] fp32 what `cut` says of the mass
    C,
    V,
    mix,
    stride,
    column_stride,
    words_stride,
    word_stride,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    numbers = params + 4 * i
    rows = Rows(
        data=logits, stride=stride, column_stride=column_stride, size=C, words=allowed, words_stride=words_stride,
        word_stride=word_stride, vocab=vocab, other=other, other_stride=stride, other_column_stride=column_stride,
        mix=mix, temperature=tl.load(numbers), top_k=tl.load(numbers + 1), top_p=tl.load(numbers + 2),
        min_p=tl.load(numbers + 3),
    )  # fmt: skip
    row = row_at(rows, i, -float("inf"))
    found = lse(row, V, None, BLOCK)
    at, mass = cut(row, found, rows.temperature, rows.top_k, rows.top_p, rows.min_p, V, BLOCK)
    tl.store(out + i, at)
    tl.store(masses + i, mass)


def cut_arguments(logits, params, *, vocab=None, other=None, mix=0.0, allowed=None, vocabulary=None, block=None):
    """(the kernel's outputs, its arguments, its launch options) for [N, C] logits and [N, 4] params."""
    outputs = (logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32))
    vocabulary = vocabulary or logits.shape[1]
    options = {
        name: value for name, value in verify.launch_options(vocabulary, 1, 1).items() if name not in ("NODES", "WIDTH")
    }
    if block is not None:
        options["BLOCK"] = block
    words_stride, word_stride = (0, 1) if allowed is None else allowed.stride()
    arguments = {
        "logits": logits,
        "vocab": vocab,
        "other": other,
        "allowed": allowed,
        "params": params,
        "out": outputs[0],
        "masses": outputs[1],
        "C": logits.shape[1],
        "V": vocabulary,
        "mix": mix,
        "stride": logits.stride(0),
        "column_stride": logits.stride(1),
        "words_stride": words_stride,
        "word_stride": word_stride,
        "BLOCK": options.pop("BLOCK"),
    }
    return outputs, arguments, options


def cuts(logits, params, **options):
    """([N] fp32 cuts, [N] fp32 masses) of [N, C] logits."""
    outputs, arguments, launch = cut_arguments(logits, params, **options)
    cut_kernel[(len(logits),)](**arguments, **launch)
    return outputs


def main() -> None:
    from triton_aot import TARGETS, source

    def empty(*shape, dtype=torch.int32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    N, C = 8, 32000
    params = empty(N, 4, dtype=torch.float32)
    compact = {"vocab": empty(C), "allowed": empty(N, 4008), "vocabulary": 128256}
    cases = {
        "bf16 compact": (torch.bfloat16, compact),
        "fp32": (torch.float32, {}),
        "fp16 mixed": (torch.float16, {"other": empty(N, C, dtype=torch.float16), "mix": 0.3}),
    }
    for name, (dtype, extras) in list(cases.items())[: None if "--full" in sys.argv[1:] else 1]:
        _, arguments, options = cut_arguments(empty(N, C, dtype=dtype), params, **extras)
        for target_name, target in TARGETS.items():
            compiled = triton.compile(source(cut_kernel, arguments), target=target, options=options)
            binary = compiled.asm["hsaco" if target.backend == "hip" else "cubin"]
            row = {"name": name, "target": target_name, "bytes": len(binary), "shared": compiled.metadata.shared}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
