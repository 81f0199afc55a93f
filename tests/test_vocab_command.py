"""`python -m specdec_loop vocab choose`, and the maps that `generate` takes."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from loop_support import llama, noisy, one_thread  # noqa: F401 (a fixture)
from specdec_loop.__main__ import main
from specdec_loop.vocab import VocabMap, load_counts, load_map, save_map, tokenizer_hash
from vocab_support import ROOT, byte_level, pair_tokenizer

QUICK = ["--rounds", "3", "--seconds", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A target and a drafter with a tokenizer, the same drafter with another one, and text."""
    folder = tmp_path_factory.mktemp("vocab")
    target = llama(0, vocab=300)
    target.generation_config.eos_token_id = [257, 5]
    tokenizers = {
        "target": byte_level("</s>", "<end>", eos_token="</s>"),
        "foreign": byte_level("<s>", eos_token="<s>"),
    }
    tokenizers["drafter"] = tokenizers["target"]
    for name, model in (("target", target), ("drafter", noisy(target, 0.03)), ("foreign", noisy(target, 0.03))):
        model.save_pretrained(folder / name)
        tokenizers[name].save_pretrained(folder / name)
    text = "def add(left, right):\n    return left + right\n" * 40
    (folder / "text").write_text(text)
    return folder


def choose(*options):
    return main(["vocab", "choose", *map(str, options), *QUICK])


def test_writes_a_map_that_fits_and_a_picture(base, capsys, tmp_path):
    out, picture, counts = tmp_path / "new" / "map", tmp_path / "new" / "curves.png", tmp_path / "counts"
    code = choose(
        "--model", base / "target", "--drafter", base / "drafter", "--text", base / "text", "--out", out,
        "--picture", picture, "--save-counts", counts, "--prompt-tokens", 16, "--step", 1,
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0, shown
    tokenizer = byte_level("</s>", "<end>", eos_token="</s>")
    vocab_map = load_map(out, tokenizer, vocab_size=300)
    assert vocab_map.forced == (5, 256, 257) and set(vocab_map.forced) <= set(vocab_map.rows.tolist())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        re.search(rf"\b{len(vocab_map.rows)} .*chosen", shown) and "acceptance" in shown and "(measured on 8" in shown
    )
    assert f"{len(vocab_map.rows)} rows, 3 of them forced" in shown
    # Four fifths of the text were counted, and the ids that occur stand first.
    values = load_counts(counts, tokenizer, vocab_size=300).values
    ids = torch.tensor(tokenizer((base / "text").read_text())["input_ids"])
    assert int(values.sum()) == len(ids) - len(ids) // 5
    assert set(ids.tolist()) <= set(vocab_map.rows.tolist())

    # The map is one that `generate` takes.
    code = main(
        ["generate", "--target", str(base / "target"), "--drafter", str(base / "drafter"), "--rows", str(out),
         "--prompt", "def", "--max-new-tokens", "6", "--methods", "autoregressive,chain", "--device", "cpu"]
    )  # fmt: skip
    assert code == 0


def test_numbers_that_are_given_are_not_measured(base, capsys, tmp_path):
    counts = tmp_path / "counts"
    given = ["--acceptance", 0.5, "--target-ms", 40, "--body-ms", 3, "--prompt-tokens", 16]
    model = ["--model", base / "target", "--text", base / "text", "--heldout", base / "text"]
    assert choose(*model, *given, "--save-counts", counts) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "acceptance 0.500 (given); target step 40.00 ms (given), drafter without head 3.00 ms (given)" in shown
    once = load_counts(counts, byte_level("</s>", "<end>", eos_token="</s>")).values
    assert int(once.sum()) == len((base / "text").read_text())
    # Saved counts are added.
    assert choose(*model, *given, "--counts", counts, counts, "--save-counts", tmp_path / "more") == 0
    more = load_counts(tmp_path / "more", byte_level("</s>", "<end>", eos_token="</s>")).values
    assert torch.equal(more, 3 * once)


def test_a_drafter_of_the_target_s_own_layers(base, capsys):
    assert choose("--model", base / "target", "--text", base / "text", "--prompt-tokens", 16) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "acceptance 0.750 (assumed)" in shown and "(one layer of the target's)" in shown


def test_text_of_the_target_is_counted(base, capsys, tmp_path):
    counts = tmp_path / "counts"
    assert choose(
        "--model", base / "target", "--text", base / "text", "--generate", 200, "--prompt-tokens", 16,
        "--temperature", 0.8, "--save-counts", counts,
    ) == 0  # fmt: skip
    assert "target writes" in capsys.readouterr().out
    values = load_counts(counts, byte_level("</s>", "<end>", eos_token="</s>")).values
    assert 0 < int(values.sum()) <= 256  # four passages of 64 tokens, unless the target ends before


def test_the_shipped_pair_is_the_default(capsys, tmp_path):
    out = tmp_path / "map"
    assert choose("--text", ROOT / "README.md", ROOT / "CONTRIBUTING.md", "--acceptance", 0.8, "--out", out) == 0
    assert "Head of the shipped pair, [32000, 64]" in capsys.readouterr().out
    assert load_map(out, pair_tokenizer(), vocab_size=32000).forced == (0,)


@pytest.mark.full
def test_the_shipped_pair_needs_no_arguments(capsys):
    assert choose() == 0
    assert "measured on 8 held-out prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drafter", "drafter"], "model: expected a folder beside --drafter .*drafter, got none"),
        (["--model", "target"], "text: expected at least one file, got none"),
        (["--model", "target", "--text", "nothing"], "No such file"),
        (
            ["--model", "target", "--text", "text", "--drafter", "foreign"],
            "drafter: expected the tokenizer of .*target",
        ),
        (["--model", "target", "--text", "text", "--prompt-tokens", "9999"], "expected one of at least 9999 tokens"),
        (["--model", "target", "--text", "text", "--counts", "counts"], "counts: expected a specdec token counts file"),
    ],
)
def test_bad_arguments_end_with_code_2(base, capsys, options, message):
    there = [str(base / each) if not each.startswith("--") and not each.isdigit() else each for each in options]
    assert choose(*there) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "expected a specdec vocabulary map file, got no such file"),
        (
            lambda path: save_map(path, VocabMap(torch.arange(9), 300, tokenizer_hash({"a": 0}))),
            "tokenizer: expected a",
        ),
        (lambda path: save_file({"rows": torch.tensor([1, 300])}, path), r"rows: expected ids in 0\.\.299, got 300"),
        (lambda path: save_file({"rows": torch.tensor([7, 1, 7])}, path), "rows: expected each id once"),
    ],
)
def test_generate_refuses_a_map_that_is_missing_or_foreign(base, capsys, tmp_path, make, message):
    make(tmp_path / "map")
    code = main(
        ["generate", "--target", str(base / "target"), "--drafter", str(base / "drafter"), "--prompt", "def",
         "--rows", str(tmp_path / "map"), "--device", "cpu"]
    )  # fmt: skip
    assert code == 2 and re.search(message, capsys.readouterr().err)
