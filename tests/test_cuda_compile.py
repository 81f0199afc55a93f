"""CUDA C++ where there is no GPU: it compiles for every architecture, and its addresses are right when run by loops."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from test_kv import DTYPES, PATHS, PREFIX, i32, move_slot_by_slot, paged, random_cache, raw

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("80", "90", "100")
SOURCES = [
    pytest.param(path, marks=[pytest.mark.full] if path.name in ("head_quantised.cu", "head_plain.cu") else [])  # large
    for path in sorted((CSRC / "cuda").glob("*.cu"))
]


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on PATH, in CUDA_HOME, or among those that triton brings."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which(name) or (home and shutil.which(name, path=f"{home}/bin"))
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which(name, path=str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    return found


@pytest.mark.skipif(tool("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_cuda_torch(source, tmp_path):
    """Against the headers of whatever torch is installed, without USE_CUDA; no kernel may spill registers."""
    output = tmp_path / "kernels.o"
    includes = [f"-I{CSRC / 'include'}", "-isystem", str(Path(torch.__file__).parent / "include")]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command = [tool("nvcc"), "-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", "-Xcompiler=-fPIC", "-c", str(source)]
    done = subprocess.run([*command, *targets, *includes, *defines, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for arch in ARCHITECTURES:
        assert f"for 'sm_{arch}'" in done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), done.stderr
    if tool("cuobjdump") is None:
        return  # ptxas has named the architectures above
    listed = subprocess.run([tool("cuobjdump"), "--list-elf", str(output)], capture_output=True, text=True, check=True)
    for arch in ARCHITECTURES:
        assert f"sm_{arch}" in listed.stdout


@pytest.mark.skipif(tool("nvcc") is None or tool("cuobjdump") is None, reason="no nvcc and cuobjdump on this machine")
def test_rows_move_in_16_byte_vectors(tmp_path):
    output = tmp_path / "kv.cubin"
    includes = [f"-I{CSRC / 'include'}", "-isystem", str(Path(torch.__file__).parent / "include")]
    command = [tool("nvcc"), "-std=c++17", "-O3", "-cubin", "-arch=sm_90", str(CSRC / "cuda" / "kv.cu")]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    subprocess.run([*command, *includes, *defines, "-o", str(output)], check=True)
    sass = subprocess.run([tool("cuobjdump"), "-sass", str(output)], capture_output=True, text=True, check=True).stdout
    assert "LDG.E.128" in sass and "STG.E.128" in sass


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """compact_kv_ by the device code, compiled for the host; returns (launches, vector widths)."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    library = tmp_path_factory.mktemp("kv") / "kv_host.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
        f"-I{CSRC / 'include'}",
    ]
    subprocess.run([compiler, *flags, str(ROOT / "tests" / "kv_host.cpp"), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).compact_kv_on_host

    def run(caches, nodes, prefix_lens, block_table=None):
        def longs(rows):
            flat = [value for row in rows for value in row]
            return (ctypes.c_int64 * len(flat))(*flat)

        widths = (ctypes.c_int * len(caches))()
        table = block_table
        launches = function(
            len(caches),
            (ctypes.c_void_p * len(caches))(*(cache.data_ptr() for cache in caches)),
            longs(cache.shape for cache in caches),
            longs(cache.stride() for cache in caches),
            longs([[cache.element_size() for cache in caches]]),
            ctypes.c_void_p(nodes.contiguous().data_ptr()),
            *nodes.shape,
            ctypes.c_void_p(prefix_lens.data_ptr()),
            None if table is None else ctypes.c_void_p(table.data_ptr()),
            0 if table is None else table.shape[1],
            widths,
        )
        return launches, list(widths)

    return run


def agree(on_host, caches, nodes, prefix_lens, table=None):
    wanted = move_slot_by_slot(caches, nodes, prefix_lens, table)
    result = on_host(caches, nodes, prefix_lens, table)
    for got, want in zip(caches, wanted, strict=True):
        assert torch.equal(raw(got), raw(want))
    return result


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_columns_move_like_slots(on_host, dtype, layout):
    generator = torch.Generator().manual_seed(2)
    batch = len(PATHS)
    table = paged(batch, 5, 3, generator) if layout == "paged" else None
    caches = [
        random_cache(
            (batch, heads, 20, dim) if table is None else (batch * 5 + 3, 4, heads, dim), dtype, "cpu", generator
        )
        for heads, dim in ((2, 64), (3, 5), (1, 1), (2, 6))
    ]
    launches, widths = agree(on_host, caches, i32(PATHS), i32(PREFIX), table)
    assert launches == 1
    assert widths[0] == 16 and widths[1] == dtype.itemsize


def test_long_overlapping_paths(on_host):
    nodes = i32([[0, *range(2, 30)], [0, 1, 2, *range(6, 32)]])
    agree(on_host, [random_cache((2, 2, 40, 8))], nodes, i32([3, 5]))


def test_vector_widths(on_host):
    """The widest that base, row and strides allow; strides of dimensions of size 1 do not count."""
    nodes, prefix = i32([[0, 2, 3], [0, 1, 5]]), i32([1, 3])
    flat = torch.empty(4096, dtype=torch.int8)
    aligned = flat[-flat.data_ptr() % 16 :]
    views = {
        16: aligned[: 2 * 2 * 9 * 32].view(2, 2, 9, 32),
        8: aligned[8 : 8 + 2 * 2 * 9 * 32].view(2, 2, 9, 32),
        4: aligned[: 2 * 2 * 9 * 36].view(2, 2, 9, 36)[..., :32],
        1: aligned[: 2 * 2 * 32 * 9].view(2, 2, 32, 9).transpose(2, 3),
    }
    for width, view in views.items():
        view.copy_(random_cache(view.shape, torch.int8))
        assert agree(on_host, [view], nodes, prefix) == (1, [width])
    lone = aligned[: 9 * 32].view(1, 1, 9, 32).as_strided((1, 1, 9, 32), (3, 5, 32, 1))
    assert agree(on_host, [lone], nodes[:1], prefix[:1]) == (1, [16])


def test_launches_hold_what_they_can(on_host):
    nodes, prefix = i32([[0, 2, 4]]), i32([1])
    same = [random_cache((1, 1, 6, 4)) for _ in range(384)]
    assert agree(on_host, same, nodes, prefix)[0] == 1
    assert agree(on_host, [*same, same[0].clone()], nodes, prefix)[0] == 2
    eight = [random_cache((1, 1, 6 + i, 4)) for i in range(8)]
    assert agree(on_host, [*eight, *same[:3]], nodes, prefix)[0] == 1
    assert agree(on_host, [*eight, random_cache((1, 1, 20, 4))], nodes, prefix)[0] == 2


def test_slots_out_of_range(on_host):
    nodes, prefix = i32([[0, 2, 3, 5], [0, 3, 4, 5], [0, 2, -1, 7]]), i32([5, -2, 2**31 - 1])
    agree(on_host, [random_cache((3, 2, 9, 4))], nodes, prefix)
    agree(on_host, [random_cache((7, 3, 2, 4))], nodes, prefix, i32([[0, 1, 9], [3, -1, 2], [4, 5, 6]]))


def test_distant_slots(on_host):
    """Offsets pass 2^31 bytes; the buffer is never touched between them."""
    stride = 2**31 // 5 + 16
    buffer = torch.empty(8 * stride, dtype=torch.int8)
    far = buffer.as_strided((1, 1, 8, 16), (0, 0, stride, 1))
    near = random_cache((1, 1, 8, 16), torch.int8)
    far.copy_(near)
    on_host([far], i32([[0, 3, 6]]), i32([1]))
    (wanted,) = move_slot_by_slot([near], i32([[0, 3, 6]]), i32([1]))
    assert torch.equal(far, wanted)
