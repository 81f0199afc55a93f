"""compact_kv_: accepted paths move to where the committed sequence continues, and nothing else changes."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specdec_kernels as sk
from specdec_kernels import kv

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.float64,
)


def i32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def raw(tensor):
    """Bit patterns: NaN equals NaN, and fp8 can be compared."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def random_cache(shape, dtype=torch.float32, device="cpu", generator=None):
    numbers = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return numbers.view(dtype)[..., 0].to(device)


def slot_view(cache, block_table, b, slot):
    """[Hkv, D] view of one logical slot, None where there is none."""
    if block_table is None:
        return cache[b, :, slot] if 0 <= slot < cache.shape[2] else None
    logical, inner = divmod(slot, cache.shape[1])
    if not 0 <= logical < block_table.shape[1]:
        return None
    block = int(block_table[b, logical])
    return cache[block, inner] if 0 <= block < cache.shape[0] else None


def move_slot_by_slot(caches, nodes, prefix_lens, block_table=None):
    """The definition, one slot at a time; returns new caches."""
    moved = [cache.clone() for cache in caches]
    for cache in moved:
        for b, path in enumerate(nodes.tolist()):
            for j, node in enumerate(path):
                if node < 0:
                    break
                source = slot_view(raw(cache), block_table, b, int(prefix_lens[b]) + node)
                target = slot_view(raw(cache), block_table, b, int(prefix_lens[b]) + j)
                if j and source is not None and target is not None:
                    target.copy_(source)
    return moved


def check(caches, nodes, prefix_lens, block_table=None, **options):
    table = None if block_table is None else block_table.cpu()
    wanted = move_slot_by_slot([c.cpu() for c in caches], nodes.cpu(), prefix_lens.cpu(), table)
    assert sk.compact_kv_(caches, nodes, prefix_lens, block_table=block_table, **options) is None
    for got, want in zip(caches, wanted, strict=True):
        assert torch.equal(raw(got.cpu()), raw(want))


# What serves without being asked, compiled where there is something compiled, and the reference.
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(None, id="fastest", marks=pytest.mark.native), "reference"]
)
PATHS = [[0, 1, 2, 3], [0, 2, 5, 6], [0, 7, -1, -1], [0, -1, -1, -1], [-1, -1, -1, -1], [0, 1, 4, 7]]
PREFIX = [0, 3, 12, 5, 7, 8]


def paged(batch, blocks_each, spare, generator):
    order = torch.randperm(batch * blocks_each + spare, generator=generator)
    return order[: batch * blocks_each].reshape(batch, blocks_each).to(torch.int32)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_moves(device, dtype, layout, backend):
    generator = torch.Generator().manual_seed(1)
    batch, table = len(PATHS), None
    if layout == "paged":
        table = paged(batch, 5, 3, generator)
    caches = [
        random_cache(
            (batch, heads, length, dim) if table is None else (batch * 5 + 3, 4, heads, dim), dtype, device, generator
        )
        for heads, length, dim in ((2, 20, 8), (2, 20, 8), (3, 24, 5), (1, 20, 64))
    ]
    check(caches, i32(PATHS, device), i32(PREFIX, device), None if table is None else table.to(device), backend=backend)


@each_backend
def test_layers_may_differ_in_dtype(device, backend):
    caches = [random_cache((2, 2, 12, 6), dtype, device) for dtype in DTYPES]
    check(caches, i32([[0, 2, 4], [0, 1, 3]], device), i32([2, 5], device), backend=backend)


@each_backend
@pytest.mark.parametrize("dim", [1, 3, 8])
def test_strides(device, dim, backend):
    """Slots before heads (as a projection leaves them), a view of a longer cache, a transposed last dimension."""
    made = random_cache((2, 9, 4, dim), torch.float32, device).transpose(1, 2)
    longer = random_cache((2, 4, 30, dim + 3), torch.bfloat16, device)[:, :, 4:13, 2 : dim + 2]
    turned = random_cache((2, 4, dim, 9), torch.int8, device).transpose(2, 3)
    whole = longer._base if longer._base is not None else longer
    before = whole.clone()
    check([made, longer, turned], i32([[0, 2, 3], [0, 1, 5]], device), i32([1, 3], device), backend=backend)
    whole[:, :, 4:13, 2 : dim + 2] = before[:, :, 4:13, 2 : dim + 2]
    assert torch.equal(raw(whole), raw(before)), "moved outside the view"


