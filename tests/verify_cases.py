"""Random verification problems shared by the tests of all backends."""

from __future__ import annotations

import itertools

import torch

from specdec_kernels import DraftTree, Philox


def random_tree(batch: int, most: int, vocabulary: int, generator: torch.Generator, *, iid: bool = False) -> DraftTree:
    """Random trees of 1..most nodes; siblings differ unless `iid`."""
    tokens, parents, cu = [], [], [0]
    deepest = 0
    for _ in range(batch):
        size = int(torch.randint(1, most + 1, (), generator=generator))
        own_parents, own_tokens, depth = [-1], [int(torch.randint(vocabulary, (), generator=generator))], [0]
        while len(own_parents) < size:
            parent = int(torch.randint(len(own_parents), (), generator=generator))
            token = int(torch.randint(vocabulary, (), generator=generator))
            taken = {t for t, p in zip(own_tokens, own_parents, strict=True) if p == parent}
            if token in taken and not iid:
                if len(taken) == vocabulary:
                    continue
                token = next(t for t in range(vocabulary) if t not in taken)
            own_parents.append(parent)
            own_tokens.append(token)
            depth.append(depth[parent] + 1)
        tokens += own_tokens
        parents += own_parents
        cu.append(cu[-1] + size)
        deepest = max(deepest, *depth)
    ints = [torch.tensor(x, dtype=torch.int32) for x in (tokens, parents, cu)]
    widest = max((b - a for a, b in itertools.pairwise(cu)), default=1)
    return DraftTree(*ints, max_nodes=widest, max_depth=deepest)


def random_logits(rows: int, vocabulary: int, generator, *, sharpness=2.0, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(rows, vocabulary, generator=generator) * sharpness).to(dtype)


def streams(batch: int, seed: int = 0) -> Philox:
    return Philox(torch.arange(batch) + 1000 * seed, torch.arange(batch) * 7 + 3)
