"""Attention of a tree of draft nodes against a long KV cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends, library
from .checks import DEBUG, INT32, INT64, REFERENCE_FLOATS, check_int, check_tensor, check_values
from .reference import attention as reference
from .tree_checks import check_tree
from .trees import tree_layout
from .types import DraftTree, SharedPrefix, TreeLayout

_SCHEMA = (
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor depths, Tensor bits, Tensor cu_nodes, int max_nodes, "
    "Tensor prefix_lens, Tensor? block_table, Tensor? shared_groups, Tensor? shared_lens, float scale, int window, "
    "float softcap, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, bool return_lse) -> (Tensor out, Tensor lse)"
)
# Eight-bit caches need k_scale and v_scale to mean anything, but 1 is a scale too.
_CACHE_DTYPES = (*REFERENCE_FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def _fake(query, key_cache, value_cache, *rest):
    nodes, heads, _ = query.shape
    exact = torch.float64 if query.dtype is torch.float64 else torch.float32
    return (
        query.new_empty((nodes, heads, value_cache.shape[-1])),
        query.new_empty((nodes, heads if rest[-1] else 0), dtype=exact),
    )


def _cpu_limit(dtype, cache_dtype, **facts) -> str | None:
    return "does not serve float64" if torch.float64 in (dtype, cache_dtype) else None


def _triton_limit(dtype, cache_dtype, sizes, **facts) -> str | None:
    if max(sizes) > 512:
        return f"serves head sizes up to 512, got {max(sizes)}"
    return "does not serve float64" if torch.float64 in (dtype, cache_dtype) else None


def _triton(*args):
    """The kernels import triton, so they are looked up when they are first called."""
    from .triton.attention import tree_attention

    return tree_attention(*args)


library.declare("tree_attention", _SCHEMA, reference=reference.tree_attention, fake=_fake, triton=_triton)
backends.serves("tree_attention", "reference")
backends.serves("tree_attention", "cpu", _cpu_limit)
backends.serves("tree_attention", "triton", _triton_limit)


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tree: DraftTree,
    prefix_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    mask_bits: Tensor | None = None,
    layout: TreeLayout | None = None,
    shared: SharedPrefix | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each draft node attends to the committed prefix, to its ancestors and to itself.

    The keys and values of the tree already stand in the cache: node j of request b at slot `prefix_lens[b] + j`.
    Slots that no node of a request sees never change its result, whatever they hold. Query head h reads KV head
    `h // (Hq / Hkv)`. Sums are kept in fp32 (fp64 where the query is fp64).

    Args:
        query: [N, Hq, D] fp32, bf16, fp16 or fp64, one row for each node.
        key_cache: [B, Hkv, L, D] with any strides or, with `block_table`, [blocks, block_size, Hkv, D]; a float dtype,
            fp8 (e4m3fn, e5m2) or int8.
        value_cache: as key_cache, the last dimension Dv may differ from D.
        tree: the packed trees; parents [N], cu_nodes [B+1] and max_nodes are read.
        prefix_lens: [B] int32, committed slots of each request; 0 is allowed.
        block_table: [B, M] int32, physical block of each logical block of a request; entries behind its last slot are
            not read.
        mask_bits: [N, ceil(max_nodes/64)] int64, replaces the ancestor bits: bit j of row i's words says whether node
            i sees node j of its tree (several parents, bidirectional blocks). All of the prefix stays visible.
        layout: what `trees.tree_layout(tree)` returns, so that a forward makes it once for all its layers. Its depths
            may be other than the tree's (a block of masked tokens stands at the positions of the one it replaces).
            Default: made from `tree`.
        shared: requests that continue one prefix, whose slots are then read once; see `SharedPrefix`.
        scale: factor on q.k (default 1/sqrt(D)).
        window: a key is seen only if the query's position is less than `window` ahead of its own. Positions, not
            slots: `prefix_len + depth` for a node, s for prefix slot s. None: no window.
        softcap: scores become `softcap * tanh(score / softcap)` before the mask (Gemma 2). None or 0: off.
        sinks: [Hq] float, one more logit in each head's softmax denominator (GPT-OSS).
        k_scale: number or [Hkv] float tensor; what key_cache holds times this is the key.
        v_scale: the same for values.
        return_lse: also return the logarithm of each softmax denominator, sinks included.
        backend: force `reference`, `cpu`, `triton` or `cuda`.

    Returns:
        [N, Hq, Dv] in the query's dtype; with `return_lse` also [N, Hq] fp32 (fp64 where the query is fp64). A row
        that sees no key (mask_bits may do that) is 0, its lse -inf or the sink.

    Raises:
        TypeError, ValueError: an argument that does not fit; names it, what came and what was expected. Checks of
            values (parents, cu_nodes, prefix_lens, block_table, shared) run under SPECDEC_DEBUG=1.
        BackendError: `backend` cannot serve the call.
    """
    sizes = _fit(query, key_cache, value_cache, tree, prefix_lens, block_table, mask_bits, layout, shared, sinks)
    if window is not None:
        check_int("window", window, 1)
    scale = _number("scale", 1.0 / math.sqrt(sizes["D"]) if scale is None else scale)
    softcap = 0.0 if softcap is None else _number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap: expected a number >= 0 or None, got {softcap}")
    k_scale = _head_scale("k_scale", k_scale, sizes, query)
    v_scale = _head_scale("v_scale", v_scale, sizes, query)
    if DEBUG:
        _debug_checks(tree, prefix_lens, block_table, shared, sizes)
    if layout is None:
        layout = tree_layout(tree)
    bits = layout.ancestor_bits if mask_bits is None else mask_bits
    facts = {"dtype": query.dtype, "cache_dtype": key_cache.dtype, "sizes": (sizes["D"], sizes["Dv"])}
    op = library.overload("tree_attention", backends.select("tree_attention", query.device.type, backend, **facts))
    out, lse = op(
        query, key_cache, value_cache, layout.depths, bits, tree.cu_nodes, tree.max_nodes, prefix_lens, block_table,
        *(shared or (None, None)), scale, window or 0, softcap, sinks, k_scale, v_scale, return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


# Sizes of arguments that fitted, by what was looked at. The layers of a model bring the same shapes over and over, and
# to look at a dozen tensors one by one takes longer than a short attention.
_FITTING: dict[tuple, dict[str, int]] = {}
_MOST_FITTING = 4096


def _fit(*arguments) -> dict[str, int]:
    if DEBUG or torch.compiler.is_compiling():
        return _check(*arguments)
    try:
        key = _looks(*arguments)
        sizes = _FITTING.get(key)
    except (AttributeError, TypeError):  # something that is no tensor, or sizes that are symbols
        return _check(*arguments)
    if sizes is None:
        sizes = _check(*arguments)
        if len(_FITTING) >= _MOST_FITTING:
            _FITTING.clear()
        _FITTING[key] = sizes
    return sizes


def _looks(query, key_cache, value_cache, tree, prefix_lens, block_table, mask_bits, layout, shared, sinks) -> tuple:
    """All that `_check` looks at."""
    tensors = [query, key_cache, value_cache, tree.parents, tree.cu_nodes, prefix_lens, block_table, mask_bits, sinks]
    if layout is not None:
        tensors += layout.depths, layout.ancestor_bits
    if shared is not None:
        tensors += None, shared.groups, shared.lens
    bounds = tree.max_nodes, tree.max_depth
    # Types too: a bool equals an int, and other things than tensors have shapes.
    types = map(type, (tree, layout, shared, *bounds, *tensors))
    return (*[t if t is None else (t.shape, t.dtype, t.device) for t in tensors], *bounds, *types)


def _check(
    query, key_cache, value_cache, tree, prefix_lens, block_table, mask_bits, layout, shared, sinks
) -> dict[str, int]:
    """The sizes of tensors that fit each other."""
    sizes: dict[str, int] = {}
    check_tensor("query", query, sizes, "N Hq D", REFERENCE_FLOATS)
    device = query.device
    paged = block_table is not None
    names = "blocks block_size Hkv {}" if paged else "B Hkv L {}"
    check_tree(tree, sizes, device)
    check_tensor("prefix_lens", prefix_lens, sizes, "B", INT32, device)
    check_tensor("key_cache", key_cache, sizes, names.format("D"), _CACHE_DTYPES, device)
    check_tensor("value_cache", value_cache, sizes, names.format("Dv"), _CACHE_DTYPES, device)
    if value_cache.dtype != key_cache.dtype:
        raise TypeError(f"value_cache: expected the dtype of key_cache, {key_cache.dtype}, got {value_cache.dtype}")
    if sizes["Hkv"] < 1 or sizes["Hq"] < 1 or sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(f"query: expected Hq to be a multiple of Hkv={sizes['Hkv']}, got Hq={sizes['Hq']}")
    if sizes["D"] < 1:
        raise ValueError(f"query: expected D >= 1, got {list(query.shape)}")
    if paged:
        check_tensor("block_table", block_table, sizes, "B M", INT32, device)
        if sizes["block_size"] < 1:
            raise ValueError(f"key_cache: expected block_size >= 1, got {list(key_cache.shape)}")
    sizes["W"] = (tree.max_nodes + 63) // 64
    if mask_bits is not None:
        check_tensor("mask_bits", mask_bits, sizes, "N W", INT64, device)
    if layout is not None:
        if not isinstance(layout, TreeLayout):
            raise TypeError(f"layout: expected a TreeLayout, got {type(layout).__name__}")
        check_tensor("layout.depths", layout.depths, sizes, "N", INT32, device)
        check_tensor("layout.ancestor_bits", layout.ancestor_bits, sizes, "N W", INT64, device)
    if shared is not None:
        if not isinstance(shared, SharedPrefix):
            raise TypeError(f"shared: expected a SharedPrefix, got {type(shared).__name__}")
        check_tensor("shared.groups", shared.groups, sizes, "B", INT32, device)
        check_tensor("shared.lens", shared.lens, sizes, "B", INT32, device)
    if sinks is not None:
        check_tensor("sinks", sinks, sizes, "Hq", REFERENCE_FLOATS, device)
    return sizes


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def _head_scale(name: str, value, sizes: dict[str, int], query: Tensor) -> Tensor | None:
    """[Hkv] fp32 of a number or a tensor; filled on the device, so that nothing synchronises."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        check_tensor(name, value, sizes, "Hkv", REFERENCE_FLOATS, query.device)
        return value
    return torch.full((sizes["Hkv"],), _number(name, value), dtype=torch.float32, device=query.device)


def _debug_checks(
    tree: DraftTree,
    prefix_lens: Tensor,
    block_table: Tensor | None,
    shared: SharedPrefix | None,
    sizes: dict[str, int],
) -> None:
    """Checks that read device memory (SPECDEC_DEBUG=1)."""
    if shared is not None:
        there = (shared.groups >= 0) & (shared.groups < sizes["B"])
        check_values("shared.groups", there, shared.groups, f"requests 0..{sizes['B'] - 1}")
        within = (shared.lens >= 0) & (shared.lens <= prefix_lens)
        check_values("shared.lens", within, shared.lens, "0..prefix_lens")
    ends = prefix_lens.long() + tree.cu_nodes.diff()
    room = sizes["L"] if block_table is None else sizes["M"] * sizes["block_size"]
    check_values(
        "prefix_lens", (prefix_lens >= 0) & (ends <= room), prefix_lens, f"prefix and tree within {room} slots"
    )
    if block_table is not None:
        blocks = torch.arange(sizes["M"], device=prefix_lens.device) * sizes["block_size"]
        there = (block_table >= 0) & (block_table < sizes["blocks"])
        first = torch.zeros_like(ends)
        if shared is not None:
            owners = shared.groups.long()
            apart = owners != torch.arange(sizes["B"], device=owners.device)
            first = torch.where(apart, shared.lens, 0)  # before it, the owner's blocks are read
            lent = there[owners] | (blocks >= torch.where(apart, shared.lens, 0)[:, None])
            check_values("block_table", lent, block_table[owners], f"blocks in 0..{sizes['blocks'] - 1} of the owner")
        unread = (blocks >= ends[:, None]) | (blocks + sizes["block_size"] <= first[:, None])
        check_values("block_table", there | unread, block_table, f"blocks in 0..{sizes['blocks'] - 1}")
