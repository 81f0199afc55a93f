"""Tree attention on Triton: from the op's arguments to one launch, or two where splits have to be merged."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backends
from .attention_attend import attend_kernel
from .attention_configs import choose
from .attention_merge import merge_kernel
from .attention_plan import FIELDS
from .attention_shared import sharing_kernel

_COMPUTE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
# Fewer blocks than these are not worth a split of their own.
LEAST_BLOCKS = 4
# Merged rows at a time: many programs, each with few rows in registers.
MERGED_ROWS = 16
# Items are equally long, so where there are few of them each gets a program of its own and the GPU's scheduler places
# them: a persistent launch would gain nothing. Where there are more than this many for every place on the GPU, programs
# take several in turn: what a program does before its first item (reading lengths, planning) would add up otherwise.
MOST_WAVES = 16
# What stands in for a GPU under the interpreter, where programs run one after the other: all of them persistent.
INTERPRETED_SMS = 2


@functools.lru_cache
def _device(index: int | None) -> tuple[str, int]:
    """(architecture, SMs) of a GPU; None: the interpreter."""
    if index is None:
        return "interpreter", INTERPRETED_SMS
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def compute_dtype(query: torch.dtype, cache: torch.dtype) -> torch.dtype:
    """The dtype that is multiplied: the cache's where it is the query's or eight bits wide, else fp32."""
    if backends.INTERPRETED and torch.bfloat16 in (query, cache):
        return torch.float32  # the interpreter multiplies bf16 wrongly
    return query if cache.itemsize == 1 or cache == query else torch.float32


def cache_format(dtype: torch.dtype, arch: str) -> str:
    """How the kernel reads a cache; fp8 comes as bytes, which the GPU converts ("native ...") where it can."""
    if dtype not in _FP8:
        return "plain"
    native = arch.startswith("sm_") and (dtype is torch.float8_e5m2 or int(arch.removeprefix("sm_")) >= 89)
    return f"native {_FP8[dtype]}" if native else _FP8[dtype]


class Launch:
    """One call: outputs, workspace, and for each kernel its arguments by name, its options and its grid."""

    def __init__(
        self, query, key_cache, value_cache, depths, bits, cu_nodes, max_nodes, prefix_lens, block_table, shared_groups,
        shared_lens, scale, window, softcap, sinks, k_scale, v_scale, return_lse, *, arch, sms,
    ):  # fmt: skip
        N, q_heads, D = query.shape
        B, DV = cu_nodes.shape[0] - 1, value_cache.shape[-1]
        paged = block_table is not None
        head_axis, slot_axis = (2, 1) if paged else (1, 2)
        heads, page = key_cache.shape[head_axis], key_cache.shape[slot_axis]
        room = page * block_table.shape[1] if paged else page
        room = min(room, 2**31 - 1) if key_cache.shape[0] else 0
        group = q_heads // heads
        compute = compute_dtype(query.dtype, key_cache.dtype)
        form = cache_format(key_cache.dtype, arch)
        if form != "plain":
            key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
        wide, wide_v = (max(triton.next_power_of_2(size), 16) for size in (D, DV))
        rows = min(max_nodes, N) * group
        config = choose(arch, max(wide, wide_v), compute.itemsize, rows, paged)
        shared = shared_groups is not None
        self.out = query.new_empty((N, q_heads, DV))
        self.lse = query.new_empty((N, q_heads if return_lse else 0), dtype=torch.float32)

        # Bounds of what the plan comes to on the device.
        programs = sms * config.per_sm
        most = programs * (1 if arch == "interpreter" else MOST_WAVES)
        tiles = N * group // config.rows + B
        units = heads * tiles
        splits = room > LEAST_BLOCKS * config.slots
        capacity = 0
        if shared:
            units *= 2
            capacity = units + programs
        elif splits:
            capacity = programs + 1
        common = {
            "cu_nodes": cu_nodes.contiguous(),
            "prefix_lens": prefix_lens.contiguous(),
            "N": N,
            "B": B,
            "max_nodes": min(max_nodes, 2**31 - 1),
            "room": room,
            "window": window or None,
        }
        depths = depths.contiguous() if window else None
        self.sharing = None
        shares = order = reach = None
        if shared:
            shares = cu_nodes.new_empty((FIELDS, B))
            order = cu_nodes.new_empty((N,))
            reach = torch.empty_like(order) if window else None
            own = {"shared_groups": shared_groups.contiguous(), "shared_lens": shared_lens.contiguous()}
            own |= {"shares": shares, "order": order, "depths": depths, "reach": reach}
            sizes = {"WIDTH": triton.next_power_of_2(max(B, 2)), "BLOCK": 128}
            self.sharing = (common | own | sizes, {"num_warps": 4}, B)
        partial = query.new_empty((capacity, config.rows, DV), dtype=torch.float32) if capacity else None
        sums = query.new_empty((capacity, 2, config.rows), dtype=torch.float32) if capacity else None
        common |= {
            "shares": shares,
            "sinks": None if sinks is None else sinks.contiguous(),
            "v_scale": None if v_scale is None else v_scale.contiguous(),
            "out": self.out,
            "lse": self.lse if return_lse else None,
            "partial": partial,
            "partial_sums": sums,
            "heads": heads,
            "DV": DV,
            "programs": programs if splits else None,
            "least": LEAST_BLOCKS,
            "capacity": capacity,
            "GROUP": group,
            # Batches of up to 32 entries share one kernel.
            "WIDTH": max(triton.next_power_of_2(B * (1 + shared)), 32),
            "ROWS": config.rows,
            "SLOTS": config.slots,
            "WIDE_V": wide_v,
        }
        self.attend = (
            common
            | {
                "query": query,
                "key_cache": key_cache,
                "value_cache": value_cache,
                "depths": depths,
                "bits": bits.contiguous().view(torch.int32),
                "block_table": block_table,
                "order": order,
                "reach": reach,
                "k_scale": None if k_scale is None else k_scale.contiguous(),
                "scale": float(scale),
                "softcap": float(softcap) or None,
                "D": D,
                "words": 2 * bits.shape[1],
                "blocks": key_cache.shape[0],
                "query_row": query.stride(0),
                "query_head": query.stride(1),
                "query_column": query.stride(2),
                "table_row": block_table.stride(0) if paged else 0,
                "table_column": block_table.stride(1) if paged else 0,
                "PAGE": page if paged else 0,
                "FORMAT": form,
                "COMPUTE": _COMPUTE[compute],
                "PRECISION": "ieee",
                "WIDE": wide,
            }
            | {
                f"{name}_{axis}": cache.stride(index)
                for name, cache in (("key", key_cache), ("value", value_cache))
                for axis, index in (("outer", 0), ("head", head_axis), ("slot", slot_axis), ("column", 3))
            },
            {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
            min(units + (programs if splits else 0) + 1, most),
        )
        self.merge = None
        if capacity:
            merged = min(MERGED_ROWS, config.rows)
            grid = min(heads * tiles * (config.rows // merged), 4 * most)
            self.merge = (common | {"MERGED": merged}, {"num_warps": 4}, grid)

    def kernels(self) -> list:
        """(kernel, (arguments, options, grid)) of what there is to launch, in order."""
        launches = ((sharing_kernel, self.sharing), (attend_kernel, self.attend), (merge_kernel, self.merge))
        return [(kernel, launch) for kernel, launch in launches if launch is not None]

    def run(self) -> None:
        """Launch it all."""
        for kernel, (arguments, options, grid) in self.kernels():
            kernel[(grid,)](**arguments, **options)


def tree_attention(query: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """Triton kernels of the op `tree_attention`."""
    arch, sms = _device(query.device.index if query.is_cuda else None)
    launch = Launch(query, *rest, arch=arch, sms=sms)
    if launch.out.numel() or launch.lse.numel():
        with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
            launch.run()
    return launch.out, launch.lse
