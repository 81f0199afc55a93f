"""Upkeep of KV caches after a verification step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, library
from .checks import DEBUG, INT32, check_tensor, check_values
from .reference import kv as reference


def _triton(*args):
    """The kernel imports triton, so it is looked up when it is first called."""
    from .triton.kv import compact_kv_

    compact_kv_(*args)


library.declare(
    "compact_kv_",
    "(Tensor(a!)[] caches, Tensor nodes, Tensor prefix_lens, Tensor? block_table) -> ()",
    reference=reference.compact_kv_,
    fake=lambda caches, nodes, prefix_lens, block_table: None,
    triton=_triton,
)
for _backend in ("cpu", "triton", "cuda"):
    backends.serves("compact_kv_", _backend)


def compact_kv_(
    caches: Sequence[Tensor],
    nodes: Tensor,
    prefix_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Move the accepted path of each tree to where the committed sequence continues, in place.

    Node j of request b stands at slot `prefix_lens[b] + j`. Its accepted path is moved so that slot
    `prefix_lens[b] + nodes[b, j]` ends at slot `prefix_lens[b] + j`; the slots behind the path keep what they held. All
    layers go in one call, and on a GPU in one launch. Bytes are moved, so every dtype is allowed.

    Args:
        caches: keys and values of all layers, [B, Hkv, L, D] with any strides or, with `block_table`,
            [blocks, block_size, Hkv, D]. Heads, lengths, head sizes and dtypes may differ; no two may share memory.
        nodes: [B, P] int32, accepted path of each request as `Verified.nodes` gives it: the root (0), then nodes in
            ascending order, then -1. A row of -1 moves nothing.
        prefix_lens: [B] int32, committed slots before the root.
        block_table: [B, M] int32, physical block of each logical block of a request. Requests may share only blocks
            that end before the root.
        backend: force `reference`, `cpu` or `cuda`.

    Raises:
        TypeError, ValueError: an argument that does not fit; names it, what came and what was expected. Nodes that do
            not ascend and slots outside a cache raise under SPECDEC_DEBUG=1; without it such slots are passed over.
        BackendError: `backend` cannot serve the call.
    """
    if isinstance(caches, Tensor) or not isinstance(caches, Sequence):
        raise TypeError(f"caches: expected a sequence of tensors, got {type(caches).__name__}")
    sizes: dict[str, int] = {}
    device = nodes.device if isinstance(nodes, Tensor) else None
    check_tensor("nodes", nodes, sizes, "B P", INT32)
    check_tensor("prefix_lens", prefix_lens, sizes, "B", INT32, device)
    if block_table is not None:
        check_tensor("block_table", block_table, sizes, "B M", INT32, device)
    batch, paged = sizes["B"], block_table is not None
    shape = "blocks block_size Hkv D" if paged else "B Hkv L D"
    for i, cache in enumerate(caches):
        # A model has a hundred of them, so one that fits is passed over at once.
        fits = isinstance(cache, Tensor) and cache.ndim == 4 and cache.device == device
        if fits and (paged or cache.shape[0] == batch):
            continue
        dtype = (cache.dtype,) if isinstance(cache, Tensor) else ()
        check_tensor(f"caches[{i}]", cache, {"B": batch}, shape, dtype, device)
    if DEBUG:
        _debug_checks(caches, nodes, prefix_lens, block_table)
    if not caches:
        return
    op = library.overload("compact_kv_", backends.select("compact_kv_", nodes.device.type, backend))
    op(list(caches), nodes, prefix_lens, block_table)


def _debug_checks(caches: Sequence[Tensor], nodes: Tensor, prefix_lens: Tensor, block_table: Tensor | None) -> None:
    """Checks that read device memory (SPECDEC_DEBUG=1)."""
    on_path = (nodes < 0).cumsum(1) == 0
    check_values("nodes", on_path | (nodes == -1), nodes, "-1 behind the end of each path")
    check_values("nodes", ~on_path[:, :1] | (nodes[:, :1] == 0), nodes[:, :1], "the root, 0, first")
    ascends = ~on_path[:, 1:] | (nodes[:, 1:] > nodes[:, :-1])
    check_values("nodes", ascends, nodes[:, 1:], "nodes in ascending order")
    check_values("prefix_lens", prefix_lens >= 0, prefix_lens, ">= 0")
    slots = torch.where(on_path, prefix_lens[:, None].long() + nodes, 0)
    for i, cache in enumerate(caches):
        size = cache.shape[2] if block_table is None else cache.shape[1] * block_table.shape[1]
        check_values("prefix_lens + nodes", ~on_path | (slots < size), slots, f"slots in 0..{size - 1} of caches[{i}]")
        if block_table is not None:
            logical = slots.div(cache.shape[1], rounding_mode="floor")
            blocks = block_table.gather(1, logical)
            inside = (blocks >= 0) & (blocks < cache.shape[0])
            check_values("block_table", ~on_path | inside, blocks, f"blocks in 0..{cache.shape[0] - 1} of caches[{i}]")
