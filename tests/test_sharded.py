"""Sharded heads over gloo: 2 and 4 processes answer what one does that holds all rows, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import sharded_ranks
import specdec_kernels as sk
from head_cases import TOLERANCE, inputs
from specdec_kernels.types import HeadPart

RANKS = 4
CASES = sharded_ranks.cases()
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each rank returned for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    # Processes without this one's threads, which import torch once for all of them.
    method = "forkserver"
    multiprocessing.get_context(method).set_forkserver_preload(["torch", "torch.distributed", "pytest"])
    arguments = (RANKS, str(folder / "store"), str(folder))
    multiprocessing.start_processes(sharded_ranks.run, arguments, nprocs=RANKS, start_method=method)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def one_part(case) -> tuple:
    """The answer of one rank that holds all rows."""
    options = dict(case.by_row) | case.rest
    part = sk.head_part(case.hidden, case.weight, case.k, token_ids=case.ids, backend=case.backend, **options)
    return sk.merge_head_parts(HeadPart(*(values[None] for values in part)))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_answer_as_one(answers, name, size):
    case = CASES[name]
    want = one_part(case)
    whole = case.call(1, 0, None)
    for rank in range(RANKS):
        got = answers[rank][f"{name}, {size} ranks"]
        for field, a, b, c in zip(sk.HeadTopK._fields, got, want, whole, strict=False):
            assert torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7)), (rank, field)
            assert a.dtype == c.dtype and a.shape == c.shape
            if case.backend == "cpu" or field in ("logits", "tokens"):
                assert torch.equal(a.nan_to_num(nan=7e7), c.nan_to_num(nan=7e7)), (rank, field)
            else:
                torch.testing.assert_close(a, c, **TOLERANCE, equal_nan=True)


def test_default_group_and_strangers(answers):
    want = CASES[f"{sharded_ranks.served()[0]} ties"].call(1, 0, None)
    for answer in answers:
        assert torch.equal(answer["default group"][1], want[1])
        assert answer["stranger"] == "group: expected a process group that this rank is a member of"


def test_the_cases_are_what_they_say():
    """Ties across shards, draws that differ from the best tokens, a shard of nothing: else the test says little."""
    for backend in sharded_ranks.served():
        ties = CASES[f"{backend} ties"].call(1, 0, None)
        assert all((row.unique(return_counts=True)[1] > 5).any() for row in ties[0])
        assert all(row.max() > 611 and row.min() < 150 for row in ties[1])
        drawn = CASES[f"{backend} float32 B=6 draws"]
        assert not torch.equal(drawn.call(1, 0, None)[1], drawn._replace(rest={}).call(1, 0, None)[1])
        broken = CASES[f"{backend} one broken request"].call(1, 0, None)
        assert broken[2].isnan().tolist() == [False, False, True, False]
        assert (CASES[f"{backend} nothing"].call(1, 0, None)[2] == -float("inf")).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"first_row: expected it \(a shard of consecutive rows\) or token_ids, got neither"),
        ({"first_row": 0, "token_ids": torch.arange(9, dtype=torch.int32)}, ValueError, "got both"),
        ({"first_row": -1}, ValueError, "first_row: expected in 0.."),
        ({"first_row": 2**31 - 8}, ValueError, "first_row: expected in 0..2147483639"),
        ({"first_row": 0, "k": 65}, ValueError, "k: expected in 1..64, got 65"),
        ({"token_ids": torch.arange(8, dtype=torch.int32)}, ValueError, r"token_ids: expected shape \[V=9\]"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, error, message):
    hidden, weight = inputs(2, 9, 8)
    with pytest.raises(ValueError, match=r"group: expected a process group, or torch\.distributed to be initialised"):
        sk.sharded_head_topk(hidden, weight, first_row=0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(error, match=message):
            sk.sharded_head_topk(hidden, weight, **options)
        with pytest.raises(TypeError, match="rng: expected a Philox, got NoneType"):
            sk.sharded_head_sample(hidden, weight, rng=None, first_row=0)
        alone = sk.sharded_head_topk(hidden, weight, 3, first_row=4, backend="reference")
        assert torch.equal(alone.tokens, sk.head_topk(hidden, weight, 3, backend="reference").tokens + 4)
        assert alone.all_logits is None
    finally:
        dist.destroy_process_group()
