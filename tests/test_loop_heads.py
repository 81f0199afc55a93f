"""Every head of a drafter in the loop: greedy output unchanged, sampled output with the target's law, bytes counted."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import specdec_kernels as sk
from loop_support import exact_law, llama, noisy, one_thread, p_value  # noqa: F401 (a fixture)
from specdec_kernels import SamplingParams
from specdec_loop import LowRankHead, ModelDrafter, ShortlistHead, Tree, autoregressive, generate, tiny
from specdec_loop.__main__ import main
from specdec_loop.drafters import Draft, Head
from specdec_loop.vocab import select_rows
from test_cli import folders, run  # noqa: F401 (a fixture)

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [3, 3, 3]]
SHAPES = {"chain": {"draft_length": 4}, "tree": {"tree": Tree(nodes=12, depth=4, width=3, branching=(3, 2, 1))}}
QUANTIZED = ["int8", "int4", "fp8"]
HEADS = ["full", "trimmed", *QUANTIZED, "int8, trimmed", "low rank", "shortlist"]
NEW = 24


def drafter(model, name: str) -> ModelDrafter:
    """A drafter with the named head."""
    height, dim = model.get_output_embeddings().weight.shape
    rows = torch.arange(0, height, 2) if "trimmed" in name else None
    if name == "low rank":
        return ModelDrafter(model, head=LowRankHead(model, 3 * dim // 4))
    if name == "shortlist":
        weight = model.get_output_embeddings().weight
        clusters = sk.cluster_rows(weight, height // 3, always=torch.tensor([0, 2]))
        return ModelDrafter(model, head=ShortlistHead(model, clusters, max(1, height // 9)))
    return ModelDrafter(model, rows=rows, head=name.split(",")[0])


@pytest.fixture(scope="module")
def pair():
    target = llama(0)
    return target, noisy(target, 0.03)


@pytest.fixture(scope="module")
def plain(pair):
    return autoregressive(pair[0], PROMPTS, max_new_tokens=NEW).tokens


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", HEADS)
def test_greedy_output_is_unchanged(pair, plain, name, shape):
    result = generate(pair[0], drafter(pair[1], name), PROMPTS, max_new_tokens=NEW, **shape)
    assert result.tokens == plain
    assert result.statistics.block_efficiency > 1.1
    drafted = [
        token
        for tokens, flags in zip(result.tokens, result.from_draft, strict=True)
        for token, flag in zip(tokens, flags, strict=True)
        if flag
    ]
    assert drafted
    assert "trimmed" not in name or all(token % 2 == 0 for token in drafted)


@pytest.mark.parametrize("method", ["token", "without_replacement", "multi_round", "greedy_multi"])
@pytest.mark.parametrize("name", ["int8", "low rank", "shortlist"])
def test_a_request_does_not_depend_on_its_neighbours(pair, name, method):
    shape = SHAPES["chain" if method == "token" else "tree"]
    options = {"max_new_tokens": 12, "params": SamplingParams(), "method": method, **shape}
    seeds = [11, 2**40 + 1, -3, 5]
    together = generate(pair[0], drafter(pair[1], name), PROMPTS, seeds=seeds, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(pair[0], drafter(pair[1], name), [prompt], seeds=[seeds[i]], **options)
        assert alone.tokens[0] == together.tokens[i]


VOCAB, REQUESTS, LENGTH = 7, 2000, 3
PROMPT = [3, 1, 4, 1, 5, 1, 4, 1]
LAW = {"token": {"draft_length": 2}, "without_replacement": {"tree": Tree(branching=(3, 2))}}
LAW["multi_round"] = LAW["without_replacement"]
QUICK = {
    ("int8", "token"),
    ("int4", "without_replacement"),
    ("low rank", "token"),
    ("shortlist", "without_replacement"),
}


@pytest.fixture(scope="module")
def small():
    target = llama(0, vocab=VOCAB, hidden=16, layers=1, spread=0.35)
    return target, noisy(target, 0.15), exact_law(target, PROMPT, LENGTH, lambda logits: logits.softmax(-1))


def sample(target, drafter, method, requests=REQUESTS):
    prompts, seeds = [PROMPT] * requests, range(requests)
    params = SamplingParams()
    return generate(
        target, drafter, prompts, max_new_tokens=LENGTH, params=params, seeds=seeds, method=method, **LAW[method]
    )


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in QUICK else pytest.mark.full)
        for name in HEADS
        for method in LAW
    ],
)
def test_law(small, name, method):
    target, model, law = small
    result = sample(target, drafter(model, name), method)
    assert result.statistics.accepted > REQUESTS // 8, "the drafter must matter for the test to say anything"
    assert p_value(law, result.tokens, VOCAB) > 1e-4


class WholeHead(ModelDrafter):
    """Draws from its own head, and claims the q of the model's whole one: what a q that is made elsewhere would be."""

    def propose(self, requests, rng, params):
        seen = []
        real = self.head.sample

        def spy(hidden, *rest, **options):
            step = real(hidden, *rest, **options)
            logits = Head(self.model).topk(hidden, 1, return_logits=True).all_logits
            seen.append(logits)
            return step._replace(all_logits=logits)

        self.head.sample = spy
        try:
            draft = super().propose(requests, rng, params)
        finally:
            del self.head.sample
        assert seen
        return Draft(draft.tree, draft.logits, None)


