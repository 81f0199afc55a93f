"""Dynamic shortlists: clusters of a head's rows, and a router that picks some of them for each tree.

DynaSpec (arXiv 2510.13847) routes a context to a few clusters of tokens and drafts over their union. Here the rows of
the union are an argument of the head ops, so no weight is copied, and the nodes of a tree share one list, read once:

    clusters = cluster_rows(weight, 512, always=special_ids)  # once for each head
    shortlist = route(hidden, clusters, 8, row_groups=trees, groups=B, budget=24)
    lists = {"rows": shortlist.rows, "row_groups": shortlist.row_groups}
    step = head_sample(hidden, weight, k, rng=rng, return_logits=True, **lists)
    draft_logits, draft_vocab = compact_logits(step.all_logits, shortlist, V)  # q for verify_*
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import DEBUG, INT32, REFERENCE_FLOATS, check_int, check_tensor, check_values
from .low_rank import product

# Rows of a weight that are upcast at a time.
_SLICE = 8192


class RowClusters(NamedTuple):
    """A partition of a head's rows; see `cluster_rows`."""

    rows: Tensor  # [C, S] int32, the rows of each cluster, ascending, -1 behind the last
    centroids: Tensor  # [C, D], mean row of each cluster
    spreads: Tensor  # [C] fp32, mean squared distance of a cluster's rows from its centroid, over D
    always: Tensor  # [A] int32, rows of every shortlist, ascending; in no cluster


class Shortlist(NamedTuple):
    """Rows for the head ops: `rows` and `row_groups` are their arguments of these names."""

    rows: Tensor  # [G, R] int32, each row at most once in a list, -1 pads
    row_groups: Tensor | None  # [N] int32, list of each hidden vector; None: vector i has list i
    shared: int  # the first so many rows are the same in every list


