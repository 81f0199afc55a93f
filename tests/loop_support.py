"""Small random models for the tests of the loop, and exact laws to compare with."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from a second thread, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(seed: int, vocab: int = 97, hidden: int = 32, layers: int = 2, spread: float = 0.3, **options):
    """A random Llama in fp32; `spread` sets how peaked its distributions are."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def noisy(model, scale: float, seed: int = 1):
    """A copy with noise on its weights: a drafter that is right some of the time."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return other


@torch.no_grad()
def exact_law(model, prompt: list[int], length: int, process) -> torch.Tensor:
    """[V^length] fp64: the probability of every continuation; `process` turns logits into probabilities."""
    vocab = model.config.vocab_size
    law = torch.ones(1, dtype=torch.float64)
    for step in range(length):
        heads = torch.tensor(list(itertools.product(range(vocab), repeat=step)), dtype=torch.int64)
        ids = torch.cat([torch.tensor(prompt).expand(vocab**step, -1), heads.view(vocab**step, step)], 1)
        logits = torch.cat([model(part).logits[:, -1] for part in ids.split(512)])
        law = (law[:, None] * process(logits.double())).flatten()
    return law


def p_value(law: torch.Tensor, samples: list[list[int]], vocab: int) -> float:
    """Chi-square of token sequences against their exact law; cells that expect fewer than 5 are pooled."""
    index = torch.tensor(samples)
    length = index.shape[1]
    place = sum(index[:, i] * vocab ** (length - 1 - i) for i in range(length))
    seen = torch.bincount(place, minlength=len(law)).double()
    assert not seen[law == 0].any(), "a sequence of probability 0 came out"
    expected = law * len(samples)
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    keep = expected > 0
    statistic = ((seen - expected)[keep] ** 2 / expected[keep]).sum()
    return float(chi2.sf(float(statistic), int(keep.sum()) - 1))
