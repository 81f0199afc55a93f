"""The small trained pair: its text split, its files, and the larger copies that compute the same function."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from specdec_loop import tiny
from specdec_loop.tiny import corpus
from specdec_loop.tiny.evaluate import CHAIN, TREE, draft_tree, heldout_texts, longest_match, tokens_per_call
from specdec_loop.tiny.pair import DATA
from specdec_loop.tiny.prompts import prompt_files
from specdec_loop.tiny.sampled import UnigramSampler, candidate_logits, sampled_distillation
from specdec_loop.tiny.train import vocabulary_order


@pytest.fixture(scope="module")
def pair():
    return tiny.load()


def random_llama(**changes) -> LlamaForCausalLM:
    """A Llama with weights large enough for its attention and its MLP to matter."""
    shape = {
        "vocab_size": 111,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model


class TestSplit:
    def test_depends_on_the_relative_path_only(self):
        assert corpus.is_heldout("heapq.py")
        assert not corpus.is_heldout("json/decoder.py")

    def test_holds_out_about_two_percent(self):
        names = [f"package/module_{index}.py" for index in range(20_000)]
        assert 0.015 < sum(map(corpus.is_heldout, names)) / len(names) < 0.025

    def test_sets_are_disjoint_and_the_same_at_every_call(self):
        train, heldout = corpus.collect(max_bytes=4_000_000)
        assert train and heldout
        assert not {file.name for file in train} & {file.name for file in heldout}
        assert not {file.text for file in train} & {file.text for file in heldout}
        assert all(corpus.is_heldout(file.name) for file in heldout)
        assert (train, heldout) == corpus.collect(max_bytes=4_000_000)

    def test_near_copies_of_heldout_files_are_dropped(self):
        source = corpus.SourceFile("a.py", "\n".join(f"some_variable_{i} = call({i})" for i in range(50)))
        edited = corpus.SourceFile("b.py", source.text + "\nimport something_else_entirely\n")
        other = corpus.SourceFile("c.py", "\n".join(f"another_name_{i} = other({i})" for i in range(50)))
        assert corpus.drop_near_copies([edited, other], [source]) == [other]

    def test_prompts_are_heldout_text(self, pair):
        prompts = tiny.heldout_prompts(50, 128, pair.tokenizer)
        assert prompts.shape == (50, 128) and prompts.dtype == torch.int64
        assert torch.equal(prompts, tiny.heldout_prompts(50, 128, pair.tokenizer))
        assert len(prompts.unique(dim=0)) == 50
        text = "\0".join(file.text for file in prompt_files())
        assert all(pair.tokenizer.decode(row) in text for row in prompts)

    def test_too_many_prompts(self, pair):
        with pytest.raises(ValueError, match="n: got 100000 prompts of 64 tokens, expected at most"):
            tiny.heldout_prompts(100_000, 64, pair.tokenizer)
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            tiny.heldout_prompts(0, 64, pair.tokenizer)


class TestShipped:
    def test_size_on_disk(self):
        assert 0 < sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 25_000_000

    def test_loads_in_the_dtype_asked_for(self, pair):
        assert pair.target.dtype == pair.drafter.dtype == torch.float32
        assert tiny.load(torch.bfloat16).target.dtype == torch.bfloat16
        assert pair.target.config is not pair.drafter.config
        assert pair.target.config.vocab_size == pair.drafter.config.vocab_size == len(pair.tokenizer)
        assert pair.target.config.eos_token_id == pair.tokenizer.eos_token_id

    def test_vocab_order_is_a_permutation_with_eos_first(self, pair):
        order = pair.vocab_order
        assert order.dtype == torch.int32
        assert torch.equal(order.sort().values, torch.arange(len(pair.tokenizer), dtype=torch.int32))
        assert order[0] == pair.tokenizer.eos_token_id

    def test_tokenizer_is_lossless(self, pair):
        text = 'def f(x):\n\treturn "é 漢字 🙂"  # <- ok\n'
        assert pair.tokenizer.decode(pair.tokenizer(text)["input_ids"]) == text

    def test_models_have_learnt(self, pair):
        prompts = tiny.heldout_prompts(16, 128, pair.tokenizer)
        with torch.inference_mode():
            for model, bound in ((pair.target, 4.5), (pair.drafter, 5.5)):
                assert model(prompts, labels=prompts).loss < bound

    @pytest.mark.full
    def test_tokens_per_target_call(self, pair):
        texts, start = heldout_texts(pair, prompts=50)
        chain = tokens_per_call(pair, texts, start, CHAIN)
        assert chain >= 2.5
        assert tokens_per_call(pair, texts, start, CHAIN, rows=8192) >= 0.94 * chain
        assert tokens_per_call(pair, texts, start, TREE) >= chain + 0.4

    def test_missing_files_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"target: not there; .* makes it"):
            tiny.load(folder=tmp_path)


class TestReplay:
    def test_the_last_token_is_the_targets_own(self):
        assert longest_match({(1,), (1, 2), (1, 2, 3)}, [1, 2, 3]) == 2
        assert longest_match({(1,), (5,), (5, 2)}, [5, 7, 3]) == 1
        assert longest_match({(1,)}, [2, 3]) == 0

    def test_trees_hold_every_parent_and_only_known_ids(self):
        rows = torch.arange(0, 111, 3)
        prefix = torch.arange(10)
        paths = draft_tree(random_llama(), prefix, rows, TREE)
        assert len(paths) == TREE.nodes - 1
        assert all(path[:-1] in paths or len(path) == 1 for path in paths)
        assert {token for path in paths for token in path} <= set(rows.tolist())

    def test_a_chain_is_the_greedy_continuation(self):
        model, text = random_llama(), list(range(10))
        for _ in range(CHAIN.depth):
            text.append(model(torch.tensor([text])).logits[0, -1].argmax().item())
        paths = draft_tree(model, torch.arange(10), None, CHAIN)
        assert paths == {tuple(text[10:end]) for end in range(11, 15)}


class TestScale:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"tie_word_embeddings": False},
            {"num_key_value_heads": 4},
            {"num_key_value_heads": 1, "head_dim": 8},
            {"attention_bias": True, "mlp_bias": True},
        ],
        ids=["tied", "untied", "no groups", "one key head", "biases"],
    )
    @pytest.mark.parametrize(("hidden", "layers"), [(48, 2), (48, 5), (200, 2), (256, 4)])
    def test_same_logits(self, changes, hidden, layers):
        model = random_llama(**changes)
        larger = tiny.scale(model, hidden, layers)
        ids = torch.arange(2 * 40).reshape(2, 40) % 111
        with torch.inference_mode():
            torch.testing.assert_close(larger(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
        assert larger.config.hidden_size == hidden and len(larger.model.layers) == layers
        assert model.config.hidden_size == 48

    def test_weights_stay_tied(self):
        larger = tiny.scale(random_llama(), 96, 2)
        assert larger.lm_head.weight is larger.model.embed_tokens.weight

    def test_heads_grow_in_their_groups(self):
        config = tiny.scale(random_llama(), 256, 2).config
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 16)
        assert config.intermediate_size == 512

    def test_shipped_pair(self, pair):
        ids = tiny.heldout_prompts(2, 64, pair.tokenizer)
        for model in pair[:2]:
            larger = tiny.scale(model, 512, 6)
            with torch.inference_mode():
                torch.testing.assert_close(larger(ids).logits, model(ids).logits, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((32, 2), "hidden: got 32, expected at least the model's own 48"),
            ((96, 1), "layers: got 1, expected at least the model's own 2"),
            ((96, 2, 64), "intermediate: got 64, expected at least the model's own 96"),
        ],
    )
    def test_smaller_than_the_model(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            tiny.scale(random_llama(), *arguments)

    def test_other_architectures(self):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
        with pytest.raises(ValueError, match="model: got one of type 'gpt2', expected 'llama'"):
            tiny.scale(model, 16, 2)


class TestSampledSoftmax:
    def test_estimates_the_full_normaliser(self):
        torch.manual_seed(0)
        counts = torch.arange(1, 501).float() ** 2
        hidden, weight = torch.randn(1, 16), 0.3 * torch.randn(500, 16)
        sampler = UnigramSampler(counts, negatives=300, seed=0)
        labels = torch.multinomial(counts, 50, replacement=True)
        sums = [candidate_logits(hidden, weight, sampler.draw(labels[:0])).exp().sum() for _ in range(400)]
        exact = (hidden @ weight.T).exp().sum()
        assert torch.stack(sums).mean().item() == pytest.approx(exact.item(), rel=0.05)

    def test_labels_are_found_among_the_candidates(self):
        labels = torch.tensor([7, 3, 3, 99])
        candidates = UnigramSampler(torch.ones(100), negatives=10, seed=0).draw(labels)
        assert torch.equal(candidates.ids[candidates.labels], labels)

    def test_distillation_is_least_at_the_teacher(self):
        teacher = torch.randn(5, 30)
        candidates = UnigramSampler(torch.ones(100), negatives=60, seed=0).draw(torch.arange(4))
        candidates = candidates._replace(log_inclusion=torch.zeros(30))
        same = sampled_distillation(teacher, teacher, candidates, hard=0.0)
        assert same.item() == pytest.approx(0.0, abs=1e-6)
        assert sampled_distillation(teacher + torch.randn(5, 30), teacher, candidates, hard=0.0) > 0.1


def test_vocabulary_order_backs_off_to_the_corpus():

    generated = np.array([[5, 5, 9], [9, 5, 7]], dtype=np.uint16)
    corpus_tokens = np.array([8, 8, 7], dtype=np.uint16)
    assert vocabulary_order(generated, corpus_tokens)[:5].tolist() == [0, 5, 9, 7, 8]
