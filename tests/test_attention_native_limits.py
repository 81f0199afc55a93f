"""Tree attention on the CPU: error beside PyTorch's own, memory beside the arguments, other instruction sets."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.nn.functional as F

import specdec_kernels as sk
from attention_cases import Case
from malloc_peak import peak, peaks_of, report
from specdec_kernels import SharedPrefix, backends
from verify_backends import ROOT, in_another_process

MISSING = backends.MISSING["cpu"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
TIERS = [] if MISSING else sys.modules["specdec_kernels._C"].tiers()
Q_HEADS, KV_HEADS, SIZE = 8, 2, 64
MEMORY_SIZE = 128


def sdpa_forms(query, keys, values, mask):
    """Name -> [n, Hq, D] of each way to give PyTorch the mask and the groups."""
    nodes, heads, size = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    by_head = query.transpose(0, 1)[None]
    folded = query.view(nodes, kv_heads, group, size).permute(1, 2, 0, 3).reshape(1, kv_heads, group * nodes, size)
    added = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    for name, m in (("bool", mask), ("float", added)):
        out = F.scaled_dot_product_attention(by_head, keys, values, m, enable_gqa=True)
        yield f"groups, {name}", out[0].transpose(0, 1)
        out = F.scaled_dot_product_attention(folded, keys, values, m.repeat(group, 1))
        yield f"folded, {name}", out.view(kv_heads, group, nodes, -1).permute(2, 0, 1, 3).flatten(1, 2)


@pytest.mark.parametrize("sharpness", [1.0, 4.0], ids=["flat", "sharp"])
@pytest.mark.parametrize("nodes", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_no_larger_than_those_of_sdpa(dtype, nodes, sharpness):
    """Root mean square over several trees, which for equal methods differs by chance; so does the largest error."""
    ours, theirs = [], {}
    for seed in range(4 if nodes > 5 else 16):
        generator = torch.Generator().manual_seed(seed)
        parents = [-1, *(int(torch.randint(max(0, n - 5), n, (), generator=generator)) for n in range(1, nodes))]
        case = Case([parents], [1500], Q_HEADS, KV_HEADS, SIZE, SIZE, dtype, seed, spare=0)
        case.query = case.query * sharpness
        index = torch.arange(nodes)
        mask = torch.ones(nodes, case.length, dtype=torch.bool)
        mask[:, 1500:] = (case.tree.ancestor_bits()[:, index >> 6] >> (index & 63) & 1).bool()
        exact = dict(sdpa_forms(case.query.double(), case.keys.double(), case.values.double(), mask))["folded, bool"]
        ours.append(case.run(backend="cpu").double() - exact)
        for name, out in sdpa_forms(case.query, case.keys, case.values, mask):
            theirs.setdefault(name, []).append(out.double() - exact)
    rms = torch.stack(ours).square().mean().sqrt()
    best = min(torch.stack(errors).square().mean().sqrt() for errors in theirs.values())
    assert rms <= 1.02 * best, f"{float(rms):.3e} against {float(best):.3e}"
    largest = torch.stack(ours).abs().max()
    best = max(torch.stack(errors).abs().max() for errors in theirs.values())
    assert largest <= 1.5 * best, f"{float(largest):.3e} against {float(best):.3e}"


def calls():
    """(name, bytes of its outputs, call): long caches, many rows, many requests, one prefix for all."""
    shapes = {"128k": (1, 1, 64, 131_072, 4), "1000 nodes": (1, 2, 1000, 9000, 4), "16 requests": (16, 2, 16, 3000, 4)}
    for name, (batch, kv_heads, nodes, prefix, group) in shapes.items():
        generator = torch.Generator().manual_seed(0)
        cache = torch.zeros(2, batch, kv_heads, prefix + nodes, MEMORY_SIZE, dtype=torch.bfloat16)
        query = torch.randn(batch * nodes, kv_heads * group, MEMORY_SIZE, generator=generator).to(torch.bfloat16)
        parents = torch.tensor([-1, *range(nodes - 1)], dtype=torch.int32).repeat(batch)
        cu_nodes = torch.arange(batch + 1, dtype=torch.int32) * nodes
        tree = sk.DraftTree(parents, parents, cu_nodes, nodes, nodes)
        lens = torch.full((batch,), prefix, dtype=torch.int32)
        options = {"layout": sk.trees.tree_layout(tree), "backend": "cpu"}
        for more in ("", ", shared"):
            if more:
                options["shared"] = SharedPrefix(torch.zeros(batch, dtype=torch.int32), lens - 10)
            call = lambda a=(query, *cache, tree, lens), o=dict(options): sk.tree_attention(*a, **o)  # noqa: E731
            yield name + more, query.nbytes, call


def measure() -> dict[str, int]:
    """Peak bytes of each call beyond what was in use before it and its outputs."""
    mega = torch.zeros(2**20, dtype=torch.bfloat16)
    peaks = {}
    for name, outputs, call in [("4 MiB", 0, mega.float), *calls()]:
        peaks[name] = peak(call)[0] - outputs
    return peaks


def test_extra_memory_is_bounded(tmp_path):
    """A little for each thread, and 16 MiB of partial results however long the caches and large the batches are."""
    peaks = peaks_of(__file__, tmp_path)
    assert peaks.pop("4 MiB") >= 4 * 2**20, "the counter sees what torch allocates"
    assert len(peaks) == 6
    threads = torch.get_num_threads()
    limit = max(16, 2 * threads) * 2**20 + threads * 3 * 2**18 + 2**20
    assert max(peaks.values()) < limit, (limit, peaks)


@pytest.mark.skipif("SPECDEC_CPU_ISA" in os.environ, reason="this process is for one instruction set already")
@pytest.mark.parametrize("isa", [pytest.param(t, marks=[] if t == "avx2" else [pytest.mark.full]) for t in TIERS[:-1]])
def test_random_trees_in_every_other_tier(isa):
    tests = str(ROOT / "tests" / "test_attention_native.py")
    some = "random_trees or shared_prefixes or usual or eight_bits or reach_it"
    assert in_another_process(tests, "-k", some, SPECDEC_CPU_ISA=isa) > 20


if __name__ == "__main__":
    report(measure)