@torch.no_grad()
def cluster_rows(
    weight: Tensor, clusters: int, *, always: Tensor | None = None, iterations: int = 10, seed: int = 0
) -> RowClusters:
    """Group the rows of a head by direction into clusters of at most ceil((V - A) / C) rows: balanced k-means.

    A cluster's size is a cost here, so every cluster has room for its share alone: round by round, rows go to the
    nearest cluster (by cosine) with room, and where more come than there is room for, the nearest stay. For once, not
    for a step: V C D multiplications an iteration.

    Args:
        weight: [V, D] fp32, bf16, fp16 or fp64.
        clusters: C, 1..V - A.
        always: [A] integer ids, each once, that every shortlist holds (special tokens, end of text, the most
            frequent); they are in no cluster, so that no list holds a row twice.
        iterations: at most; it ends early once nothing changes.
        seed: of the rows that clusters start from. Equal arguments, equal clusters, up to the rounding of products.

    Returns:
        RowClusters on weight's device.

    Raises:
        TypeError, ValueError: an argument that does not fit, NaN or infinity in the weight.
    """
    sizes: dict[str, int] = {}
    check_tensor("weight", weight, sizes, "V D", REFERENCE_FLOATS)
    check_int("iterations", iterations, 1)
    height, device = sizes["V"], weight.device
    for start in range(0, height, _SLICE):
        finite = weight[start : start + _SLICE].isfinite().all(1)
        check_values("weight", finite, torch.arange(start, start + len(finite)), "finite rows; this row is not one")
    pooled = torch.ones(height, dtype=torch.bool, device=device)
    if always is None:
        always = torch.empty(0, dtype=torch.int32, device=device)
    check_tensor("always", always, sizes, "A", (torch.int32, torch.int64), device)
    always = always.long().sort().values
    check_values("always", (always >= 0) & (always < height), always, f"ids in 0..{height - 1}")
    check_values("always", always[1:] > always[:-1], always[1:], "each id once")
    pooled[always] = False
    pool = pooled.nonzero()[:, 0]
    check_int("clusters", clusters, 1, max(len(pool), 1))
    if not len(pool):
        raise ValueError(f"always: expected fewer than all {height} rows, got {len(always)}")
    room = -(-len(pool) // clusters)
    starts = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:clusters]
    centres = _unit(weight[pool[starts.to(device)]])
    labels = None
    for _ in range(iterations):
        found = _assign(weight, pool, centres, room)
        if labels is not None and torch.equal(found, labels):
            break
        labels = found
        table = _table(pool, labels, clusters, room)
        centres = torch.nn.functional.normalize(_means(weight, table, _unit), dim=1)
    centroids = _means(weight, table, lambda rows: rows)
    squares = _means(weight, table, lambda rows: rows.square().mean(-1, keepdim=True))[:, 0]
    spreads = (squares - centroids.square().mean(1)).clamp(min=0)
    return RowClusters(table.to(torch.int32), centroids.to(weight.dtype), spreads, always.to(torch.int32))


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1 in fp32; a row of zeros stays one."""
    return torch.nn.functional.normalize(rows.float(), dim=-1)


def _assign(weight: Tensor, pool: Tensor, centres: Tensor, room: int) -> Tensor:
    """[len(pool)] int64: the cluster of each row, none with more than `room`."""
    clusters = len(centres)
    free = torch.full((clusters,), room, device=pool.device)
    labels = torch.full_like(pool, -1)
    left = torch.arange(len(pool), device=pool.device)
    while len(left):  # every round takes all rows that are left or closes a cluster
        full = torch.where(free > 0, 0.0, -torch.inf)
        near = [(_unit(weight[pool[part]]) @ centres.T + full).max(1) for part in left.split(_SLICE)]
        likeness, cluster = (torch.cat(values) for values in zip(*near, strict=True))
        # Cluster after cluster, the nearest rows first; a row's rank in its cluster says whether there is room.
        order = likeness.argsort(descending=True, stable=True)
        order = order[cluster[order].argsort(stable=True)]
        counts = torch.bincount(cluster, minlength=clusters)
        rank = torch.arange(len(left), device=pool.device) - (counts.cumsum(0) - counts)[cluster[order]]
        taken = order[rank < free[cluster[order]]]
        labels[left[taken]] = cluster[taken]
        free -= torch.bincount(cluster[taken], minlength=clusters)
        left = left[labels[left] < 0]
    return labels


def _table(pool: Tensor, labels: Tensor, clusters: int, room: int) -> Tensor:
    """[C, room] int64 rows of each cluster, ascending, -1 behind the last."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=clusters)
    place = torch.arange(len(pool), device=pool.device) - (counts.cumsum(0) - counts)[labels[order]]
    table = pool.new_full((clusters, room), -1)
    table[labels[order], place] = pool[order]
    return table


