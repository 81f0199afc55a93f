"""The head's ops on Triton: arguments of the two kernels, and their launches."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .head_configs import CONFIGS, LOGITS_OF_A_LANE, MOST_CANDIDATES, OVERLAPPING, WIDE_LOGITS_OF_A_LANE, Config
from .head_kernels import merge_kernel, scan_kernel

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.uint8: "int4"}


@functools.lru_cache
def _machine(index: int | None) -> tuple[str, int]:
    """(key of CONFIGS, multiprocessors) of a CUDA device; of the interpreter few, so that programs have many tiles."""
    if index is None:
        return "sm_80", 2
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "gfx942", properties.multi_processor_count
    # A device of no entry takes that of the latest before it: its shared memory is the least that is sure.
    name = max((f for f in (80, 90, 100, 120) if f <= 10 * properties.major + properties.minor), default=80)
    return f"sm_{name}", properties.multi_processor_count


def configuration(machine, processors: int, format: str, size: int, batch: int, count: int, *, own, wide) -> Config:
    """The Config for a call.

    Args:
        machine, processors: see `_machine`.
        format, size: of the weight, and bytes of one element.
        batch, count: B and R.
        own: each request has rows of its own, so that a program sees one.
        wide: keys or sums are fp64.
    """
    table, batch = CONFIGS[machine][0 if format == "int4" else size], max(batch, 1)
    sharing = 1 if own else batch  # requests that look at the same rows
    config = next((config for most, config in table if sharing <= most), table[-1][1])
    if not config.dot:
        config = config._replace(block_b=triton.next_power_of_2(sharing))
    held = (WIDE_LOGITS_OF_A_LANE if wide else LOGITS_OF_A_LANE) * 32 * config.num_warps
    blocks = triton.cdiv(batch, config.block_b)
    rows = min(config.block_r, held // config.block_b)
    while rows > 16 and triton.cdiv(count, rows) * blocks < processors:
        rows //= 2  # else some multiprocessors would have nothing to do
    return config._replace(block_r=rows)


def programs_of(config: Config, processors: int, batch: int, count: int, k: int) -> int:
    """How many programs share the tiles of a block: no more than run at once, and all with as many tiles."""
    tiles = max(triton.cdiv(count, config.block_r), 1)
    slots = processors * config.beside // triton.cdiv(batch, config.block_b)
    most = max(min(slots, tiles, MOST_CANDIDATES // triton.next_power_of_2(k)), 1)
    return triton.cdiv(tiles, triton.cdiv(tiles, most))


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def launches(
    machine, processors, hidden, weight, k, seed, offset, row, rows, row_groups, token_ids, bias, scale, temperature,
    temperatures, return_logits, *, part,
):  # fmt: skip
    """(results, launches) of a call: each launch is (kernel, grid, arguments by name, options).

    The weight and hidden keep their strides; everything small is made dense, which copies nothing where it already is.
    `part` is for the op `head_part`.
    """
    (batch, dim), height = hidden.shape, weight.shape[0]
    count = height if rows is None else rows.shape[-1]
    format = _FORMATS.get(weight.dtype, "dense")
    own = rows is not None and rows.ndim == 2 and row_groups is None
    draws = seed is not None
    config = configuration(
        machine, processors, format, weight.element_size(), batch, count, own=own, wide=draws or part
    )
    programs = programs_of(config, processors, max(batch, 1), count, k)

    def empty(*shape, dtype=torch.float32):
        return hidden.new_empty(shape, dtype=dtype)

    scratch = {
        "keys": empty(batch, programs, k, dtype=torch.float64 if draws else torch.float32),
        "ids": empty(batch, programs, k, dtype=torch.int32),
        "logits": empty(batch, programs, k) if draws else None,
        "sums": empty(batch, programs, 3, dtype=torch.float64 if part else torch.float32),
    }
    all_logits = empty(batch, count if return_logits else 0)
    out = {
        "out_keys": empty(batch, k, dtype=torch.float64) if part else None,
        "out_logits": empty(batch, k),
        "out_tokens": empty(batch, k, dtype=torch.int32),
        "out_lse": None if part else empty(batch),
        "out_entropy": None if part else empty(batch),
        "out_sums": empty(batch, 3, dtype=torch.float64) if part else None,
    }
    overlap = machine in OVERLAPPING
    ties = "plain"
    if rows is not None or token_ids is not None:
        ties = "short" if token_ids is None and height * config.block_r < 2**31 else "long"
    # The interpreter multiplies bf16 as if its bits were whole numbers.
    kind = torch.float32 if INTERPRETED and hidden.dtype == torch.bfloat16 else hidden.dtype
    heat = {"temperatures": _dense(temperatures), "temperature": float(temperature)}
    rows = _dense(rows)
    arguments = {
        **scratch, **heat,
        "hidden": hidden, "weight": weight.view(torch.uint8) if format == "fp8" else weight, "scale": _dense(scale),
        "bias": _dense(bias), "rows": rows, "row_groups": _dense(row_groups), "token_ids": _dense(token_ids),
        "seed": _dense(seed), "offset": _dense(offset), "row": _dense(row),
        "all_logits": all_logits if return_logits else None,
        "B": batch, "D": dim, "V": height, "R": count, "G": 0 if rows is None else rows.shape[0],
        "hidden_stride": hidden.stride(0), "hidden_column_stride": hidden.stride(1),
        "weight_stride": weight.stride(0), "weight_column_stride": weight.stride(1),
        "rows_stride": rows.stride(0) if rows is not None and rows.ndim == 2 else 0,
        "FORMAT": format, "GROUPING": "own" if own else "shared" if row_groups is None else "groups", "TIES": ties,
        "EXACT": part, "K": k, "SLOTS": triton.next_power_of_2(k), "DOT": config.dot, "TYPE": _TYPES[kind],
        # Of fp32 the tensor cores keep all of three products of halves; AMD's multiply fp32 itself.
        "PRECISION": "tf32x3" if kind == torch.float32 and machine != "gfx942" else "ieee",
        "BLOCK_B": config.block_b, "BLOCK_R": config.block_r, "BLOCK_D": config.block_d, "STAGES": config.num_stages,
        "OVERLAP": overlap,
    }  # fmt: skip
    size = triton.next_power_of_2(programs * k)
    merge = {
        **scratch, **heat, **out, "programs": programs, "EXACT": part, "K": k,
        "WIDTH": triton.next_power_of_2(programs), "SIZE": size, "OVERLAP": overlap,
    }  # fmt: skip
    grid = (triton.cdiv(batch, config.block_b), programs)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    merge_options = {"num_warps": min(max(size // 256, 1), 16), "num_stages": 1, "enable_fp_fusion": True}
    if overlap:
        merge_options["launch_pdl"] = True
    results = (*(value for value in out.values() if value is not None), *(() if part else (all_logits,)))
    return results, [(scan_kernel, grid, arguments, options), (merge_kernel, (batch,), merge, merge_options)]


def _run(hidden: Tensor, weight: Tensor, k: int, stream, rest, *, part: bool):
    with torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext():
        machine = _machine(torch.cuda.current_device() if hidden.is_cuda else None)
        results, todo = launches(*machine, hidden, weight, k, *stream, *rest, part=part)
        if hidden.shape[0]:
            for kernel, grid, arguments, options in todo:
                kernel[grid](**arguments, **options)
    return results


def head_topk(hidden: Tensor, weight: Tensor, k: int, *rest):
    """Triton kernels of the op `head_topk`."""
    return _run(hidden, weight, k, (None, None, None), rest, part=False)


def head_sample(hidden: Tensor, weight: Tensor, k: int, seed: Tensor, offset: Tensor, row: Tensor | None, *rest):
    """Triton kernels of the op `head_sample`."""
    return _run(hidden, weight, k, (seed, offset, row), rest, part=False)


def head_part(hidden: Tensor, weight: Tensor, k: int, *rest):
    """Triton kernels of the op `head_part`."""
    return _run(hidden, weight, k, rest[:3], (*rest[3:], False), part=True)
