"""Every backend of verification against the reference: the same walks, but for decisions that fp32 cannot tell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tree_cases import COUNTED, FORM_IDS, FORMS, JUDGED, LENIENT, NEEDS_Q, Spec, fits, random_case
from verify_backends import INTERPRETED, every_backend, run
from verify_margins import assert_same_walks

pytestmark = every_backend("cpu", "triton", "cuda", cpu=pytest.mark.native, cuda=pytest.mark.gpu)


def check(spec: Spec, backend: str, shapes=None) -> int:
    """Returns how many requests differ."""
    case = random_case(spec, shapes)
    return assert_same_walks(case, run(case, backend), case.run("reference"), backend)


FILTERS = ("", "k", "p", "m", "kpm", "K", "P", "M", "kP", "KPM")
OPTIONS = {
    "plain": {},
    "far": {"distance": 3.0},
    "equal": {"distance": 0.0},
    "ties": {"ties": True},
    "zeros": {"zeros": True},
    "gaps": {"gaps": True, "roomy": True},
    "trimmed": {"trimmed": 9},
    "trimmed_to_one": {"trimmed": 1},
    "masked": {"masked": True, "trimmed": 20, "zeros": True},
    "mixed": {"temperature": "mixed"},
    "greedy": {"temperature": 0.0, "ties": True, "trimmed": 12},
    "cold": {"temperature": 0.05},
    "tiny": {"temperature": 1e-30, "ties": True},
    "filters": {"filters": "kpm", "draft_filters": "k"},
    "filters_of_requests": {"filters": "KPM", "draft_filters": "P", "temperature": "mixed"},
    "explicit": {"explicit": True, "strided": True},
    "everything": {
        "trimmed": 12, "masked": True, "gaps": True, "explicit": True, "strided": True, "filters": "P",
        "draft_filters": "k", "temperature": "mixed", "zeros": True,
    },
    "point_mass": {"point_mass": True, "masked": True, "gaps": True},
    "point_mass_filters": {"point_mass": True, "filters": "kp", "temperature": "mixed"},
    "counts": {"counts": True},
    "counts_explicit": {"counts": True, "explicit": True, "vocabulary": 5, "nodes": 14},
    "judge": {"lossy": "judge"},
    "lenience": {"lossy": "lenience"},
    "judge_lenience_reflect": {"lossy": "judge lenience reflect"},
    "reflect": {"lossy": "reflect", "masked": True, "filters": "kp", "strided": True},
    "synthetic": {"lossy": "synthetic", "gaps": True, "filters": "p"},
}  # fmt: skip


FITTING = [
    pytest.param(method, chain, name, id=f"{form}-{name}")
    for (method, chain), form in zip(FORMS, FORM_IDS, strict=True)
    for name, options in OPTIONS.items()
    if fits(Spec(method, chain, 0, **options))
]


@pytest.mark.parametrize(("method", "chain", "name"), FITTING)
def test_every_method_with_every_option(backend, method, chain, name):
    dtype = [torch.float32, torch.bfloat16, torch.float16][len(name) % 3]
    check(Spec(method, chain, len(name), **{"dtype": dtype, **OPTIONS[name]}), backend)


@st.composite
def specs(draw) -> Spec:
    method, chain = draw(st.sampled_from(FORMS))
    flag = st.booleans()
    rare = st.integers(0, 4).map(lambda x: x == 0)
    sizes = [2, 3, 5, 16, 33, 64, 111, 600, 4500]
    # The interpreter takes a second for what a kernel does in microseconds.
    most, nodes, vocabulary = (2, [1, 2, 5], sizes[:-1]) if INTERPRETED else (6, [1, 2, 5, 9, 14], sizes)
    vocabulary = draw(st.sampled_from(vocabulary))
    lossy = ["", "", "", "", "", "reflect", "synthetic"]
    lossy += ["judge", "judge reflect"] * (method in JUDGED)
    lossy += ["lenience", "judge lenience"] * (method in LENIENT)
    point_mass = method not in NEEDS_Q and draw(rare)
    return Spec(
        method, chain, draw(st.integers(0, 2**31)), draw(st.integers(0, most)), draw(st.sampled_from(nodes)),
        vocabulary, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        distance=draw(st.sampled_from([0.0, 0.3, 0.6, 2.0])), ties=draw(rare), zeros=draw(rare), gaps=draw(rare),
        trimmed=draw(st.none() | st.integers(1, vocabulary)), point_mass=point_mass, masked=draw(rare),
        temperature=draw(st.sampled_from([1.0, 0.7, 1.5, 0.05, 0.0, "mixed"])),
        filters=draw(st.sampled_from(FILTERS)), draft_filters=draw(st.sampled_from(("", "", *FILTERS))),
        counts=method in COUNTED and not point_mass and draw(flag), explicit=draw(flag), strided=draw(rare),
        roomy=draw(flag), lossy=draw(st.sampled_from(lossy)),
    )  # fmt: skip


def check_random_cases(backend: str, number: int) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    requests, differ = [], []

    @settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)
    @given(spec=specs())
    def each(spec):
        requests.append(spec.batch)
        differ.append(check(spec, backend))

    each()
    assert sum(requests) > number / 2
    assert sum(differ) <= 0.005 * sum(requests), "too many decisions are as near as that to their thresholds"


def test_random_cases(backend):
    check_random_cases(backend, 20 if INTERPRETED else 150)


@pytest.mark.full
def test_thousands_of_random_cases(backend):
    check_random_cases(backend, 2000)


@pytest.mark.parametrize(("method", "chain"), FORMS, ids=FORM_IDS)
def test_nothing_drafted_and_nobody_there(backend, method, chain):
    for batch in (0, 3):
        check(Spec(method, chain, 5, batch, 1, roomy=True), backend)


@pytest.mark.parametrize("vocabulary", [1, 2, 511, 513, 4095, 4097, 8200])
@pytest.mark.parametrize(("method", "chain"), [("block", True), ("without_replacement", False), ("k_seq", False)])
def test_awkward_sizes(backend, method, chain, vocabulary):
    half = max(vocabulary // 2, 1)
    options = {} if vocabulary < 3 else {"masked": True, "filters": "kp"}
    check(Spec(method, chain, 7, 4, 6, vocabulary, trimmed=half, **options), backend)


@pytest.mark.parametrize("method", [m for m, chain in FORMS if not chain])
def test_wide_and_deep_trees(backend, method):
    """64 siblings below a root, 64 levels, a bush of 300 nodes."""
    for seed, shape in enumerate(([-1] + [0] * 64, list(range(-1, 64)), [-1] + [i // 3 for i in range(299)])):
        spec = Spec(method, False, seed, 2, len(shape), 128, distance=0.3)
        check(spec, backend, [shape, shape])
