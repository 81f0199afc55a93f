"""Verification's CUDA code where there is no GPU: the device code itself, run by fibers on the host (cuda_host.h).

Same walks as the reference, the same bits whatever the number of threads, no race and no access out of bounds. What
only a GPU can tell, that nvcc compiles the same and how fast it is, is left to test_cuda_compile.py and the GPU tests.
"""

from __future__ import annotations

import shutil
import subprocess
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cuda_verify
import specdec_kernels as sk
from test_verify_equal import OPTIONS, specs
from tree_cases import FORM_IDS, FORMS, Spec, fits, random_case
from verify_backends import assert_same_bits, of
from verify_margins import assert_same_walks

pytestmark = pytest.mark.skipif(cuda_verify.compiler() is None, reason="no C++ compiler on this machine")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_form = pytest.mark.parametrize(("method", "chain"), FORMS, ids=FORM_IDS)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_verify.build(tmp_path_factory.mktemp("cuda_verify"))


@pytest.fixture(scope="module")
def host(library):
    return cuda_verify.Host(library)


def check(host, case) -> int:
    return assert_same_walks(case, host.run(case), case.run("reference"), "device code")


def combinations():
    """Every form with every option; each option meets some form outside the full tier as well."""
    for i, (method, chain) in enumerate(FORMS):
        for j, (name, options) in enumerate(OPTIONS.items()):
            if fits(Spec(method, chain, 0, **options)):
                marks = [] if (i + j) % 4 == 0 else [pytest.mark.full]
                yield pytest.param(method, chain, name, id=f"{FORM_IDS[i]}-{name}", marks=marks)


@pytest.mark.parametrize(("method", "chain", "name"), list(combinations()))
def test_every_method_with_every_option(host, method, chain, name):
    dtype = DTYPES[len(name) % 3]
    check(host, random_case(Spec(method, chain, len(name), **{"dtype": dtype, **OPTIONS[name]})))


@pytest.mark.full
def test_random_cases(host):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=1000, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)
    @given(specs(), st.integers(1, 3), st.integers(1, 3))
    def each(spec, team, readers):
        host.team, host.readers = team, readers
        check(host, random_case(spec))

    try:
        each()
    finally:
        host.team, host.readers = 2, 2


