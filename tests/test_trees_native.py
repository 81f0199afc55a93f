"""tree_layout compiled: the CPU kernel, and the device code run by fibers on the host, against the reference."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels import DraftTree, TreeLayout, backends
from specdec_kernels.trees import tree_layout
from test_trees import ints, make_tree, parent_lists

ROOT = Path(__file__).resolve().parents[1]
MISSING = backends.MISSING["cpu"]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
POISON = -7777


class Launch(ctypes.Structure):
    """`Launch` of csrc/include/specdec/layout.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("parents", "cu_nodes", "prefix_lens")],
        *[(name, ctypes.c_int64) for name in ("parents_stride", "cu_nodes_stride", "prefix_stride")],
        *[(name, ctypes.c_void_p) for name in ("depths", "bits", "positions")],
        *[(name, ctypes.c_int64) for name in ("nodes", "batch", "max_nodes", "words")],
    ]


@pytest.fixture(scope="module")
def device_code(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    library = tmp_path_factory.mktemp("trees") / "trees_host.so"
    sources = [str(ROOT / "tests" / name) for name in ("trees_host.cpp", "cuda_host.cpp")]
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, f"-I{ROOT / 'csrc/include'}", *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.layout_on_host.restype = ctypes.c_char_p
    assert loaded.launch_size() == ctypes.sizeof(Launch)

    def run(tree: DraftTree, prefix_lens=None, threads: int = 32) -> TreeLayout:
        nodes, words = tree.parents.shape[0], (tree.max_nodes + 63) // 64
        out = TreeLayout(
            torch.full((nodes,), POISON, dtype=torch.int32),
            torch.full((nodes, words), POISON),
            torch.full((nodes,), POISON, dtype=torch.int32),
        )
        given = (tree.parents, tree.cu_nodes, prefix_lens)
        launch = Launch(
            *(None if x is None else x.data_ptr() for x in given),
            *(0 if x is None else x.stride(0) for x in given),
            *(x.data_ptr() for x in out),
            nodes,
            tree.cu_nodes.shape[0] - 1,
            tree.max_nodes,
            words,
        )
        failure = loaded.layout_on_host(ctypes.byref(launch), threads)
        assert failure is None, failure
        return out

    return run


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.native), "cuda"])
def compiled(request):
    """The compiled kernels as functions of a tree and its prefixes."""
    if request.param == "cuda":
        return request.getfixturevalue("device_code")
    if MISSING is not None:
        pytest.skip(str(MISSING))
    return lambda tree, prefix_lens=None, threads=0: tree_layout(tree, prefix_lens, backend="cpu")


