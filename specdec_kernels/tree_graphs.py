"""Graphs that are no trees, for tree attention: several parents, bidirectional blocks, chains of masks.

`tree_attention` reads bits that say who sees whom, and depths; where they come from is nothing to it. Each function
here makes both for one kind of graph. All is computed on the device of the arguments and nothing is read back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import DEBUG, INT32, check_int, check_tensor, check_values
from .reference.trees import bounded
from .tree_checks import check_cu_nodes, check_tree
from .types import DraftTree, TreeLayout


class TreeGraph(NamedTuple):
    """What `tree_attention(..., graph.tree, prefix_lens, layout=graph.layout)` takes."""

    tree: DraftTree  # the nodes of each request and their bounds; parents give it a tree's form and mean no more
    layout: TreeLayout  # ancestor_bits: whom each node sees, itself among them where it does


class MaskChains(NamedTuple):
    """Candidates of a draft tree, with masked tokens behind each."""

    tree: DraftTree  # [N * (1 + k)] nodes: of each request first the candidates, as they were, then the masks
    layout: TreeLayout
    candidates: Tensor  # [N] int64, row of each node of the tree that was given
    masks: Tensor  # [N, k] int64, rows of the masks behind it, in order


def pack_mask(mask: Tensor) -> Tensor:
    """[N, ceil(M/64)] int64 words of a [N, M] bool mask: bit j % 64 of word j // 64 is column j.

    Raises:
        TypeError, ValueError: a mask of another dtype or number of dimensions.
    """
    check_tensor("mask", mask, {}, "N M", (torch.bool,))
    rows, columns = mask.shape
    words = (columns + 63) // 64
    padded = torch.nn.functional.pad(mask, (0, 64 * words - columns)).view(rows, words, 64)
    return (padded.long() << torch.arange(64, device=mask.device)).sum(2)


def graph_layout(
    edges: Tensor, cu_nodes: Tensor, nodes: int, max_nodes: int, max_depth: int, prefix_lens: Tensor | None = None
) -> TreeGraph:
    """Directed graphs in which a node may have several parents; it sees all that lies on any way to it, and itself.

    A node's depth is the length of the longest way to it. Where a lattice merges drafts that end alike, all ways to a
    node are equally long, and its position is what it is on each of them.

    Args:
        edges: [E, 2] int32, (child, parent) as packed rows; a parent comes before its child in the same request. Pairs
            that do not, such as padding of -1, are passed over.
        cu_nodes: [B+1] int32, cumulative node counts.
        nodes: N, all nodes, known to the host.
        max_nodes: upper bound of the nodes of a request.
        max_depth: upper bound of the depths; longer ways are cut.
        prefix_lens: [B] int32, committed tokens in front of each request's node 0. Default: positions are depths.

    Returns:
        TreeGraph; its tokens are -1, and in its tree each node hangs on the highest of its parents, or on node 0.

    Raises:
        TypeError, ValueError: an argument that does not fit; edges that do not, apart from -1, under SPECDEC_DEBUG=1.
    """
    sizes: dict[str, int] = {}
    check_tensor("edges", edges, sizes, "E 2", INT32)
    check_tensor("cu_nodes", cu_nodes, sizes, "B+1", INT32, edges.device)
    for name, value, low in (("nodes", nodes, 0), ("max_nodes", max_nodes, 1), ("max_depth", max_depth, 0)):
        check_int(name, value, low)
    if sizes["B+1"] < 1:
        raise ValueError("cu_nodes: expected shape [B+1] with B >= 0, got [0]")
    request, local = _places(cu_nodes, nodes)
    child, parent = edges.long().unbind(1)
    known = (parent >= 0) & (parent < child) & (child < nodes)
    child, parent = torch.where(known, child, 0), torch.where(known, parent, 0)
    if nodes:
        known &= request[child] == request[parent]
    if DEBUG:
        check_cu_nodes("cu_nodes", cu_nodes, nodes, max_nodes)
        check_values("edges", known | (edges == -1).all(1), edges[:, 1], "parents before children of the same request")
    if not nodes:
        child, parent, known = child[:0], parent[:0], known[:0]
    # An edge from the first row to itself adds nothing that is not there.
    child, parent = torch.where(known, child, 0), torch.where(known, parent, 0)
    sees = (local[:, None] == torch.arange(max_nodes, device=edges.device)).to(torch.int32)
    depths = torch.zeros_like(local)
    for _ in range(max_depth):
        sees = sees.index_add(0, child, sees[parent]).clamp(max=1)
        depths = depths.scatter_reduce(0, child, torch.where(known, depths[parent] + 1, 0), "amax")
    highest = torch.full_like(local, -1).scatter_reduce(0, child, torch.where(known, local[parent], -1), "amax")
    highest = torch.where(local > 0, highest.clamp(min=0), -1)
    return _graph(sees.bool(), depths, highest, cu_nodes, max_nodes, request, prefix_lens)


def draft_blocks(
    replaces: Tensor, real_blocks: int, block_size: int, prefix_lens: Tensor | None = None, *, causal: bool = False
) -> TreeGraph:
    """Draft blocks of a diffusion model beside its real ones (Spiffy, arXiv 2509.18085).

    Real blocks see each other fully and no draft. A draft block sees itself fully and every real block except the one
    whose later state it is; it stands at that one's positions.

    Args:
        replaces: [B, D] int32, the real block that each draft block is a draft of; -1: none, it sees only itself.
        real_blocks: R, blocks that are being denoised; finished ones are the prefix.
        block_size: S, tokens of a block.
        prefix_lens: [B] int32, tokens in front of the first real block. Default: positions count from it.
        causal: blocks see earlier blocks only, and themselves (semi-autoregressive models).

    Returns:
        TreeGraph of (R + D) * S nodes each request: real blocks, then draft blocks. Its tokens are -1.

    Raises:
        TypeError, ValueError: an argument that does not fit; blocks out of range under SPECDEC_DEBUG=1, without it they
            count as none.
    """
    check_tensor("replaces", replaces, {}, "B D", INT32)
    check_int("real_blocks", real_blocks, 1)
    check_int("block_size", block_size, 1)
    known = (replaces >= 0) & (replaces < real_blocks)
    if DEBUG:
        check_values("replaces", known | (replaces == -1), replaces, f"-1 or blocks 0..{real_blocks - 1}")
    batch, drafts = replaces.shape
    device, blocks = replaces.device, real_blocks + drafts
    real = torch.arange(real_blocks, device=device)
    stands = torch.cat([real.expand(batch, -1), torch.where(known, replaces.long(), -1)], 1)  # which block each is
    own = torch.eye(blocks, dtype=torch.bool, device=device)
    other = real < stands[:, :, None] if causal else (real != stands[:, :, None]) & (stands >= 0)[:, :, None]
    sees = own | torch.nn.functional.pad(other, (0, drafts))
    sees = sees.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2).flatten(0, 1)
    offsets = torch.arange(block_size, device=device)
    depths = (stands.clamp(min=0)[:, :, None] * block_size + offsets).flatten()
    size = blocks * block_size
    cu_nodes = torch.arange(batch + 1, dtype=torch.int32, device=device) * size
    request, local = _places(cu_nodes, batch * size)
    return _graph(sees, depths, local - 1, cu_nodes, size, request, prefix_lens)


def mask_chains(tree: DraftTree, k: int, mask_token: int, prefix_lens: Tensor | None = None) -> MaskChains:
    """Masked tokens behind every candidate, k of them, with which a model drafts for itself (arXiv 2603.17942).

    A mask sees the prefix, the way from the root to its candidate and the masks between; no candidate sees a mask. So
    each candidate's own logits are untouched, and those of its masks predict the tokens that follow it.

    Args:
        tree: the candidates.
        k: masks behind each.
        mask_token: the id that they hold.
        prefix_lens: [B] int32, committed tokens in front of each root. Default: positions are depths.

    Returns:
        MaskChains. The candidates keep their places behind the prefix, so an accepted path is compacted as ever.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    from .trees import tree_layout

    sizes: dict[str, int] = {}
    check_tree(tree, sizes)
    check_tensor("tree.tokens", tree.tokens, sizes, "N", INT32)
    check_int("k", k, 0)
    check_int("mask_token", mask_token, 0)
    nodes = tree.parents.shape[0]
    request, local = _places(tree.cu_nodes, nodes)
    bounds = bounded(tree.cu_nodes, nodes)
    counts, cu_nodes = bounds.diff().long(), bounds * (1 + k)
    counts = counts[request] if nodes else local
    starts = cu_nodes.long()[request]
    steps = torch.arange(k, device=local.device)
    first = counts + local * k  # of a candidate's masks, within the request
    above = torch.where(steps == 0, local[:, None], first[:, None] + steps - 1)
    candidates, masks = starts + local, (starts + first)[:, None] + steps
    # Rows that cu_nodes gives to no request go wherever there is room.
    candidates, masks = (rows.clamp(0, max(nodes * (1 + k) - 1, 0)) for rows in (candidates, masks))
    places = torch.cat([candidates, masks.flatten()])
    tokens = torch.cat([tree.tokens, tree.tokens.new_full((nodes * k,), mask_token)])
    parents = torch.cat([tree.parents, above.flatten().to(torch.int32)])
    tokens, parents = (torch.zeros_like(x).index_copy_(0, places, x) for x in (tokens, parents))
    grown = DraftTree(tokens, parents, cu_nodes, tree.max_nodes * (1 + k), tree.max_depth + k)
    return MaskChains(grown, tree_layout(grown, prefix_lens), candidates, masks)


