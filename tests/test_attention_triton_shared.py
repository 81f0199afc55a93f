"""Prefix sharing on Triton: requests of a group read what they share once, and see what they would see alone."""

from __future__ import annotations

import random

import pytest
import torch

from attention_cases import NAN, Case
from attention_triton import check_reference, each_device, run
from specdec_kernels import SharedPrefix
from verify_backends import INTERPRETED

pytestmark = each_device

TREES = [[-1, 0, 0, 1], [-1], [-1, 0, 1, 2, 0, 0, 0, 0], [-1, 0, 0], [-1, 0]]
PREFIXES = [40, 3, 70, 50, 33]


def shared(groups, lens) -> SharedPrefix:
    return SharedPrefix(torch.tensor(groups, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32))


def hidden(case: Case, sharing: SharedPrefix) -> Case:
    """What a request shares need not be in its own rows of the caches: NaN there."""
    for b, (group, length) in enumerate(zip(*(x.tolist() for x in sharing), strict=True)):
        if group != b:
            case.keys[b, :, :length] = NAN
            case.values[b, :, :length] = NAN
    return case


CASES = {
    "all": ([2, 2, 2, 2, 2], [33, 3, 33, 33, 33]),
    "two groups and one alone": ([2, 1, 2, 4, 4], [40, 0, 40, 33, 33]),
    "lengths differ": ([2, 1, 2, 2, 2], [40, 0, 64, 50, 17]),
    "its first request is no member": ([2, 2, 2, 2, 2], [40, 0, 0, 40, 0]),
    "nobody with nobody": ([0, 2, 2, 3, 4], [40, 3, 70, 50, 33]),
}


@pytest.mark.parametrize(
    "name, window", [*((name, None) for name in CASES), ("all", 9), ("all", 45), ("lengths differ", 45)]
)
def test_groups(device, name, window):
    sharing = shared(*CASES[name])
    case = hidden(Case(TREES, PREFIXES, 2, 1, seed=1), sharing)
    check_reference(case, device, small=True, shared=sharing, window=window)


def test_paged_with_everything_on(device):
    sharing = shared(*CASES["two groups and one alone"])
    case = hidden(Case(TREES, PREFIXES, 4, 2, 16, 8, dtype=torch.float16, seed=2), sharing)
    options = {"softcap": 3.0, "sinks": torch.arange(4.0), "k_scale": 0.5, "v_scale": 2.0}
    check_reference(case, device, small=True, shared=sharing, **case.paged(8), **options)
    check_reference(case, device, shared=sharing, window=20, **case.paged(8))


def test_a_broken_request_breaks_no_other(device):
    """Slots that one request of a group shares and another does not are not read for both."""
    sharing = shared([0, 0, 0], [20, 40, 40])
    case = hidden(Case([[-1, 0], [-1], [-1, 0]], [60, 45, 50], 2, 1, seed=3), sharing)
    clean, _ = run(case, device, small=True, shared=sharing)
    case.keys[0, :, 25:30] = NAN  # requests 1 and 2 see them, request 0 does too as its own
    case.values[0, :, 25:30] = NAN
    case.keys[1, :, 41], case.values[1, :, 41] = NAN, NAN
    alone = shared([0, 0, 0], [20, 20, 20])
    case.prefix_lens = torch.tensor([22, 45, 50], dtype=torch.int32)
    got, _ = run(case, device, small=True, shared=sharing)
    assert got[:2].isfinite().all() and got[2:].isnan().all()
    case.keys[1:, :, :41], case.values[1:, :, :41] = 0.5, 0.5
    got, _ = run(case, device, small=True, shared=alone)
    assert got[2].isnan().all() and got[[0, 1, 3, 4]].isfinite().all() and clean.isfinite().all()


def test_shared_slots_are_read_once(device):
    """By what the kernels are told: a group's slots lie in the plan once, not once for each request."""
    if not INTERPRETED:
        pytest.skip("looks into a launch under the interpreter")
    from specdec_kernels.triton import attention, attention_plan

    found = {}
    plain = attention.Launch.run

    def watched(self):
        plain(self)
        found["shares"] = self.attend[0]["shares"].clone()

    attention.Launch.run = watched
    try:
        run(Case(TREES, PREFIXES, 2, 1), device, small=True, shared=shared(*CASES["two groups and one alone"]))
    finally:
        attention.Launch.run = plain
    count, low, high = (found["shares"][getattr(attention_plan, f).value].tolist() for f in ("COUNT", "LOW", "HIGH"))
    assert count == [0, 0, 12, 0, 5] and low == [0] * 5 and high == [0, 0, 40, 0, 33]
    holes = [found["shares"][getattr(attention_plan, f).value].tolist() for f in ("HOLE", "HOLE_END")]
    assert holes == [[0] * 5, [40, 0, 40, 33, 33]]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(40))
def test_random_groups(device, seed):
    draw = random.Random(seed)
    batch = draw.randint(2, 6)
    trees = [[-1, *(draw.randint(max(0, i - 3), i - 1) for i in range(1, draw.randint(1, 20)))] for _ in range(batch)]
    prefixes = [draw.randint(0, 90) for _ in range(batch)]
    groups = [draw.randint(-1, batch) for _ in range(batch)]
    least = min(prefixes)
    lens = [draw.choice([0, least, least, draw.randint(0, p)]) for p in prefixes]
    # The owner's slots up to there must exist and be sound.
    lens = [min(n, prefixes[g]) if 0 <= g < batch else n for n, g in zip(lens, groups, strict=True)]
    case = Case(trees, prefixes, 4, 2, seed=seed)
    window = draw.choice([None, 5, 40])
    caches = case.paged(8) if seed % 2 else {}
    check_reference(case, device, small=seed % 3 > 0, shared=shared(groups, lens), window=window, **caches)
