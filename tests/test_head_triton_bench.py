"""The baselines of the head's GPU benchmarks find what the ops find; they run anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import specdec_kernels as sk

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def head():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import bench_gpu_head

        yield bench_gpu_head


def test_baselines_find_what_the_ops_find(head):
    x = head.vectors(5, 64, "cpu", torch.float32)
    (weight,) = head.weights(700, 64, "cpu", torch.float32)
    lists = head.shortlists(5, "cpu", 700, 300)
    assert all(len(set(row)) == 300 for row in lists.tolist()) and not torch.equal(lists[0], lists[1])
    for options, (tokens, logprobs) in [
        ({}, head.linear(x, weight)),
        ({"rows": lists[0]}, head.linear(x, weight[lists[0].long()], lists[0])),
        ({"rows": lists}, head.gathered(x, weight, lists)),
    ]:
        found = sk.head_topk(x, weight, head.K, backend="reference", **options)
        assert torch.equal(found.tokens.long(), tokens.long()) and head.agrees(found, (tokens, logprobs))
        torch.testing.assert_close(found.logits - found.lse[:, None], logprobs)
    assert not head.agrees(found, (tokens.roll(1, 0), logprobs))