def agree(compiled, tree: DraftTree, prefix_lens=None, **options) -> None:
    """Bit for bit on every node of a tree, zeros elsewhere."""
    got, want = compiled(tree, prefix_lens, **options), tree_layout(tree, prefix_lens, backend="reference")
    bounds = tree.cu_nodes.clamp(0, len(tree.parents)).cummax(0).values.tolist()
    mine = torch.zeros(len(tree.parents), dtype=torch.bool)
    for first, last in itertools.pairwise(bounds):
        mine[first : min(last, first + tree.max_nodes)] = True
    for name, ours, theirs in zip(TreeLayout._fields, got, want, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.is_contiguous()
        assert ours[mine].equal(theirs[mine]), name
        assert not ours[~mine].any(), f"{name} of rows of no tree"


quickly = settings(max_examples=40, deadline=None)


@pytest.mark.native
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@quickly
@given(st.lists(parent_lists(), max_size=4), st.integers(0, 70), st.booleans())
def test_cpu_agrees(requests, slack, prefixed):
    prefix_lens = ints([1000 * b + 7 for b in range(len(requests))]) if prefixed else None
    agree(
        lambda tree, lens: tree_layout(tree, lens, backend="cpu"), make_tree(requests, "cpu", slack), prefix_lens
    )  # fmt: skip


def test_device_code_agrees(device_code):
    @quickly
    @given(st.lists(parent_lists(), max_size=4), st.integers(0, 70), st.sampled_from([32, 96, 256]))
    def each(requests, slack, threads):
        prefix_lens = ints([1000 * b + 7 for b in range(len(requests))])
        agree(device_code, make_tree(requests, "cpu", slack), prefix_lens, threads=threads)

    each()


LARGE = {
    "chain": list(range(-1, 1023)),
    "star": [-1] + [0] * 1023,
    "comb": [-1] + [i - 1 if i % 3 else max(i - 3, 0) for i in range(1, 1024)],
    "longer than a word of words": list(range(-1, 5000)),
}


@pytest.mark.parametrize("parents", LARGE.values(), ids=LARGE)
def test_large_trees(compiled, parents):
    agree(compiled, make_tree([[-1, 0], parents, [-1]]), ints([5, 9, 0]), threads=512)


def test_many_trees_and_threads(compiled):
    """Enough work for every thread of the CPU, and trees of no nodes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 120, (300,), generator=generator).tolist()
    requests = [[-1, *(int(torch.randint(0, i, (), generator=generator)) for i in range(1, n))][:n] for n in sizes]
    agree(compiled, make_tree(requests), torch.arange(300, dtype=torch.int32))


@pytest.mark.parametrize("cu_nodes", [[3, 2], [0, 9], [-100, 2], [0, 5, 2], [7, -7, 4], [2, 2, 2], [0], [1, 3, 3, 4]])
@pytest.mark.parametrize("parents", [[-1, 2, 0, 4, 1], [9, 9, -9, 9, 9], [-1, 0, 1, 2, 3], [2**31 - 1] * 5])
@pytest.mark.parametrize("max_nodes", [1, 3, 70])
def test_values_that_do_not_fit(compiled, cu_nodes, parents, max_nodes):
    prefix_lens = torch.full((len(cu_nodes) - 1,), 2**31 - 1, dtype=torch.int32)
    for lens in (None, prefix_lens):
        agree(compiled, DraftTree(ints(parents), ints(parents), ints(cu_nodes), max_nodes, 4), lens)


def test_strided_arguments(compiled):
    tree = make_tree([[-1, 0, 0, 1], [-1, 0, 1]])
    wide = tree._replace(
        parents=torch.stack([tree.parents, tree.parents + 5], 1)[:, 0],
        cu_nodes=torch.stack([tree.cu_nodes, tree.cu_nodes + 5], 1)[:, 0],
    )
    lens = ints([4, 100, 9, 100])[::2]
    agree(compiled, wide, lens)
    for ours, theirs in zip(compiled(wide, lens), tree_layout(tree, ints([4, 9])), strict=True):
        assert ours.equal(theirs)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_op_checks_what_keeps_it_in_bounds():
    op = torch.ops.specdec_kernels.tree_layout.default
    good = (ints([-1, 0]), ints([0, 2]), 2, None)
    op(*good)
    for place, value, message in (
        (0, ints([-1, 0]).long(), "parents: expected int32"),
        (0, ints([[-1, 0]]), "expected parents"),
        (1, ints([]), "cu_nodes"),
        (2, 0, "max_nodes >= 1"),
        (3, ints([1, 2]), r"prefix_lens: expected \[1\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*good[:place], value, *good[place + 1 :])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_agrees_and_is_captured():
    def on_gpu(tree, prefix_lens=None, threads=0):
        moved = tree._replace(tokens=tree.tokens.cuda(), parents=tree.parents.cuda(), cu_nodes=tree.cu_nodes.cuda())
        lens = None if prefix_lens is None else prefix_lens.cuda()
        return TreeLayout(*(x.cpu() for x in tree_layout(moved, lens, backend="cuda")))

    for parents in LARGE.values():
        agree(on_gpu, make_tree([[-1, 0], parents, [-1]]), ints([5, 9, 0]))
    test_many_trees_and_threads(on_gpu)
    for cu_nodes in ([3, 2], [0, 9], [-100, 2], [0, 5, 2], [7, -7, 4], [0], [1, 3, 3, 4]):
        test_values_that_do_not_fit(on_gpu, cu_nodes, [-1, 2, 0, 4, 1], 3)
    tree, other = make_tree([[-1, 0, 0, 1], [-1, 0]]), ints([-1, 0, 1, 2, -1, 0])
    moved = tree._replace(parents=tree.parents.cuda(), cu_nodes=tree.cu_nodes.cuda())
    lens = ints([5, 6]).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tree_layout(moved, lens, backend="cuda")
    moved.parents.copy_(other)
    graph.replay()
    want = tree_layout(tree._replace(parents=other), ints([5, 6]), backend="reference")
    assert all(ours.cpu().equal(theirs) for ours, theirs in zip(got, want, strict=True))
