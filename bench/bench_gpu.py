"""GPU kernels against plain torch at its best, in one process: run by `make gpu`.

Every candidate and baseline is captured in a CUDA graph of several calls, so that kernels are compared, not Python.
"""

from __future__ import annotations

import pytest
import torch
from common import compare

import specdec_kernels as sk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CALLS = 20  # in one graph: the cost of a replay is spread over them


def captured(function):
    """A callable that replays CALLS calls of `function` and waits for them."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return replay


def torch_chain(tokens, target, draft, accept_uniforms, final_uniforms):
    """[B, K+1] ids by softmax, gather, residual and one inverse CDF; all rows, since no row's fate is known before."""
    batch, width = tokens.shape
    p = target.float().softmax(-1).view(batch, width, -1)
    q = draft.float().softmax(-1).view(batch, width, -1)
    drafted = tokens[:, 1:, None].long()
    accept = accept_uniforms.view(batch, width)[:, 1:] * q[:, :-1].gather(2, drafted)[..., 0]
    accept = accept < p[:, :-1].gather(2, drafted)[..., 0]
    count = accept.int().cumprod(1).sum(1)
    row = count[:, None, None].expand(-1, 1, p.shape[2])
    rest = p.gather(1, row)[:, 0] - torch.where((count < width - 1)[:, None], q.gather(1, row)[:, 0], 0.0)
    cdf = rest.clamp_(min=0).cumsum(-1)
    last = torch.searchsorted(cdf, final_uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
    step = torch.arange(width, device=tokens.device)
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1)
    shifted = torch.where(step < count[:, None], shifted, -1)
    return torch.where(step == count[:, None], last[:, None].to(tokens.dtype), shifted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8, 32, 128])
def test_verify_chain(benchmark, batch, dtype):
    K, V = 4, 128256
    make = torch.Generator("cuda").manual_seed(0)
    nodes = batch * (K + 1)
    target = torch.randn(nodes, V, device="cuda", generator=make).mul_(3)
    draft = target + torch.randn(nodes, V, device="cuda", generator=make) / 2
    drawn = torch.multinomial(draft.softmax(-1), 1, generator=make)[:, 0].to(torch.int32)
    tokens = torch.cat([drawn.new_zeros(1), drawn[:-1]]).view(batch, K + 1)
    target, draft = target.to(dtype), draft.to(dtype)
    tree = sk.DraftTree.chain(tokens)
    accept, final = (torch.rand(n, device="cuda", generator=make) for n in (nodes, batch))

    def ours():
        return sk.verify_chain(
            tree.tokens, tree.cu_nodes, target, draft, max_depth=K, accept_uniforms=accept, final_uniforms=final
        )

    theirs = torch_chain(tokens, target, draft, accept, final)
    assert (ours().tokens == theirs).float().mean() > 0.99, "the baseline computes something else"
    compare(
        benchmark,
        captured(ours),
        {"torch": captured(lambda: torch_chain(tokens, target, draft, accept, final))},
    )


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize("batch", [1, 32])
def test_compact_kv(benchmark, batch, layout):
    """Llama-3-8B: 32 layers, 8 KV heads, D = 128, bf16; a path of 6 nodes in a tree of 60."""
    layers, heads, dim, length, block = 32, 8, 128, 512, 16
    path = torch.tensor([0, 3, 11, 24, 38, 52], dtype=torch.int32, device="cuda")
    nodes = path.repeat(batch, 1)
    prefix = torch.full((batch,), 400, dtype=torch.int32, device="cuda")
    table = None
    shape = (batch, heads, length, dim)
    if layout == "paged":
        blocks = batch * length // block
        table = torch.randperm(blocks, device="cuda").to(torch.int32).view(batch, -1)
        shape = (blocks, block, heads, dim)
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2 * layers)]
    request = torch.arange(batch, device="cuda")[:, None]
    source = prefix[:, None].long() + nodes[:, 1:]
    target = prefix[:, None].long() + torch.arange(1, nodes.shape[1], device="cuda")

    if table is not None:
        source, target = ((table.gather(1, slot // block).long(), slot % block) for slot in (source, target))

    def torch_copies():
        """The indices are made once; one gather and one scatter for each cache."""
        for cache in caches:
            if table is None:
                cache[request, :, target] = cache[request, :, source]
            else:
                cache[target] = cache[source]

    compare(
        benchmark,
        captured(lambda: sk.compact_kv_(caches, nodes, prefix, block_table=table, backend="cuda")),
        {"torch": captured(torch_copies)},
    )
