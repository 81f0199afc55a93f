"""The head's CUDA code on the host under sanitisers, and with mistakes in it, which tests must find."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import cuda_head
import test_cuda_head
import test_cuda_head_weights
import test_head
from cuda_head import quantised, same_bits
from head_cases import inputs
from test_cuda_compile import CSRC
from test_head import DTYPES, stream

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(cuda_head.compiler() is None, reason="no C++ compiler on this machine"),
]


def sanitised(folder: Path, name: str, **options) -> Path:
    try:
        return cuda_head.build(folder, name, **options)
    except subprocess.CalledProcessError as error:
        if "-c" in error.cmd:
            raise
        pytest.skip(f"nothing to link with -fsanitize={name}")


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def watched(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    return cuda_head.Program(sanitised(folder, request.param), folder)


@pytest.mark.parametrize("kind", ["plain", "int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_race_and_no_access_out_of_bounds(watched, head_library, dtype, kind):
    host = cuda_head.Host(head_library)
    batch, height, dim, k = (2, 77, 61, 4) if dtype == torch.float16 else (9, 90, 140, 33)
    hidden, weight = inputs(batch, height, dim, dtype)
    values, scales = (weight, torch.rand(height)) if kind == "plain" else quantised(weight, kind)[:2]
    lists = torch.randint(-3, height + 3, (3, 70), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    groups = torch.arange(batch, dtype=torch.int32) // 5
    bias = torch.randn(height, generator=torch.Generator().manual_seed(4))
    for rows in ((None, None), (lists, groups)):
        arguments = (hidden, values, k, *stream(batch), *rows, None, bias, scales, 0.7, torch.ones(batch))
        same_bits(watched.head_sample(*arguments, True), host.head_sample(*arguments, True))
    same_bits(watched.head_part(*arguments), host.head_part(*arguments))


# What is put where in the device code, and a test that must fail then.
MISTAKES = {
    "a slice is left out": [("keeper", "i < kSlices; ++i", "i < kSlices - 1; ++i")],
    "columns are packed as they come": [("formats", "i / 2 * 8 + t * 2 + i % 2", "i * 4 + t")],
    "a list is cut without its ids": [("best", "name < id[i] ||", "false ||")],
    "nothing reaches the list": [("best", "key - fabs(key) * 0x1p-20", "key + fabs(key)")],
    "noise has another bound": [("best", "kMostNoise = 22.875f", "kMostNoise = 2.0f")],
    "sums do not move": [("best", "if (whole > s.anchor) move(s, whole);", "if (whole > s.anchor) s.anchor = whole;")],
    "the second list is the first": [("runs", "launch.rows + list * launch.rows_stride", "launch.rows")],
    "unknown rows are others": [("runs", "row >= launch.height ? -1 : row", "row >= launch.height ? 0 : row")],
    "merging ends with the first": [("merge", "if (!any) break;", "if (!any || depth == 0) break;")],
}
RACES = {
    "tiles do not take turns": [("loader", "(tile % 2 * kSlices + slice)", "(tile * 0 + slice)")],
    "facts do not take turns": [("keeper", "tile % 2 * launch_.tile_rows()", "tile * 0")],
    "hidden vectors are read too soon": [("scan", "shared);\n  __syncthreads();\n  int tile", "shared);\n  int tile")],
}


def with_mistakes(folder: Path, mistakes) -> Path:
    kernels = folder / "kernels"
    shutil.copytree(CSRC / "cuda", kernels)
    for file, right, wrong in mistakes:
        source = kernels / f"head_{file}.cuh"
        text = source.read_text()
        assert right in text
        source.write_text(text.replace(right, wrong))
    return kernels


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(tmp_path, mistake):
    host = cuda_head.Host(cuda_head.build(tmp_path, kernels=with_mistakes(tmp_path, MISTAKES[mistake])))
    checks = [
        lambda: test_head.test_topk_and_sample_match_float64("cuda", (7, 1000, 300), torch.bfloat16),
        lambda: test_head.test_ties_go_to_the_lowest_target_id("cuda", 8),
        lambda: test_head.test_rows_that_do_not_exist_have_no_probability("cuda"),
        lambda: test_cuda_head.test_groups_of_rows(host, 9),
        lambda: test_cuda_head_weights.test_quantised_weights(host, "int8", torch.bfloat16),
        lambda: test_cuda_head.test_many_good_candidates(host, 64),
        lambda: test_cuda_head.test_noise_alone_decides(host),
    ]
    failed = 0
    with host.instead():
        for check in checks:
            try:
                check()
            except (AssertionError, KeyError):  # a token that is none
                failed += 1
    assert failed > 0


@pytest.mark.parametrize("mistake", RACES)
def test_races_are_found(tmp_path, mistake):
    program = sanitised(tmp_path, "thread", kernels=with_mistakes(tmp_path, RACES[mistake]))
    hidden, weight = inputs(2, 77, 61)
    with pytest.raises(AssertionError, match="data race"):
        cuda_head.Program(program, tmp_path).head_topk(hidden, weight, 4, *[None] * 5, 1.0, None, False)