@each_backend
def test_overlapping_moves(device, backend):
    """Every source is itself a target: node j+1 goes to j, and a path shifts by one along the whole tree."""
    cache = torch.arange(40.0, device=device).reshape(1, 1, 40, 1)
    nodes = i32([[0, *range(2, 30)]], device)
    sk.compact_kv_([cache], nodes, i32([3], device), backend=backend)
    assert cache.flatten().tolist() == [0, 1, 2, 3, *range(5, 33), 32, 33, 34, 35, 36, 37, 38, 39]


@each_backend
def test_slots_out_of_range_are_passed_over(device, backend):
    nodes, prefix = i32([[0, 2, 3, 5], [0, 3, 4, 5], [0, 2, -1, 7]], device), i32([5, -2, 2**31 - 1], device)
    check([random_cache((3, 2, 9, 4), device=device)], nodes, prefix, backend=backend)
    table = i32([[0, 1, 9], [3, -1, 2], [4, 5, 6]], device)
    check([random_cache((7, 3, 2, 4), device=device)], nodes, prefix, table, backend=backend)


@each_backend
@pytest.mark.parametrize("shape", [(0, 2, 9, 4), (2, 0, 9, 4), (2, 2, 0, 4), (2, 2, 9, 0)])
def test_empty(device, shape, backend):
    batch = shape[0]
    nodes = i32([[0, 2, 3]] * batch, device).reshape(batch, 3)
    sk.compact_kv_([random_cache(shape, device=device)], nodes, i32([0] * batch, device), backend=backend)
    sk.compact_kv_([], nodes, i32([0] * batch, device), backend=backend)
    table = i32([[0]] * batch, device).reshape(batch, 1)
    sk.compact_kv_(
        [random_cache(shape, device=device)], nodes, i32([0] * batch, device), block_table=table, backend=backend
    )
    sk.compact_kv_(
        [random_cache((5, 3, 1, 2))[:0].to(device)],
        nodes,
        i32([0] * batch, device),
        block_table=table[:, :0],
        backend=backend,
    )


@each_backend
def test_paths_of_no_nodes(device, backend):
    cache = random_cache((2, 1, 6, 2), device=device)
    check([cache], i32([[], []], device).reshape(2, 0), i32([1, 2], device), backend=backend)


@each_backend
def test_strided_indices(device, backend):
    nodes = i32([[0, 9, 2, 9, 4, 9], [0, 9, 3, 9, -1, 9]], device)[:, ::2]
    prefix = i32([1, 9, 2, 9], device)[::2]
    check([random_cache((2, 2, 12, 4), device=device)], nodes, prefix, backend=backend)


@each_backend
def test_more_layers_than_one_launch_holds(device, backend):
    caches = [random_cache((1, 1, 6, 1 + i % 11), torch.int8, device) for i in range(500)]
    check(caches, i32([[0, 2, 4]], device), i32([1], device), backend=backend)


