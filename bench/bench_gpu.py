"""GPU kernels against plain torch at its best, in one process: run by `make gpu`.

Every candidate and baseline is captured in a CUDA graph of several calls, so that kernels are compared, not Python.
Verification takes its logits from several places in turn, so that the L2 cache holds none of them; its share of the
copy bandwidth counts each row once that a walk must read.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace

import careful_gpu
import pytest
import torch
from common import compare
from problems import Problem, filled, problem

import specdec_kernels as sk
from specdec_kernels.backends import BackendError
from specdec_kernels.trees import branching_tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CALLS = 20  # in one graph: the cost of a replay is spread over them
VOCABULARY, CHAIN, TREE = 151936, branching_tree([1] * 4), filled(64, width=4)
COPIED = 1 << 29  # bytes


def captured(*functions):
    """A callable that replays CALLS calls, of `functions` in turn, and waits for them."""
    for function in functions:
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            functions[call % len(functions)]()

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return replay


def places(case: Problem) -> list[Problem]:
    """The case, and as many copies of its logits as it takes to push one another out of the L2 cache."""
    size = case.target.nbytes + case.draft.nbytes
    more = min(CALLS - 1, 3 * torch.cuda.get_device_properties(0).L2_cache_size // size)
    return [case] + [case._replace(target=case.target.clone(), draft=case.draft.clone()) for _ in range(more)]


def bytes_of_rows(case: Problem, nodes: torch.Tensor) -> int:
    """Bytes of the rows that walks along the paths `nodes` [B, max_depth+1] must read: p of each, q above children."""
    inner = case.children()[:, 0] >= 0
    rows = int((nodes >= 0).sum() + inner[nodes.clamp(min=0)][nodes >= 0].sum())
    return rows * case.target.shape[1] * case.target.element_size()


def chain_op(case: Problem, backend: str | None):
    """A call of `verify_chain`."""

    def call():
        return sk.verify_chain(
            case.tree.tokens, case.tree.cu_nodes, case.target, case.draft, max_depth=case.shape.max_depth,
            accept_uniforms=case.accept, final_uniforms=case.final, backend=backend,
        )  # fmt: skip

    return call


def measure(benchmark, case: Problem, op, baselines: dict) -> None:
    """Compare `op(case)()` with what `baselines` make of a case."""
    try:
        found = op(case)()
    except BackendError as error:
        pytest.skip(str(error))
    for name, other in baselines.items():
        assert (other(case) == found.tokens).float().mean() > 0.99, f"{name} computes something else"
    cases = places(case)
    source, target = torch.zeros(2, COPIED, dtype=torch.int8, device="cuda")
    compare(
        benchmark,
        captured(*(op(each) for each in cases)),
        {name: captured(*(functools.partial(f, each) for each in cases)) for name, f in baselines.items()},
        copy=(captured(lambda: target.copy_(source)), 2 * COPIED * CALLS),
        bytes_read=bytes_of_rows(case, found.nodes) * CALLS,
    )


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("batch", [1, 8, 32, 128])
def test_verify_chain(benchmark, batch, backend):
    case = problem("multi_round", CHAIN, batch, VOCABULARY, torch.bfloat16, device="cuda")
    walk = functools.partial(careful_gpu.tree, children=case.children(), replacement=True)
    baselines = {
        "torch": careful_gpu.chain,
        "compiled": torch.compile(careful_gpu.chain, fullgraph=True, dynamic=False),
        "compiled_visited_rows": torch.compile(walk, fullgraph=True, dynamic=False),
    }
    measure(benchmark, case, functools.partial(chain_op, backend=backend), baselines)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("method", ["multi_round", "without_replacement"])
def test_verify_tree(benchmark, method, batch, backend):
    case = problem(method, TREE, batch, VOCABULARY, torch.bfloat16, device="cuda")
    walk = functools.partial(careful_gpu.tree, children=case.children(), replacement=method == "multi_round")
    baselines = {"torch": walk, "compiled": torch.compile(walk, fullgraph=True, dynamic=False)}
    measure(benchmark, case, functools.partial(Problem.op, method=method, backend=backend), baselines)


def vllm_chain(module, case: Problem) -> torch.Tensor:
    """The rejection sampler of vLLM and what it needs around it: probabilities of all rows, and the bonus token."""
    batch, width = case.tokens.shape
    drafts = width - 1
    target, draft = (x.view(batch, width, -1) for x in (case.target, case.draft))
    bonus = target[:, -1].float().softmax(-1)
    bonus = (bonus / torch.empty_like(bonus).exponential_()).argmax(-1, keepdim=True).int()
    rows = target[:, :-1].float()
    if "target_probs" in inspect.signature(module.rejection_sample).parameters:  # later versions take logits
        rows = rows.softmax(-1)
    metadata = SimpleNamespace(
        all_greedy=False, all_random=True, generators={}, temperature=torch.ones(batch, device=rows.device)
    )
    return module.rejection_sample(
        case.tokens[:, 1:].reshape(-1),
        [drafts] * batch,
        drafts,
        (torch.arange(1, batch + 1, device=rows.device) * drafts).int(),
        draft[:, :-1].float().softmax(-1).reshape(batch * drafts, -1),
        rows.reshape(batch * drafts, -1),
        bonus,
        metadata,
    )


@pytest.mark.parametrize("batch", [1, 8, 32, 128])
def test_verify_chain_and_vllm(benchmark, batch):
    """The sampler of vLLM draws with its own random numbers, so its tokens are not compared."""
    module = pytest.importorskip("vllm.v1.sample.rejection_sampler", reason="vLLM is not installed here")
    case = problem("multi_round", CHAIN, batch, VOCABULARY, torch.bfloat16, device="cuda")
    cases = places(case)
    compare(
        benchmark,
        captured(*(chain_op(each, None) for each in cases)),
        {"vllm": captured(*(functools.partial(vllm_chain, module, each) for each in cases))},
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