@pytest.mark.parametrize("name", ["low rank", "shortlist"])
def test_the_test_sees_the_q_of_another_head(small, name):
    target, model, law = small
    head = drafter(model, name).head
    if name == "low rank":
        head = LowRankHead(model, 4)
    result = sample(target, WholeHead(model, head=head), "token", REQUESTS // 2)
    assert p_value(law, result.tokens, VOCAB) < 1e-6


def test_bytes_of_a_draft_step(pair):
    model = pair[1]
    body = ModelDrafter(model).bytes_read() - 97 * 32 * 4
    half = torch.arange(0, 97, 2)
    for name, head in {
        "full": 97 * 32 * 4,
        "trimmed": 49 * 32 * 4,
        "int8": 97 * (32 + 4),
        "int8, trimmed": 49 * (32 + 4),
        "fp8": 97 * (32 + 4),
        "int4": 97 * (64 + 4),  # one group of 128, which 32 columns do not fill
        "low rank": 24 * 32 * 4 + 97 * 24 * 4,
    }.items():
        assert drafter(model, name).bytes_read() == body + head, name
    clusters = sk.cluster_rows(model.get_output_embeddings().weight, 19, always=torch.tensor([0, 2]))
    listed = ModelDrafter(model, head=ShortlistHead(model, clusters, 3))
    assert clusters.rows.shape == (19, 5)
    assert listed.bytes_read() == body + (19 + 2 + 3 * 5) * 32 * 4
    up = sk.quantize_head(torch.randn(97, 8), "int8")
    thin = LowRankHead(model, factors=(torch.randn(8, 32), up), rows=half)
    assert ModelDrafter(model, head=thin).bytes_read() == body + 8 * 32 * 4 + 49 * (8 + 4)


def test_scales_of_a_models_logits_reach_quantised_heads():
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = GraniteConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, logits_scaling=8.0)
    torch.manual_seed(0)
    model = GraniteForCausalLM(config).eval()
    hidden = torch.randn(3, 32)
    want = Head(model).topk(hidden, 1, return_logits=True).all_logits
    torch.testing.assert_close(want, hidden @ model.get_output_embeddings().weight.T / 8)
    for dtype in QUANTIZED:
        got = Head(model, dtype=dtype).topk(hidden, 1, return_logits=True).all_logits
        assert float((got - want).norm() / want.norm()) < 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: ModelDrafter(model, head="int3"), "head: expected a Head or one of 'full', .* got 'int3'"),
        (lambda model: ModelDrafter(model, head="trimmed"), "rows: expected ids with head 'trimmed'"),
        (lambda model: ModelDrafter(model, head="full", rows=[1, 2]), "rows: expected None with head 'full'"),
        (lambda model: ModelDrafter(model, head=Head(model), rows=[1, 2]), "rows: expected None beside a Head"),
        (lambda model: LowRankHead(model), "rank: expected either rank or factors, got neither"),
        (
            lambda model: LowRankHead(model, factors=(torch.zeros(4, 32), torch.zeros(96, 4))),
            "factors: expected 97 rows of the second, as the model's head has, got 96",
        ),
        (lambda model: LowRankHead(model, 33), r"rank: expected in 1\.\.32, got 33"),
    ],
)
def test_bad_arguments_are_named(pair, make, message):
    with pytest.raises(ValueError, match=message):
        make(pair[1])


