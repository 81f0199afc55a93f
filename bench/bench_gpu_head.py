"""The drafter's head on a GPU against plain torch at its best, in one process: run by `make gpu`.

Everything is captured in CUDA graphs, and the weight is taken from several places in turn, so that the L2 cache holds
none of it. `argmax` is the op itself with k = 1: what it is faster by is what the rest of the k cost. The baselines get
a weight that is already trimmed, for which our ops have no need.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from bench_gpu import CALLS, COPIED, captured
from common import compare

import specdec_kernels as sk
from specdec_kernels.backends import BackendError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
K, VOCABULARY, SHORTLIST = 8, 128256, 2048
ROWS, DIMS, BATCHES = (16384, 32000, 128256), (2048, 4096), (1, 4, 10, 16, 64, 256)


def weights(height: int, dim: int, device: str = "cuda", dtype=torch.bfloat16) -> list[torch.Tensor]:
    """Weights [V, D], as many as it takes to push one another out of the L2 cache; logits have variance 9."""
    generator = torch.Generator(device).manual_seed(0)
    first = torch.randn(height, dim, generator=generator, device=device, dtype=dtype) * (3 / dim**0.5)
    if device == "cpu":
        return [first]
    more = min(CALLS - 1, 3 * torch.cuda.get_device_properties(0).L2_cache_size // first.nbytes)
    return [first, *(first.clone() for _ in range(more))]


def vectors(batch: int, dim: int, device: str = "cuda", dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(batch, dim, generator=generator, device=device, dtype=dtype)


def shortlists(lists: int, device: str = "cuda", height: int = VOCABULARY, size: int = SHORTLIST) -> torch.Tensor:
    """[lists, size] int32 rows, different for each list, ascending as a router leaves them."""
    generator = torch.Generator(device).manual_seed(2)
    picked = torch.rand(lists, height, generator=generator, device=device).topk(size, dim=1).indices
    return picked.sort(1).values.to(torch.int32)


def linear(x, weight, rows=None):
    """(tokens, log-probabilities) as an engine finds them on a weight that is already trimmed to `rows`."""
    logprobs, places = F.linear(x, weight).float().log_softmax(-1).topk(K)
    return (places if rows is None else rows[places]), logprobs


def gathered(x, weight, rows):
    """The same on rows of each request: their copy, one product."""
    logits = torch.einsum("brd,bd->br", weight[rows.long()], x)
    logprobs, places = logits.float().log_softmax(-1).topk(K)
    return rows.gather(1, places), logprobs


def agrees(found: sk.HeadTopK, other) -> bool:
    """bf16 logits of a baseline are rounded, so places in the order may differ, and now and then a token."""
    tokens, _ = other
    same = (found.tokens[:, :, None] == tokens[:, None, :]).any(2)
    return bool(same.float().mean() > 0.9)


def measure(benchmark, op, baselines: dict, places: list, bytes_read: int) -> None:
    """Compare `op(weight)` with `baselines`, which take a place of `places` each."""
    try:
        found = op(places[0])
    except BackendError as error:
        pytest.skip(str(error))
    for name, other in baselines.items():
        if name != "argmax":
            assert agrees(found, other(places[0])), f"{name} computes something else"
    source, target = torch.zeros(2, COPIED, dtype=torch.int8, device="cuda")
    compare(
        benchmark,
        captured(*(functools.partial(op, place) for place in places)),
        {name: captured(*(functools.partial(f, place) for place in places)) for name, f in baselines.items()},
        copy=(captured(lambda: target.copy_(source)), 2 * COPIED * CALLS),
        bytes_read=bytes_read * CALLS,
    )


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("height", ROWS)
def test_topk(benchmark, height, dim, batch, backend):
    x, places = vectors(batch, dim), weights(height, dim)
    measure(
        benchmark,
        lambda weight: sk.head_topk(x, weight, K, backend=backend),
        {"linear_log_softmax_topk": lambda w: linear(x, w), "argmax": lambda w: sk.head_topk(x, w, 1, backend=backend)},
        places,
        places[0].nbytes,
    )


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("batch", BATCHES)
def test_topk_of_gathered_rows(benchmark, batch, backend):
    """32000 rows that lie scattered over an untouched weight, against a copy of them."""
    dim = 4096
    x, rows = vectors(batch, dim), shortlists(1, size=32000)[0]
    places = [(weight, weight[rows.long()]) for weight in weights(VOCABULARY, dim)]
    measure(
        benchmark,
        lambda place: sk.head_topk(x, place[0], K, rows=rows, backend=backend),
        {
            "linear_on_a_trimmed_copy": lambda place: linear(x, place[1], rows),
            "argmax": lambda place: sk.head_topk(x, place[0], 1, rows=rows, backend=backend),
        },
        places,
        places[0][1].nbytes,
    )


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dim", DIMS)
def test_shortlists_of_each_request(benchmark, dim, backend):
    batch = 10
    x, lists, places = vectors(batch, dim), shortlists(batch), weights(VOCABULARY, dim)
    measure(
        benchmark,
        lambda weight: sk.head_topk(x, weight, K, rows=lists, backend=backend),
        {"gather_copy_einsum": lambda weight: gathered(x, weight, lists)},
        places,
        lists.numel() * dim * places[0].element_size(),
    )


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("batch", BATCHES)
def test_draws(benchmark, batch, backend):
    """Draws of the whole vocabulary: what the noise costs beside the k best."""
    x, places = vectors(batch, 4096), weights(VOCABULARY, 4096)
    index = torch.arange(batch, device="cuda")
    rng = sk.Philox(index, index)

    def op(weight):
        return sk.head_sample(x, weight, 1, rng=rng, backend=backend)

    try:
        op(places[0])
    except BackendError as error:
        pytest.skip(str(error))
    compare(
        benchmark,
        captured(*(functools.partial(op, place) for place in places)),
        {"argmax": captured(*(lambda w=w: sk.head_topk(x, w, 1, backend=backend) for w in places))},
    )