BLOCK = 1024
SIZES = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 8, 3 * BLOCK + 77)


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("trimmed", [False, True])
def test_sizes_around_blocks(host, vocabulary, trimmed):
    for i, (dtype, strided) in enumerate(product(DTYPES, (False, True))):
        method = ("without_replacement", "multi_round", "traversal")[i % 3]
        options = {"trimmed": max(1, vocabulary // 2)} if trimmed else {}
        check(host, random_case(Spec(method, False, i, 2, 5, vocabulary, dtype, strided=strided, **options)))


@each_form
def test_number_of_threads_changes_no_bit(library, method, chain):
    spec = Spec(method, chain, 3, 3, 6, 2 * BLOCK + 300, torch.bfloat16, filters="p", trimmed=700)
    case = random_case(spec)
    answers = [
        cuda_verify.Host(library, team=team, readers=readers).run(case)
        for team, readers in ((1, 1), (1, 6), (3, 1), (2, 3), (5, 2))
    ]
    for answer in answers[1:]:
        assert_same_bits(answer, answers[0])


@each_form
def test_neighbours_and_alignment_change_no_bit(host, method, chain):
    """A row of odd length starts at another offset from a multiple of 16 bytes in every place of a batch."""
    options = {"dtype": torch.bfloat16, "masked": True, "temperature": "mixed"}
    case = random_case(Spec(method, chain, 4, 4, 5, BLOCK + 101, **options))
    expected = host.run(case)
    for order in ([2, 0, 3, 1], [1], [3, 3]):
        assert_same_bits(host.run(case.select(order)), of(expected, order))


# A filter's cut shows in the first token that is left of a row that ascends: a coin of 0 draws it.
ROWS = {
    "peaked": lambda g, V: torch.randn(V, generator=g) * 2,
    "flat": lambda g, V: torch.randn(V, generator=g) * 1e-3,
    "constant": lambda g, V: torch.zeros(V),
    "ties": lambda g, V: (torch.randn(V, generator=g) * 2).round(),
    "one_sided": lambda g, V: -torch.rand(V, generator=g) * 9 - 1,
    "far_from_0": lambda g, V: torch.randn(V, generator=g) * 1e-2 + 3e4,
    "around_0": lambda g, V: torch.randn(V, generator=g) * 10.0 ** -torch.randint(0, 30, (V,), generator=g),
    "few": lambda g, V: torch.where(torch.rand(V, generator=g) < 0.01, torch.randn(V, generator=g), -torch.inf),
}
FILTERS = [
    {"top_k": 1}, {"top_k": 50}, {"top_k": 10**6}, {"top_p": 0.0}, {"top_p": 0.3}, {"top_p": 0.999}, {"min_p": 0.1},
    {"min_p": 1.0}, {"top_k": 700, "top_p": 0.8, "min_p": 1e-3}, {"top_k": 3, "top_p": 0.5},
]  # fmt: skip


def first_left(run, logits, **params) -> tuple[torch.Tensor, torch.Tensor]:
    """(first token that filters leave of each row, its logprob)"""
    rows = len(logits)
    answer = run(
        torch.zeros(rows, dtype=torch.int32), torch.arange(rows + 1, dtype=torch.int32), logits, max_depth=0,
        params=sk.SamplingParams(**params), accept_uniforms=torch.zeros(rows), final_uniforms=torch.zeros(rows),
        logprobs=True,
    )  # fmt: skip
    return answer.tokens[:, 0], answer.logprobs[:, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [2 * BLOCK + 9, pytest.param(128256, marks=pytest.mark.full)])
def test_filters_keep_what_sorting_keeps(host, dtype, vocabulary):
    g = torch.Generator().manual_seed(5)
    logits = torch.stack([make(g, vocabulary) for make in ROWS.values()]).to(dtype).sort(1).values
    logits[:, -1] = logits[:, -1].clamp(min=-30)  # something is finite
    for params, temperature in product(FILTERS, (1.0, 0.3, 5e3)):
        expected, logprob = first_left(
            lambda *a, **k: sk.verify_chain(*a, **k, backend="reference"), logits, temperature=temperature, **params
        )
        token, got = first_left(host.chain, logits, temperature=temperature, **params)
        assert torch.equal(token, expected), (params, temperature)
        torch.testing.assert_close(got, logprob, rtol=1e-5, atol=2e-5)


def test_point_masses_of_the_draft_beside_filters_of_the_target(library):
    """What a pass left for the draft's row is read before the passes of the target's filter go over it."""
    case = random_case(Spec("multi_round", False, 8, 4, 6, 2 * BLOCK, distance=2.0, filters="kp"))
    case = case.with_options(draft_params=sk.SamplingParams(temperature=0.0))
    for team, readers in ((1, 1), (3, 2)):
        check(cuda_verify.Host(library, team=team, readers=readers), case)


@each_form
def test_wide_and_deep_trees(host, method, chain):
    shapes = [[-1] + [0] * 64, list(range(-1, 64)), [-1] + [i // 3 for i in range(150)]]
    if chain:
        shapes = [list(range(-1, 128))]
    for seed, shape in enumerate(shapes):
        check(host, random_case(Spec(method, chain, seed, 1, len(shape), 80, distance=0.3), [shape]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["target", "draft"])
def test_broken_rows_stay_in_their_request(host, bad, side):
    for temperature in (1.0, 0.0):
        case = random_case(Spec("multi_round", False, 9, 5, 6, BLOCK + 300, temperature=temperature))
        clean = host.run(case)
        b = next(b for b, nodes in enumerate(case.requests()) if len(nodes) > 2)
        row = getattr(case, side)[case.requests()[b][0]]
        row[... if bad == -torch.inf else BLOCK + 5] = bad
        got = host.run(case)
        assert got.num_tokens[b] == 0 and (got.tokens[b] == -1).all() and (got.nodes[b] == -1).all()
        assert got.logprobs[b].isnan().all()
        others = [i for i in range(5) if i != b]
        assert_same_bits(of(got, others), of(clean, others))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("address")
    return cuda_verify.Program(sanitised(folder, "address,undefined"), folder)


def sanitised(folder, name: str, **options):
    try:
        return cuda_verify.build(folder, name, **options)
    except subprocess.CalledProcessError as error:
        if "-shared" in error.cmd or "-c" in error.cmd:
            raise
        pytest.skip(f"nothing to link with -fsanitize={name}")


SANITISED = {
    "plain": {"vocabulary": 2 * BLOCK, "dtype": torch.bfloat16},
    "everything": {
        "vocabulary": 2 * BLOCK + 77, "dtype": torch.bfloat16, "strided": True, "trimmed": 900, "masked": True,
        "filters": "kp", "draft_filters": "p", "explicit": True,
    },
    "point_mass": {"vocabulary": BLOCK + 3, "point_mass": True, "gaps": True, "temperature": "mixed"},
    "reflect": {"vocabulary": BLOCK + 8, "lossy": "reflect", "dtype": torch.float16},
}  # fmt: skip
each_sanitised = pytest.mark.parametrize(
    ("method", "chain", "name"),
    [
        pytest.param(method, chain, name, id=f"{form}-{name}")
        for (method, chain), form in zip(FORMS, FORM_IDS, strict=True)
        for name, options in SANITISED.items()
        if fits(Spec(method, chain, 0, **options))
    ],
)


def check_sanitised(program, host, method, chain, name) -> None:
    case = random_case(Spec(method, chain, 11, 2, 7, **SANITISED[name]))
    got, expected = program.run(case, logprobs=False), host.run(case, logprobs=False)
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.full
@each_sanitised
def test_no_access_out_of_bounds(address, host, method, chain, name):
    check_sanitised(address, host, method, chain, name)


@pytest.fixture(scope="module")
def threads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    return cuda_verify.Program(sanitised(folder, "thread"), folder)


@pytest.mark.full
@each_sanitised
def test_no_race(threads, host, method, chain, name):
    check_sanitised(threads, host, method, chain, name)


CU_NODES = {"long": [0, 1000], "falling": [5, 2], "negative": [-3, 4], "empty": [0, 0], "huge": [2**31 - 1, -(2**31)]}


@pytest.mark.full
@pytest.mark.parametrize("cu_nodes", CU_NODES.values(), ids=CU_NODES)
def test_what_makes_no_sense_stays_in_bounds(address, cu_nodes):
    case = random_case(Spec("without_replacement", False, 10, 1, 6, BLOCK + 10, trimmed=300, masked=True))
    case.cu_nodes = torch.tensor(cu_nodes, dtype=torch.int32)
    case.parents = torch.randint(-9, 9, case.parents.shape, dtype=torch.int32)
    case.options["draft_vocab"] = torch.randint(-(2**31), 2**31 - 1, (300,)).to(torch.int32)
    got = address.run(case, logprobs=False)
    assert (got.num_tokens >= 0).all() and (got.num_tokens <= case.max_depth + 1).all()


# What is put where in the device code, and what is said of it.
MISTAKES = {
    "rooms do not take turns": ("passes", "(last_is_first_ ? 0 : 1)", "0", "data race"),
    "bins do not take turns": ("passes", "(bins_are_first_ ? 0 : 1)", "0", "data race"),
    "arrivals order nothing": ("team", "::cuda::memory_order_acquire", "std::memory_order_relaxed", "data race"),
    "bins are read too soon": ("blocks", "  __syncwarp();\n  const int bin", "  const int bin", "data race"),
    "who walks waits for more": ("team", "sync_count(1, 2 * kLanes)", "sync_count(1, 3 * kLanes)", "in vain"),
    "lanes part": ("team", "if (lane() == 0) write();", "if (lane() == 0) write(), warp_min(0);", "different things"),
}


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(tmp_path, mistake):
    file, right, wrong, message = MISTAKES[mistake]
    kernels = tmp_path / "kernels"
    shutil.copytree(cuda_verify.ROOT / "csrc/cuda", kernels)
    source = kernels / f"verify_{file}.cuh"
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    if message == "data race":
        host = cuda_verify.Program(sanitised(tmp_path, "thread", kernels=kernels), tmp_path)
    else:
        host = cuda_verify.Host(cuda_verify.build(tmp_path, kernels=kernels))
    spec = Spec("multi_round", False, 3, 2, 7, 2 * BLOCK + 77, trimmed=900, filters="kp", draft_filters="p")
    with pytest.raises(AssertionError, match=message):
        host.run(random_case(spec), logprobs=False)
