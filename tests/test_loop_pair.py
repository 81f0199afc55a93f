"""The shipped pair on held-out source code: same tokens as plain decoding, and as many a call as promised."""

from __future__ import annotations

import pytest
import torch

from loop_support import one_thread  # noqa: F401 (a fixture)
from specdec_loop import ModelDrafter, Statistics, Tree, autoregressive, generate, tiny
from specdec_loop.vocab import select_rows

PROMPT_TOKENS, NEW = 128, 64
SHAPES = {"chain": {"draft_length": 4}, "tree": {"tree": Tree(nodes=32)}}
ROWS = 8000


@pytest.fixture(scope="module")
def pair():
    return tiny.load(torch.float32)


@pytest.fixture(scope="module", params=[6, pytest.param(50, marks=pytest.mark.full)])
def prompts(request, pair):
    return tiny.heldout_prompts(request.param, PROMPT_TOKENS, pair.tokenizer)


@pytest.fixture(scope="module")
def plain(pair, prompts):
    return autoregressive(pair.target, prompts, max_new_tokens=NEW, eos_token_id=()).tokens


def decode(pair, drafter, prompts, batch, shape):
    """Tokens of all prompts, `batch` of them at a time, and the statistics of the whole."""
    tokens, total = [], Statistics()
    for part in prompts.split(batch):
        result = generate(pair.target, drafter, part, max_new_tokens=NEW, eos_token_id=(), **shape)
        tokens += result.tokens
        total.add(result.statistics)
    return tokens, total


def test_plain_decoding_is_transformers(pair, prompts, plain):
    ids = prompts[:2]
    expected = pair.target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    for row, tokens in zip(expected[:, PROMPT_TOKENS:].tolist(), plain, strict=False):
        end = row.index(0) + 1 if 0 in row else NEW  # plain decoding went on behind the end of text, id 0
        assert tokens[:end] == row[:end]


def test_greedy_and_block_efficiency(pair, prompts, plain):
    """Chain and tree, batch 1 and 4, and the trimmed head: outputs equal, and the figures of the project's promise."""
    efficiency = {}
    for name, shape in SHAPES.items():
        for batch in (1, 4):
            tokens, stats = decode(pair, ModelDrafter(pair.drafter), prompts, batch, shape)
            assert tokens == plain, (name, batch)
            efficiency[name, batch] = stats.block_efficiency
    rows = select_rows(pair.vocab_order, ROWS, force=pair.tokenizer.all_special_ids)
    tokens, stats = decode(pair, ModelDrafter(pair.drafter, rows=rows), prompts, 4, SHAPES["chain"])
    assert tokens == plain
    assert efficiency["chain", 1] == pytest.approx(efficiency["chain", 4])
    assert efficiency["chain", 1] >= 2.5
    assert efficiency["tree", 1] >= efficiency["chain", 1] + 0.4
    assert stats.block_efficiency >= 0.94 * efficiency["chain", 4]
