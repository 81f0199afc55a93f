"""Where the tests of tree_attention on Triton run: interpreted in another process; in a CUDA graph here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import specdec_kernels as sk
from attention_cases import Case
from attention_triton import there
from specdec_kernels import SharedPrefix
from verify_backends import INTERPRETED, in_another_process

FILES = ["", "_inputs", "_shared", "_layout"]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
@pytest.mark.parametrize("which, least", [("not full", 45), pytest.param("full", 150, marks=pytest.mark.full)])
def test_under_the_interpreter(which, least):
    files = [str(Path(__file__).with_name(f"test_attention_triton{name}.py")) for name in FILES]
    assert in_another_process(*files, "-m", which, TRITON_INTERPRET="1") >= least


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("sharing", [False, True])
def test_cuda_graph(sharing):
    """Captured once, replayed with other lengths and other trees: nothing is read by the host."""
    cases = [Case([[-1, 0, 0], [-1, 0]], prefixes, spare=900, seed=4) for prefixes in ([600, 20], [3, 640])]
    for case in cases:
        case.keys, case.values = case.keys.nan_to_num()[:, :, :900], case.values.nan_to_num()[:, :, :900]
    held = {name: getattr(cases[0], name).cuda() for name in ("query", "keys", "values", "prefix_lens")}
    tree = cases[0].tree._replace(parents=cases[0].tree.parents.cuda(), cu_nodes=cases[0].tree.cu_nodes.cuda())
    shared = SharedPrefix(*torch.tensor([[0, 0], [3, 2]], dtype=torch.int32, device="cuda")) if sharing else None

    def call():
        return sk.tree_attention(
            held["query"], held["keys"], held["values"], tree, held["prefix_lens"], shared=shared, backend="triton"
        )

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for case in reversed(cases):
        for name, tensor in held.items():
            tensor.copy_(getattr(case, name))
        graph.replay()
        options = {} if shared is None else {"shared": there(shared, "cpu")}
        want = case.run(backend="reference", **options)
        torch.testing.assert_close(out.cpu(), want, atol=2e-5, rtol=2e-5)