@pytest.mark.parametrize("options", [["int8"], ["low-rank", "--rank", "24"], ["int4", "--rows"], ["trimmed", "--rows"]])
def test_command_line(folders, capsys, options):  # noqa: F811
    rows = [str(folders / "rows.safetensors")] if "--rows" in options else []
    code = run(folders, "--prompt", "def", "--max-new-tokens", "8", "--methods", "chain", "--head", *options, *rows)
    assert code == 0
    assert capsys.readouterr().out.count("yes") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "trimmed"], "rows: expected ids with head 'trimmed'"),
        (["--head", "low-rank"], "rank: expected with --head low-rank and with no other, got none"),
        (["--head", "int8", "--rank", "4"], "rank: expected with --head low-rank and with no other, got --head int8"),
    ],
)
def test_command_line_names_what_does_not_fit(folders, capsys, options, message):  # noqa: F811
    assert run(folders, "--prompt", "a", "--methods", "chain", *options) == 2
    assert re.search(message, capsys.readouterr().err)


def test_demo_shows_the_heads_side_by_side(capsys, tmp_path):
    picture = tmp_path / "demo.png"
    sizes = ["--prompts", "1", "--prompt-tokens", "32", "--max-new-tokens", "12", "--seconds", "1"]
    assert main(["demo", "--unscaled", *sizes, "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("│") and line.count("│") > 5]
    assert "MBSU" in out and all("yes" in row for row in rows if "/" in row)
    heads = {row.split("│")[1].strip(): float(row.split("│")[6]) for row in rows if "chain" in row}
    assert list(heads) == ["chain of 4", "chain, 8000 rows", "chain, int8 head"]
    assert 2 * max(heads["chain, 8000 rows"], heads["chain, int8 head"]) < heads["chain of 4"], "MB of a draft step"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_heads_of_the_shipped_pair():
    """Greedy chains over 50 held-out prompts: the same tokens, and how many a call with each head."""
    pair = tiny.load(torch.float32)
    prompts = tiny.heldout_prompts(50, 128, pair.tokenizer)
    options = {"max_new_tokens": 64, "eos_token_id": ()}
    plain = autoregressive(pair.target, prompts, **options).tokens
    rows = select_rows(pair.vocab_order, 8000, force=pair.tokenizer.all_special_ids)
    weight = pair.drafter.get_output_embeddings().weight
    clusters = sk.cluster_rows(weight, 512, always=pair.vocab_order[:500])
    with torch.no_grad():
        states = pair.drafter.base_model(prompts[:10]).last_hidden_state[:, 8:].flatten(0, 1)
    heads = {
        "full": {},
        "8000 rows": {"rows": rows},
        **{dtype: {"head": dtype} for dtype in QUANTIZED},
        "rank 48": {"head": LowRankHead(pair.drafter, 48)},
        "rank 48, calibrated": {"head": LowRankHead(pair.drafter, 48, hidden=states)},
        "2000 rows, listed": {"head": ShortlistHead(pair.drafter, clusters, 23, budget=46)},
    }
    efficiency = {}
    for name, options_of in heads.items():
        result = generate(pair.target, ModelDrafter(pair.drafter, **options_of), prompts, draft_length=4, **options)
        assert result.tokens == plain, name
        efficiency[name] = result.statistics.block_efficiency
    print(efficiency)
    for name, least in (("8000 rows", 0.97), ("int8", 0.98), ("fp8", 0.95), ("int4", 0.9), ("2000 rows, listed", 0.9)):
        assert efficiency[name] >= least * efficiency["full"], name
    assert efficiency["rank 48, calibrated"] > efficiency["rank 48"]