def _places(cu_nodes: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """(request, place within it) [N] int64 of each packed node; kept in range whatever cu_nodes holds."""
    cu_nodes = bounded(cu_nodes, nodes)
    index = torch.arange(nodes, device=cu_nodes.device)
    request = torch.searchsorted(cu_nodes, index.to(cu_nodes.dtype), right=True) - 1
    request = request.clamp(0, max(cu_nodes.shape[0] - 2, 0))
    return request, index - cu_nodes.long()[request]


def _graph(
    sees: Tensor,
    depths: Tensor,
    parents: Tensor,
    cu_nodes: Tensor,
    max_nodes: int,
    request: Tensor,
    prefix_lens: Tensor | None,
) -> TreeGraph:
    """The graph of a mask [N, max_nodes] and depths [N] int64."""
    positions = depths
    if prefix_lens is not None:
        check_tensor("prefix_lens", prefix_lens, {"B": cu_nodes.shape[0] - 1}, "B", INT32, cu_nodes.device)
        positions = depths + prefix_lens[request]
    tokens = torch.full_like(depths, -1, dtype=torch.int32)
    tree = DraftTree(tokens, parents.to(torch.int32), cu_nodes, max_nodes, max_nodes - 1)
    return TreeGraph(tree, TreeLayout(depths.to(torch.int32), pack_mask(sees), positions.to(torch.int32)))
