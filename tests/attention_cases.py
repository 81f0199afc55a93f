"""Inputs of tree attention, and its definition one query, one head and one path at a time in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from specdec_kernels import DraftTree, tree_attention

NAN = float("nan")


@dataclass
class Case:
    """Inputs of one call; the caches are dense, `paged()` makes the same ones in blocks."""

    requests: list[list[int]]  # parents of each tree
    prefixes: list[int]
    q_heads: int = 4
    kv_heads: int = 2
    size: int = 8
    value_size: int = 8
    dtype: torch.dtype = torch.float32
    seed: int = 0
    spare: int = 5
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        sizes = [len(request) for request in self.requests]
        batch, self.length = len(sizes), max((p + n for p, n in zip(self.prefixes, sizes, strict=True)), default=0)
        self.length += self.spare
        self.query = normal(sum(sizes), self.q_heads, self.size)
        self.keys = normal(batch, self.kv_heads, self.length, self.size)
        self.values = normal(batch, self.kv_heads, self.length, self.value_size)
        for b, (prefix, n) in enumerate(zip(self.prefixes, sizes, strict=True)):
            self.keys[b, :, prefix + n :] = NAN
            self.values[b, :, prefix + n :] = NAN
        cu_nodes = torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
        parents = torch.tensor([p for request in self.requests for p in request], dtype=torch.int32)
        self.tree = DraftTree(parents, parents, cu_nodes, max(sizes, default=1), max(sizes, default=1))
        self.prefix_lens = torch.tensor(self.prefixes, dtype=torch.int32)

    def run(self, device="cpu", **changes):
        arguments = {"query": self.query, "key_cache": self.keys, "value_cache": self.values, "tree": self.tree}
        arguments |= {"prefix_lens": self.prefix_lens, **self.options, **changes}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = value.to(device)
        tree = arguments["tree"]
        arguments["tree"] = tree._replace(parents=tree.parents.to(device), cu_nodes=tree.cu_nodes.to(device))
        return tree_attention(**arguments)

    def paged(self, block_size: int) -> dict:
        """The same caches in shuffled blocks; unused blocks hold NaN and unused table entries -1."""
        batch, columns = len(self.requests), -(-self.length // block_size)
        generator = torch.Generator().manual_seed(self.seed)
        blocks = batch * columns + 3
        table = torch.randperm(blocks, generator=generator)[: batch * columns].view(batch, columns).to(torch.int32)
        result = {}
        for name, dense in (("key_cache", self.keys), ("value_cache", self.values)):
            padded = torch.nn.functional.pad(dense.transpose(1, 2), (0, 0, 0, 0, 0, columns * block_size - self.length))
            pool = dense.new_full((blocks, block_size, self.kv_heads, dense.shape[-1]), NAN)
            pool[table.long().flatten()] = padded.reshape(batch * columns, *pool.shape[1:])
            result[name] = pool
        for b, (prefix, request) in enumerate(zip(self.prefixes, self.requests, strict=True)):
            table[b, -(-(prefix + len(request)) // block_size) :] = -1
        return result | {"block_table": table}


def naive(case: Case, mask=None, scale=None, window=None, softcap=None, sinks=None, k_scale=None, v_scale=None):
    """(out, lse) float64 of one softmax for each node and head over the slots that its path names."""
    rows = int(case.tree.cu_nodes[-1])
    out = torch.zeros(rows, case.q_heads, case.value_size, dtype=torch.float64)
    lse = torch.full((rows, case.q_heads), -math.inf, dtype=torch.float64)
    row = 0
    for b, (request, prefix) in enumerate(zip(case.requests, case.prefixes, strict=True)):
        depth = []
        for parent in request:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        for node in range(len(request)):
            path = [node]
            while request[path[-1]] >= 0:
                path.append(request[path[-1]])
            if mask is not None:
                path = [j for j in range(len(request)) if mask[row][j]]
            positions = {s: s for s in range(prefix)} | {prefix + j: prefix + depth[j] for j in path}
            here = prefix + depth[node]
            slots = [s for s, position in positions.items() if window is None or here - position < window]
            for head in range(case.q_heads):
                kv = head * case.kv_heads // case.q_heads
                keys = case.keys[b, kv, slots].double() * (1 if k_scale is None else float(k_scale[kv]))
                values = case.values[b, kv, slots].double() * (1 if v_scale is None else float(v_scale[kv]))
                scores = keys @ case.query[row, head].double() * (scale or case.size**-0.5)
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                extra = scores.new_empty(0) if sinks is None else sinks[head : head + 1].double()
                lse[row, head] = torch.logsumexp(torch.cat([scores, extra]), 0)
                if slots:
                    out[row, head] = torch.exp(scores - lse[row, head]) @ values
            row += 1
    return out, lse


def bits_of(mask: list[list[bool]], max_nodes: int) -> torch.Tensor:
    words = torch.zeros(len(mask), (max_nodes + 63) // 64, dtype=torch.int64)
    for row, seen in enumerate(mask):
        for j, sees in enumerate(seen):
            if sees:
                words[row, j // 64] |= 1 << (j % 64) if j % 64 < 63 else -(2**63)
    return words
