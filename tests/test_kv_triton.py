"""compact_kv_ on Triton: the tests of tests/test_kv.py, run by that backend, and what is special to its launches."""

from __future__ import annotations

import pytest
import torch

import specdec_kernels as sk
from test_kv import i32, move_slot_by_slot, random_cache, raw
from verify_backends import INTERPRETED, in_another_process

pytest.importorskip("triton", reason="triton is not installed")

NO_GPU = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
@pytest.mark.parametrize(
    "which, least",
    [
        ("fastest and cpu and not (more_layers or float64 or float16 or e5m2 or int8 or random)", 15),
        pytest.param("(fastest or opcheck or compiles) and not cuda", 30, marks=pytest.mark.full),
    ],
)
def test_under_the_interpreter(which, least):
    environment = {"TRITON_INTERPRET": "1", "SPECDEC_BACKEND": "triton"}
    assert in_another_process("tests/test_kv.py", "-m", "not gpu", "-k", which, **environment) >= least


@pytest.mark.gpu
@NO_GPU
def test_on_a_gpu():
    which = "(fastest or opcheck or compiles) and cuda and not graph"
    assert in_another_process("tests/test_kv.py", "-m", "gpu", "-k", which, SPECDEC_BACKEND="triton") >= 25


def test_one_launch_for_all_layers():
    """Keys and values of different sizes and dtypes too; what lies element by element goes by itself."""
    from specdec_kernels.triton.kv import compact_launches

    caches = [random_cache((2, 2, 12, 8)) for _ in range(80)]
    caches += [random_cache((2, 2, 12, 5), torch.bfloat16) for _ in range(80)]
    nodes, lens = i32([[0, 2], [0, 3]]), i32([1, 2])
    ((arguments, _, grid),) = compact_launches(caches, nodes, lens, None)
    assert grid[:2] == (2, 160) and arguments["ends"] == (80,) and arguments["UNIT"] == 2
    assert compact_launches(caches[:80], nodes, lens, None)[0][0]["UNIT"] == 8
    turned = [random_cache((2, 2, 5, 12), dtype).transpose(2, 3) for dtype in (torch.float32, torch.int8)]
    assert [launch[0]["UNIT"] for launch in compact_launches(caches + turned, nodes, lens, None)] == [2, 4, 1]
    assert [launch[2][1] for launch in compact_launches(caches * 3, nodes, lens, None)] == [384, 96]
    assert compact_launches(caches, nodes[:, :1], lens, None) == []


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_cuda_graph(layout):
    """Captured once, replayed with other paths: nothing is read by the host, nothing depends on data."""
    table = None if layout == "dense" else i32([[3, 0, 5, 7], [1, 6, 2, 4]], "cuda")
    shape = (2, 4, 32, 64) if table is None else (8, 8, 4, 64)
    cache = random_cache(shape, torch.bfloat16, "cuda")
    nodes, lens = i32([[0, 2, 5], [0, 3, -1]], "cuda"), i32([1, 4], "cuda")
    saved = cache.clone()
    sk.compact_kv_([cache], nodes, lens, block_table=table, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sk.compact_kv_([cache], nodes, lens, block_table=table, backend="triton")
    for paths, prefix in (([[0, 2, 5], [0, 3, -1]], [1, 4]), ([[0, 4, -1], [0, 1, 2]], [20, 9])):
        cache.copy_(saved)
        nodes.copy_(i32(paths))
        lens.copy_(i32(prefix))
        graph.replay()
        host = None if table is None else table.cpu()
        (wanted,) = move_slot_by_slot([saved.cpu()], nodes.cpu(), lens.cpu(), host)
        assert torch.equal(raw(cache.cpu()), raw(wanted))
