"""The command line on a small pair that is saved with a tokenizer of its own."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loop_support import llama, noisy, one_thread  # noqa: F401 (a fixture)
from specdec_loop import compare
from specdec_loop.__main__ import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    target = llama(0, vocab=256)
    base = tmp_path_factory.mktemp("models")
    for name, model in (("target", target), ("drafter", noisy(target, 0.03))):
        model.save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    save_file({"rows": torch.arange(0, 256, 2)}, base / "rows.safetensors")
    return base


def run(folders, *options):
    return main(
        [
            "generate",
            "--target",
            str(folders / "target"),
            "--drafter",
            str(folders / "drafter"),
            "--device",
            "cpu",
            *options,
        ]
    )


def test_generate_prints_the_same_tokens_for_all_methods(folders, capsys, tmp_path):
    code = run(
        folders, "--prompt", "def f(x):", "--prompt", "[b]", "--max-new-tokens", "12", "--nodes", "8", "--depth", "3",
        "--methods", "autoregressive,chain,tree,ngram,ngram-tree", "--out", str(tmp_path / "new" / "p.png"),
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "def f(x):" in out and "[b]" in out
    assert out.count("yes") == 5 and "1.00x" in out
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_tokenizer_may_stand_above_its_checkpoints(folders, capsys, tmp_path):
    for name in ("target", "drafter"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(folders / name / file, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders / "target" / file, tmp_path)
    assert run(tmp_path, "--prompt", "def", "--max-new-tokens", "4", "--methods", "autoregressive,chain") == 0
    assert capsys.readouterr().out.count("yes") == 2


def test_generate_sampled_with_a_trimmed_head(folders, capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("import os\n")
    code = run(
        folders, "--prompt-file", str(prompt), "--max-new-tokens", "8", "--temperature", "0.8", "--top-p", "0.9",
        "--rows", str(folders / "rows.safetensors"), "--methods", "chain,tree", "--branching", "2,1",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "import os" in out and "same" not in out


def test_a_different_token_ends_with_code_1(folders, capsys, monkeypatch):
    real = compare._decode

    def wrong(target, method, prompt, **options):
        result = real(target, method, prompt, **options)
        if method.name == "chain" and len(result.tokens[0]) > 4:
            result.tokens[0][5] ^= 1
        return result

    monkeypatch.setattr(compare, "_decode", wrong)
    code = run(folders, "--prompt", "def", "--max-new-tokens", "8", "--methods", "autoregressive,chain,ngram")
    out = capsys.readouterr().out
    assert code == 1
    assert "chain: prompt 0 differs from autoregressive at new token 5" in out
    assert out.count("yes") == 2 and out.count("no ") >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "prompt: expected at least one --prompt or --prompt-file"),
        (["--prompt", "a", "--methods", "beam"], "methods: expected some of autoregressive, .* got beam"),
        (["--prompt", "a", "--draft-length", "0"], "draft_length: expected an int >= 1, got 0"),
        (["--prompt", "a", "--drafter", "/nowhere/at/all"], "expected a folder with a model, got /nowhere/at/all"),
    ],
)
def test_bad_arguments_end_with_code_2(folders, capsys, options, message):
    assert run(folders, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