def _means(weight: Tensor, table: Tensor, prepare) -> Tensor:
    """[C, D] fp32 mean of the prepared rows of each cluster."""
    means = []
    for part in table.split(max(1, _SLICE // table.shape[1])):
        there = (part >= 0)[:, :, None]
        rows = prepare(weight[part.clamp(min=0)].float())
        means.append(torch.where(there, rows, 0.0).sum(1) / there.sum(1).clamp(min=1))
    return torch.cat(means)


def route(
    hidden: Tensor,
    clusters: RowClusters,
    count: int,
    *,
    scores: Tensor | None = None,
    row_groups: Tensor | None = None,
    groups: int | None = None,
    budget: int | None = None,
) -> Shortlist:
    """The rows that each hidden vector, or each group of them, drafts over: the `count` best clusters of every vector.

    A group's list is the union of what its vectors picked, cut to `budget` clusters: first those that are the best of
    some vector, then the second best, and so on; among equals those of the higher score. Sizes depend on the arguments
    alone, and nothing is read back to the host.

    Args:
        hidden: [N, D] of the centroids' dtype.
        clusters: see `cluster_rows`.
        count: clusters that each vector picks, 1..C.
        scores: [N, C] float, what clusters are ranked by, e.g. of a trained router (DynaSpec's meta-classifier).
            Default: hidden . centroid + |hidden|^2 spread / 2, the logarithm of a cluster's mass (less that of its
            size) if the logits of its rows were Gaussian around their mean.
        row_groups: [N] int32 in 0..groups-1, e.g. the tree of each node. A vector of another group picks nothing.
        groups: how many groups there are, G; with row_groups only.
        budget: clusters of a group's list at most, 1..C; with row_groups only.

    Returns:
        Shortlist of [G, A + budget S] rows, those of every list first; without row_groups of [N, A + count S].

    Raises:
        TypeError, ValueError: an argument that does not fit. Values of `row_groups` are checked under SPECDEC_DEBUG=1.
    """
    sizes: dict[str, int] = {}
    check_tensor("clusters.rows", clusters.rows, sizes, "C S", INT32)
    device = clusters.rows.device
    check_tensor("clusters.centroids", clusters.centroids, sizes, "C D", REFERENCE_FLOATS, device)
    check_tensor("clusters.spreads", clusters.spreads, sizes, "C", (torch.float32,), device)
    check_tensor("clusters.always", clusters.always, sizes, "A", INT32, device)
    check_tensor("hidden", hidden, sizes, "N D", (clusters.centroids.dtype,), device)
    check_int("count", count, 1, sizes["C"])
    if scores is None:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mean = product(hidden, clusters.centroids).to(wide.dtype)
        scores = mean + wide.square().sum(1, keepdim=True) * clusters.spreads / 2
        scores = scores.masked_fill(clusters.rows[:, 0] < 0, -torch.inf)  # a cluster that got no rows has no mass
    check_tensor("scores", scores, sizes, "N C", REFERENCE_FLOATS, device)
    # Sorted, not topk, whose ties fall differently on every device.
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    if row_groups is None:
        for name, value in (("groups", groups), ("budget", budget)):
            if value is not None:
                raise ValueError(f"{name}: expected None without row_groups, got {value!r}")
    else:
        check_tensor("row_groups", row_groups, sizes, "N", INT32, device)
        check_int("groups", groups, min(sizes["N"], 1))
        check_int("budget", budget, 1, sizes["C"])
        if DEBUG:
            check_values("row_groups", (row_groups >= 0) & (row_groups < groups), row_groups, f"0..{groups - 1}")
        best = _union(scores, best, row_groups, groups, budget)
    # A place that no cluster fills has cluster C.
    rows = clusters.rows[best.clamp(max=sizes["C"] - 1)].masked_fill_((best == sizes["C"])[:, :, None], -1)
    return Shortlist(torch.cat([clusters.always.expand(len(best), -1), rows.flatten(1)], 1), row_groups, sizes["A"])


def _union(scores: Tensor, best: Tensor, row_groups: Tensor, groups: int, budget: int) -> Tensor:
    """[G, budget] int64 clusters of each group, of the `best` [N, count] of its vectors; C where there are fewer."""
    total, count = scores.shape[1], best.shape[1]
    # A vector of no group writes to the line behind the last one.
    known = (row_groups >= 0) & (row_groups < groups)
    line = torch.where(known, row_groups, groups).long()[:, None]
    rank = torch.arange(count, device=scores.device).expand_as(best)
    ranks = torch.full(((groups + 1) * total,), count, device=scores.device)
    ranks.scatter_reduce_(0, (line * total + best).flatten(), rank.flatten(), "amin")
    highest = scores.new_full((groups + 1, total), -torch.inf)
    highest.scatter_reduce_(0, line.expand_as(scores), scores, "amax")
    # Stable sorts by the lesser key first; equal scores fall to the lower cluster.
    order, ranks = highest.argsort(dim=1, descending=True, stable=True), ranks.view_as(highest)
    order = order.gather(1, ranks.gather(1, order).argsort(dim=1, stable=True))[:groups, :budget]
    return torch.where(ranks[:groups].gather(1, order) < count, order, total)


def scatter_logits(all_logits: Tensor, shortlist: Shortlist, vocabulary: int) -> Tensor:
    """[N, V] logits for `draft_logits` of verify_*: -inf outside of each vector's own list.

    Verification needs q as it was when the tokens were drawn: the softmax over the list of that very vector, and
    nothing elsewhere, also where another vector's list has more.

    Args:
        all_logits: [N, R], what the head op returned for the shortlist's rows.
        shortlist: those lists.
        vocabulary: V, the target's; rows are target ids.
    """
    columns = _columns(all_logits, shortlist, vocabulary)
    if shortlist.row_groups is not None:
        columns = columns[_known_groups(shortlist)]
    # Padding goes to a column that is cut off again.
    wide = all_logits.new_full((len(all_logits), vocabulary + 1), -torch.inf)
    return wide.scatter_(1, columns, all_logits)[:, :vocabulary]


def compact_logits(all_logits: Tensor, shortlist: Shortlist, vocabulary: int) -> tuple[Tensor, Tensor]:
    """`scatter_logits` over the union of all lists alone: `draft_logits` [N, S] and `draft_vocab` [S] int32.

    A call of verify_* has one draft vocabulary, so it has to hold every list of the call; what is not in a vector's own
    list is -inf for it, which is q = 0. S = min(V, shared + G (R - shared)) holds any union; ids that nobody listed
    fill what is left of it, -inf for everyone. Worth it where that is well below V; else `scatter_logits`.

    Args:
        all_logits: [N, R], what the head op returned for the shortlist's rows. Several steps of one round: their logits
            and their lists one behind the other, with `row_groups` counted on.
        shortlist: those lists.
        vocabulary: V, the target's; rows are target ids.
    """
    columns = _columns(all_logits, shortlist, vocabulary)
    groups, width = columns.shape
    size = min(vocabulary, shortlist.shared + groups * (width - shortlist.shared))
    listed = torch.zeros(vocabulary + 1, dtype=torch.bool, device=columns.device)
    listed = listed.scatter_(0, columns.flatten(), True)[:vocabulary]
    kept = listed | ((~listed).cumsum(0) <= size - listed.sum())
    # Where each id went; those that went nowhere, and padding, share a column that is cut off again.
    place = torch.nn.functional.pad(torch.where(kept, kept.cumsum(0) - 1, size), (0, 1), value=size)
    ids = torch.arange(vocabulary + 1, dtype=torch.int32, device=columns.device)
    draft_vocab = ids.new_empty(size + 1).scatter_(0, place, ids)[:size]
    columns = place[columns]
    if shortlist.row_groups is not None:
        columns = columns[_known_groups(shortlist)]
    compact = all_logits.new_full((len(all_logits), size + 1), -torch.inf)
    return compact.scatter_(1, columns, all_logits)[:, :size], draft_vocab


def _columns(all_logits: Tensor, shortlist: Shortlist, vocabulary: int) -> Tensor:
    """[G, R] int64 target id of each column of the lists, V for padding; checks the arguments."""
    check_int("vocabulary", vocabulary, 1)
    sizes: dict[str, int] = {}
    check_tensor("shortlist.rows", shortlist.rows, sizes, "G R", INT32)
    device = shortlist.rows.device
    check_int("shortlist.shared", shortlist.shared, 0, sizes["R"])
    sizes["N"] = sizes["G"]
    if shortlist.row_groups is not None:
        del sizes["N"]
        check_tensor("shortlist.row_groups", shortlist.row_groups, sizes, "N", INT32, device)
    check_tensor("all_logits", all_logits, sizes, "N R", REFERENCE_FLOATS, device)
    known = (shortlist.rows >= 0) & (shortlist.rows < vocabulary)
    return torch.where(known, shortlist.rows, vocabulary).long()


def _known_groups(shortlist: Shortlist) -> Tensor:
    """[N] int64 in 0..G-1; the logits of a vector of no group are -inf in whichever columns."""
    return shortlist.row_groups.long().clamp(0, max(len(shortlist.rows) - 1, 0))
