"""Tree attention on a GPU against the best form of what a user has, in one process: run by `make gpu`.

Llama-3-8B's layer (32 query heads, 8 KV heads of 128, bf16). Everything is captured in CUDA graphs and takes its caches
from several places in turn, so that the L2 cache holds none of them; the share of the copy bandwidth counts keys and
values of the prefix and of the tree once. Baselines: SDPA with a mask, on grouped heads and with the group folded into
the rows; compiled FlexAttention with a block mask; FlashInfer's prefill with a custom mask, where it is installed.
Their masks and plans are made once, which no step of decoding could do.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import pytest
import torch
from bench_gpu import CALLS, COPIED, captured
from common import compare
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import specdec_kernels as sk
from specdec_kernels.backends import BackendError
from specdec_kernels.trees import tree_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
Q_HEADS, KV_HEADS, SIZE, PAGE = 32, 8, 128, 16
GROUP = Q_HEADS // KV_HEADS


class Step(NamedTuple):
    """One step of a batch in which every request has a tree of q nodes behind kv committed slots."""

    query: Tensor  # [B * q, Hq, D]
    keys: Tensor  # [B, Hkv, kv + q, D]
    values: Tensor
    tree: sk.DraftTree
    layout: sk.TreeLayout
    prefix_lens: Tensor

    @property
    def nodes(self) -> int:
        return self.tree.max_nodes

    def batched(self) -> Tensor:
        """[B, Hq, q, D] of the queries."""
        return self.query.view(len(self.keys), self.nodes, Q_HEADS, SIZE).transpose(1, 2)

    def in_tree(self) -> Tensor:
        """[q, q] bool, who sees whom; the same tree in each request."""
        column = torch.arange(self.nodes, device=self.query.device)
        return (self.layout.ancestor_bits[: self.nodes, column >> 6] >> (column & 63) & 1).bool()


def step(batch: int, kv: int, nodes: int, device: str = "cuda") -> Step:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    parents = [-1, *((node - 1) // 3 for node in range(1, nodes))]
    parents = torch.tensor(parents * batch, dtype=torch.int32, device=device)
    cu_nodes = torch.arange(batch + 1, dtype=torch.int32, device=device) * nodes
    tree = sk.DraftTree(parents, parents, cu_nodes, nodes, nodes)
    prefix_lens = torch.full((batch,), kv, dtype=torch.int32, device=device)
    shape = (batch, KV_HEADS, kv + nodes, SIZE)
    return Step(
        normal(batch * nodes, Q_HEADS, SIZE), normal(*shape), normal(*shape), tree, tree_layout(tree, prefix_lens),
        prefix_lens,
    )  # fmt: skip


def places(case: Step) -> list[Step]:
    """The case, and as many copies of its caches as it takes to push one another out of the L2 cache."""
    size = case.keys.nbytes + case.values.nbytes
    more = min(CALLS - 1, 3 * torch.cuda.get_device_properties(0).L2_cache_size // size)
    return [case, *(case._replace(keys=case.keys.clone(), values=case.values.clone()) for _ in range(more))]


def op(case: Step, **options):
    arguments = (case.query, case.keys, case.values, case.tree, case.prefix_lens)
    return functools.partial(sk.tree_attention, *arguments, layout=case.layout, **options)


def paged(case: Step):
    """The same step on shuffled blocks of PAGE slots."""
    batch, _, length, _ = case.keys.shape
    columns = -(-length // PAGE)
    order = torch.randperm(batch * columns, device=case.keys.device)
    pools = []
    for cache in (case.keys, case.values):
        padded = torch.nn.functional.pad(cache.transpose(1, 2), (0, 0, 0, 0, 0, columns * PAGE - length))
        pool = torch.empty(batch * columns, PAGE, KV_HEADS, SIZE, dtype=cache.dtype, device=cache.device)
        pool[order] = padded.reshape(pool.shape)
        pools.append(pool)
    table = order.view(batch, columns).to(torch.int32)
    return op(case._replace(keys=pools[0], values=pools[1]), block_table=table, backend="triton")


def mask_of(case: Step) -> Tensor:
    """[q, kv + q] bool."""
    seen = case.in_tree()
    return torch.cat([seen.new_ones(case.nodes, case.keys.shape[2] - case.nodes), seen], 1)


def packed(out: Tensor, case: Step) -> Tensor:
    """[B * q, Hq, D] of [B, Hq, q, D]."""
    return out.transpose(1, 2).reshape(case.query.shape)


def sdpa(case: Step, mask: Tensor):
    query = case.batched()
    return lambda: packed(scaled_dot_product_attention(query, case.keys, case.values, mask, enable_gqa=True), case)


def sdpa_folded(case: Step, mask: Tensor):
    query = case.batched().reshape(-1, KV_HEADS, GROUP * case.nodes, SIZE)
    mask = mask.repeat(GROUP, 1)

    def call():
        out = scaled_dot_product_attention(query, case.keys, case.values, mask)
        return packed(out.view(-1, Q_HEADS, case.nodes, SIZE), case)

    return call


def flex(case: Step, mask: Tensor):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, (nodes, length) = case.batched().contiguous(), mask.shape
    blocks = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, nodes, length, device=query.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: packed(compiled(query, case.keys, case.values, block_mask=blocks, enable_gqa=True), case)


def flashinfer(case: Step, mask: Tensor):
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    batch, _, length, _ = case.keys.shape
    workspace = torch.empty(1 << 28, dtype=torch.uint8, device=case.query.device)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = torch.arange(batch + 1, dtype=torch.int32, device=case.query.device)
    wrapper.plan(
        case.tree.cu_nodes, starts * length, Q_HEADS, KV_HEADS, SIZE, custom_mask=mask.flatten().repeat(batch),
        q_data_type=torch.bfloat16,
    )  # fmt: skip
    rows = [cache.transpose(1, 2).reshape(batch * length, KV_HEADS, SIZE) for cache in (case.keys, case.values)]
    return lambda: wrapper.run(case.query, *rows)


BASELINES = {"sdpa": sdpa, "sdpa_folded": sdpa_folded, "flex": flex, "flashinfer": flashinfer}


def baselines(cases: list[Step], want: Tensor) -> dict:
    """What runs here, captured; it has to compute the same."""
    found, mask = {}, mask_of(cases[0])
    for name, make in BASELINES.items():
        if name == "flashinfer" and importlib.util.find_spec("flashinfer") is None:
            print("flashinfer is not installed here")
            continue
        try:
            functions = [make(case, mask) for case in cases]
            got = functions[0]()
            replay = captured(*functions)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name} does not fit: {error}")
            continue
        assert (got - want).abs().max() < 0.05, f"{name} computes something else"
        found[name] = replay
    return found


def compare_all(benchmark, make, cases: list[Step], want: Tensor, bytes_read: int) -> None:
    """`make(case)` against the baselines and the copy bandwidth."""
    try:
        got = make(cases[0])()
    except BackendError as error:
        pytest.skip(str(error))
    assert (got - want).abs().max() < 0.05
    source, target = torch.zeros(2, COPIED, dtype=torch.int8, device="cuda")
    compare(
        benchmark,
        captured(*(make(case) for case in cases)),
        baselines(cases, want),
        copy=(captured(lambda: target.copy_(source)), 2 * COPIED * CALLS),
        bytes_read=bytes_read * CALLS,
    )


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize("nodes", [16, 64, 256])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("kv", [4096, 16384, 65536, 131072])
def test_tree_attention(benchmark, kv, batch, nodes, layout):
    """The goals: 70% of the bandwidth at q <= 64, 1.5 times the best baseline."""
    size = 2 * batch * KV_HEADS * (kv + nodes) * SIZE * 2
    if 4 * size > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"needs {4 * size / 2**30:.0f} GiB")
    cases = places(step(batch, kv, nodes))
    want = sdpa(cases[0], mask_of(cases[0]))()
    make = paged if layout == "paged" else functools.partial(op, backend="triton")
    compare_all(benchmark, make, cases, want, size)


@pytest.mark.parametrize("batch", [8, 32])
def test_shared_prefix(benchmark, batch):
    """One prompt of 16k slots under all requests: read once. The baselines read it for each request."""
    kv, nodes = 16384, 16
    case = step(batch, kv, nodes)
    for cache in (case.keys, case.values):
        cache[:, :, :kv] = cache[:1, :, :kv].clone()
    cases = places(case)
    zeros = torch.zeros(batch, dtype=torch.int32, device="cuda")
    make = functools.partial(op, shared=sk.SharedPrefix(zeros, case.prefix_lens), backend="triton")
    want = sdpa(case, mask_of(case))()
    compare_all(benchmark, make, cases, want, case.keys.nbytes + case.values.nbytes)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_compaction_and_copy(benchmark, batch, layout, backend):
    """32 layers, paths of 7 nodes of which 6 move: the share of the copy bandwidth counts what is read and written."""
    layers, length, path = 32, 2048, 7
    table, shape = None, (batch, KV_HEADS, length, SIZE)
    if layout == "paged":
        blocks = batch * length // PAGE
        table = torch.randperm(blocks, device="cuda").to(torch.int32).view(batch, -1)
        shape = (blocks, PAGE, KV_HEADS, SIZE)
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2 * layers)]
    nodes = torch.tensor([0, *range(9, 9 * path, 9)], dtype=torch.int32, device="cuda").repeat(batch, 1)
    prefix = torch.arange(batch, dtype=torch.int32, device="cuda") + 1900
    moved = 2 * layers * batch * KV_HEADS * SIZE * 2 * (path - 1) * 2
    source, target = torch.zeros(2, COPIED, dtype=torch.int8, device="cuda")
    try:
        sk.compact_kv_(caches, nodes, prefix, block_table=table, backend=backend)
    except BackendError as error:
        pytest.skip(str(error))
    compare(
        benchmark,
        captured(lambda: sk.compact_kv_(caches, nodes, prefix, block_table=table, backend=backend)),
        {},
        copy=(captured(lambda: target.copy_(source)), 2 * COPIED * CALLS),
        bytes_read=moved * CALLS,
    )
