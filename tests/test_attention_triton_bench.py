"""The baselines of the attention benchmarks on a GPU compute what the op computes; they run anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def attention():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import bench_gpu_attention

        yield bench_gpu_attention


def test_baselines_compute_what_the_op_computes(attention):
    case = attention.step(2, 40, 16, "cpu")
    mask = attention.mask_of(case)
    assert mask[:, :40].all() and torch.equal(mask[:, 40:], case.in_tree()) and not case.in_tree().all()
    want = attention.op(case, backend="reference")()
    for baseline in (attention.sdpa, attention.sdpa_folded):
        assert (baseline(case, mask)() - want).abs().max() < 0.02
        assert (baseline(case, torch.ones_like(mask))() - want).abs().max() > 0.1


def test_pages_hold_the_same_step(attention):
    case = attention.step(2, 40, 16, "cpu")
    call = attention.paged(case)
    got = call.func(*call.args, **call.keywords | {"backend": "reference"})
    torch.testing.assert_close(got, attention.op(case, backend="reference")())
