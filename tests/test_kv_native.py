"""compact_kv_ on the CPU at the sizes of a model: all threads, far addresses, no memory besides the caches."""

from __future__ import annotations

import os

import pytest
import torch

import specdec_kernels as sk
from malloc_peak import peak, peaks_of, report
from specdec_kernels import backends
from test_kv import check, i32, move_slot_by_slot, paged, random_cache, raw

MISSING = backends.MISSING["cpu"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture
def threads():
    """More than one, whatever a test before has left."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, os.cpu_count() or 1))
    yield
    torch.set_num_threads(before)


@pytest.mark.native
@pytest.mark.parametrize("layout", ["dense", "slots first", "paged"])
def test_all_threads(threads, layout):
    """Rows of many lines, paths that are longer than what is held at a time, every source a target."""
    generator = torch.Generator().manual_seed(0)
    batch, length, table = 6, 128, None
    shape = (batch, 4, length, 96)
    if layout == "paged":
        table, shape = paged(batch, length // 16, 5, generator), (batch * length // 16 + 5, 16, 4, 96)
    caches = [random_cache(shape, torch.bfloat16, "cpu", generator) for _ in range(6)]
    if layout == "slots first":
        caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    nodes = torch.full((batch, 80), -1, dtype=torch.int32)
    for b in range(batch):
        steps = torch.randperm(89, generator=generator)[: 79 - 13 * b].sort().values + 1
        nodes[b, : len(steps) + 1] = torch.cat([torch.zeros(1, dtype=torch.int64), steps]).to(torch.int32)
    check(caches, nodes, i32([7 * b for b in range(batch)]), table, backend="cpu")


@pytest.mark.parametrize("itemsize", [1, 16])
def test_distant_slots(itemsize):
    """Offsets pass 2^31 bytes; the buffer is never touched between them."""
    stride = (2**31 // 5 + 16) // itemsize
    dtype = {1: torch.int8, 16: torch.complex128}[itemsize]
    far = torch.empty(8 * stride, dtype=dtype).as_strided((1, 1, 8, 16), (0, 0, stride, 1))
    near = random_cache((1, 1, 8, 16 * itemsize), torch.int8)
    far.copy_(near.view(dtype))
    sk.compact_kv_([far], i32([[0, 3, 6]]), i32([1]), backend="cpu")
    (wanted,) = move_slot_by_slot([near], i32([[0, 3, 6]]), i32([1]))
    assert torch.equal(raw(far.contiguous().view(torch.int8)), raw(wanted))


def test_the_op_checks_what_keeps_it_in_bounds():
    op = torch.ops.specdec_kernels.compact_kv_.default
    good = ([torch.zeros(2, 1, 8, 4)], i32([[0, 2], [0, 1]]), i32([1, 2]), None)
    op(*good)
    for place, value, message in (
        (0, [torch.zeros(3, 1, 8, 4)], "caches: expected B = 2"),
        (0, [torch.zeros(2, 8, 4)], "caches: expected 4 dimensions"),
        (1, i32([0, 2]), "nodes: expected 2 dimensions"),
        (1, i32([[0, 2], [0, 1]]).long(), "nodes: expected int32"),
        (2, i32([1]), "prefix_lens: expected 1 dimensions, B = 2"),
        (3, i32([[0]]), "block_table: expected 2 dimensions, B = 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*good[:place], value, *good[place + 1 :])


def measure() -> dict[str, int]:
    """Peak bytes of a call of each backend on a model's caches beyond what was in use before it."""
    caches = [torch.zeros(2, 8, 96, 128, dtype=torch.bfloat16) for _ in range(64)]
    nodes, lens = i32(([0, *range(3, 40)], [0, *range(9, 46)])), i32([5, 40])
    return {
        backend: peak(lambda backend=backend: sk.compact_kv_(caches, nodes, lens, backend=backend))[0]
        for backend in ("reference", "cpu")
    }


def test_nothing_is_gathered(tmp_path):
    peaks = peaks_of(__file__, tmp_path)
    assert peaks["reference"] > 37 * 2 * 8 * 128 * 2, "the counter sees what the reference gathers"
    assert peaks["cpu"] < 64 * 256, "a few numbers for each cache"


if __name__ == "__main__":
    report(measure)