@each_backend
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random(backend, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    rows = []
    for _ in range(batch):
        path = sorted(data.draw(st.sets(st.integers(1, 20), max_size=width - 1)))
        rows.append(([0, *path] + [-1] * width)[:width])
    prefix = i32([data.draw(st.integers(0, 12)) for _ in range(batch)])
    heads, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    if data.draw(st.booleans()):
        table = paged(batch, 8, 2, generator)
        check(
            [random_cache((batch * 8 + 2, 4, heads, size), generator=generator)],
            i32(rows),
            prefix,
            table,
            backend=backend,
        )
    else:
        check([random_cache((batch, heads, 32, size), generator=generator)], i32(rows), prefix, backend=backend)


CACHE = torch.zeros(2, 1, 8, 4)
NODES, LENS = i32([[0, 2], [0, 1]]), i32([1, 2])


@pytest.mark.parametrize(
    "error, message, caches, nodes, lens, table",
    [
        (TypeError, "caches: expected a sequence of tensors, got Tensor", CACHE, NODES, LENS, None),
        (TypeError, r"caches\[1\]: expected a tensor, got str", [CACHE, "x"], NODES, LENS, None),
        (ValueError, r"caches\[1\]: expected shape \[B=2, Hkv, L, D\], got \[3, 1, 8, 4\]",
         [CACHE, torch.zeros(3, 1, 8, 4)], NODES, LENS, None),
        (ValueError, r"caches\[0\]: expected shape \[B, Hkv, L, D\], got \[8, 4\]",
         [CACHE[0, 0]], NODES, LENS, None),
        (TypeError, "nodes: expected dtype int32, got int64", [CACHE], NODES.long(), LENS, None),
        (ValueError, r"nodes: expected shape \[B, P\], got \[2\]", [CACHE], NODES[0], LENS, None),
        (ValueError, r"prefix_lens: expected shape \[B=2\], got \[1\]", [CACHE], NODES, LENS[:1], None),
        (TypeError, "prefix_lens: expected a tensor, got list", [CACHE], NODES, [1, 2], None),
        (TypeError, "block_table: expected dtype int32, got int64", [CACHE], NODES, LENS, NODES.long()),
        (ValueError, r"block_table: expected shape \[B=2, M\], got \[1, 2\]", [CACHE], NODES, LENS, NODES[:1]),
        (ValueError, r"caches\[0\]: expected device cpu, got meta", [CACHE.to("meta")], NODES, LENS, None),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, caches, nodes, lens, table):
    with pytest.raises(error, match=f"^(?:{message})"):
        sk.compact_kv_(caches, nodes, lens, block_table=table)


@pytest.mark.parametrize(
    "message, nodes, lens, table",
    [
        ("nodes: expected -1 behind the end of each path, got 3 at index 2", [[0, -1, 3]], [1], None),
        ("nodes: expected the root, 0, first, got 1 at index 0", [[1, 2, 3]], [1], None),
        ("nodes: expected nodes in ascending order, got 1 at index 1", [[0, 2, 1]], [1], None),
        ("prefix_lens: expected >= 0, got -1 at index 0", [[0, 1, -1]], [-1], None),
        (r"prefix_lens \+ nodes: expected slots in 0..7 of caches\[0\], got 9 at index 2", [[0, 2, 4]], [5], None),
        (r"block_table: expected blocks in 0..0 of caches\[0\], got 1 at index", [[0, 2, 4]], [0], [[0, 1]]),
    ],
)
def test_values_are_checked_on_request(monkeypatch, message, nodes, lens, table):
    monkeypatch.setattr(kv, "DEBUG", True)
    cache = torch.zeros(1, 1, 8, 4) if table is None else torch.zeros(1, 4, 1, 4)
    table = None if table is None else i32(table)
    with pytest.raises(ValueError, match=f"^{message}"):
        sk.compact_kv_([cache], i32(nodes), i32(lens), block_table=table)
    sk.compact_kv_([torch.zeros(1, 1, 8, 4)], i32([[0, 2, -1]]), i32([5]))


@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_opcheck(device, layout):
    table = i32([[0, 1], [2, 3]], device) if layout == "paged" else None
    shape = (2, 2, 8, 4) if table is None else (4, 4, 2, 4)
    caches = [random_cache(shape, device=device), random_cache(shape, torch.bfloat16, device)]
    op = torch.ops.specdec_kernels.compact_kv_
    for overload in (op.default, op.reference):
        torch.library.opcheck(overload, (caches, i32([[0, 2], [0, 1]], device), i32([1, 2], device), table))


def test_compiles_whole(device):
    def step(keys, values, nodes, lens):
        sk.compact_kv_([keys, values], nodes, lens)
        return keys.sum((1, 3)) + values.sum((1, 3))

    pair = [torch.randn(2, 2, 12, 4, device=device) for _ in range(2)]
    nodes, lens = i32([[0, 2, 5], [0, 3, -1]], device), i32([1, 4], device)
    expected_pair = [c.clone() for c in pair]
    expected = step(*expected_pair, nodes, lens)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*pair, nodes, lens)
    torch.testing.assert_close(got, expected)
    for left, right in zip(pair, expected_pair, strict=True):
        assert torch.equal(left, right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_graph():
    """Captured once, replayed with other paths: nothing is read by the host, nothing depends on data."""
    importlib.import_module("specdec_kernels._C_cuda")
    cache = random_cache((2, 4, 32, 64), torch.bfloat16, "cuda")
    nodes, lens = i32([[0, 2, 5], [0, 3, -1]], "cuda"), i32([1, 4], "cuda")
    saved = cache.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sk.compact_kv_([cache], nodes, lens, backend="cuda")
    for paths, prefix in (([[0, 2, 5], [0, 3, -1]], [1, 4]), ([[0, 4, -1], [0, 1, 2]], [20, 9])):
        cache.copy_(saved)
        nodes.copy_(i32(paths))
        lens.copy_(i32(prefix))
        graph.replay()
        (wanted,) = move_slot_by_slot([saved.cpu()], nodes.cpu(), lens.cpu())
        assert torch.equal(raw(cache.cpu()), raw(wanted))
