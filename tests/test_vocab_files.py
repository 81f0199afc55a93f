"""Files of the vocabulary toolkit: what is written comes back, and what does not fit is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import GenerationConfig

from loop_support import llama
from specdec_loop.vocab import (
    Counts,
    VocabMap,
    check_rows,
    count_tokens,
    forced_ids,
    load_counts,
    load_map,
    load_rows,
    merge_counts,
    save_counts,
    save_map,
    tokenizer_hash,
    trimmed_head,
)
from vocab_support import byte_level

OURS, FOREIGN = {"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 1, "b": 2}
MAP = VocabMap(torch.tensor([0, 2, 5], dtype=torch.int32), 9, tokenizer_hash(OURS), (0, 5))


class TestHash:
    def test_is_of_the_content_alone(self):
        assert tokenizer_hash(OURS) == tokenizer_hash(dict(reversed(OURS.items())))
        backend = Tokenizer(models.WordLevel(OURS, unk_token="a"))
        assert tokenizer_hash(backend) == tokenizer_hash(OURS) == tokenizer_hash(tokenizer_hash(OURS))
        assert len({tokenizer_hash(each) for each in (OURS, FOREIGN, {**OURS, "d": 3}, {"a": 0, "b": 1, "C": 2})}) == 4

    def test_counts_added_tokens(self):
        plain, more = byte_level(), byte_level()
        assert tokenizer_hash(plain) == tokenizer_hash(more)
        more.add_tokens(["<tool>"])
        assert tokenizer_hash(plain) != tokenizer_hash(more)

    @pytest.mark.parametrize(
        ("tokenizer", "error", "message"),
        [
            ("map.safetensors", ValueError, "expected a tokenizer or 64 hexadecimal digits, got 'map.safetensors'"),
            (7, TypeError, r"expected one that has get_vocab\(\), a mapping or a hash, got int"),
            ({}, ValueError, "expected at least one token, got none"),
        ],
    )
    def test_what_is_no_tokenizer(self, tokenizer, error, message):
        with pytest.raises(error, match=rf"^tokenizer: {message}"):
            tokenizer_hash(tokenizer)


class TestCounts:
    def test_parts_add_up(self, tmp_path):
        own = tokenizer_hash(OURS)
        parts = [Counts(count_tokens([ids], 3), own) for ids in ([0, 1, 1], [2, 1])]
        for number, part in enumerate(parts):
            save_counts(tmp_path / "new" / f"{number}.safetensors", part)
        loaded = [load_counts(tmp_path / "new" / f"{number}.safetensors", OURS, vocab_size=3) for number in range(2)]
        whole = merge_counts(loaded)
        assert whole.values.tolist() == [1, 3, 1] and whole.values.dtype == torch.int64
        assert whole.tokenizer_hash == own

    def test_of_another_vocabulary(self, tmp_path):
        path = tmp_path / "counts.safetensors"
        save_counts(path, Counts(torch.ones(3, dtype=torch.int64), tokenizer_hash(OURS)))
        with pytest.raises(ValueError, match=r"^tokenizer: expected a file for the vocabulary .*, got .* for another"):
            load_counts(path, FOREIGN)
        with pytest.raises(ValueError, match=r"^vocab_size: expected 4, got counts of 3 ids"):
            load_counts(path, OURS, vocab_size=4)
        ours, foreign = (Counts(torch.ones(3, dtype=torch.int64), tokenizer_hash(each)) for each in (OURS, FOREIGN))
        with pytest.raises(ValueError, match=r"^parts: expected counts of one vocabulary, .* at 1$"):
            merge_counts([ours, foreign])
        with pytest.raises(ValueError, match=r"^parts: expected at least one Counts, got none"):
            merge_counts([])

    def test_that_are_none(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected counts \[V\] int64 >= 0, got torch.float32"):
            save_counts(tmp_path / "counts", Counts(torch.ones(3), tokenizer_hash(OURS)))
        with pytest.raises(TypeError, match=r"^texts: expected integer ids, got float32"):
            count_tokens([torch.tensor([0.5])], 3)


class TestMap:
    def test_comes_back(self, tmp_path):
        path = tmp_path / "new" / "map.safetensors"
        save_map(path, MAP)
        found = load_map(path, OURS, vocab_size=9)
        assert found.rows.tolist() == [0, 2, 5] and found.rows.dtype == torch.int32
        assert found[1:] == MAP[1:]
        assert load_rows(path, OURS, 9).tolist() == [0, 2, 5]
        assert path.stat().st_mode & 0o044 == 0o044

    @pytest.mark.parametrize(
        ("tokenizer", "vocab_size", "message"),
        [
            (FOREIGN, 9, "^tokenizer: expected a file for the vocabulary"),
            (OURS, 8, "^vocab_size: expected a map for a head of 8 rows, got .* for 9$"),
        ],
    )
    def test_for_something_else(self, tmp_path, tokenizer, vocab_size, message):
        save_map(tmp_path / "map", MAP)
        for load in (lambda: load_map(tmp_path / "map", tokenizer, vocab_size=vocab_size),
                     lambda: load_rows(tmp_path / "map", tokenizer, vocab_size)):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                load()

    @pytest.mark.parametrize("load", [lambda path: load_map(path, OURS), lambda path: load_rows(path, OURS, 9)])
    def test_that_is_missing(self, tmp_path, load):
        with pytest.raises(FileNotFoundError, match="expected a specdec vocabulary map file, got no such file"):
            load(tmp_path / "map.safetensors")

    @pytest.mark.parametrize(
        ("rows", "forced", "error", "message"),
        [
            ([0, 5, 2], (), ValueError, "expected ascending ids, got 2 behind 5"),
            ([0, 5, 5], (), ValueError, r"expected each id once, got 1 ids several times, the first 5 at \[1, 2\]"),
            ([0, 5, 9], (), ValueError, r"expected ids in 0\.\.8, got 9"),
            ([-1, 5, 7], (), ValueError, r"expected ids in 0\.\.8, got -1"),
            ([], (), ValueError, r"expected shape \[R\] with R >= 1, got \[0\]"),
            ([[0, 5]], (), ValueError, r"expected shape \[R\] with R >= 1, got \[1, 2\]"),
            ([0.0, 5.0], (), TypeError, "expected integer ids, got float32"),
            ([0, 2], (0, 5), ValueError, r"^forced: expected ids that are among the rows.*, got \[5\], which are not"),
        ],
    )
    def test_rows_that_no_head_has(self, tmp_path, rows, forced, error, message):
        dtype = None if rows and isinstance(rows[0], float) else torch.int32
        vocab_map = VocabMap(torch.tensor(rows, dtype=dtype), 9, tokenizer_hash(OURS), forced)
        with pytest.raises(error, match=message):
            save_map(tmp_path / "map", vocab_map)
        # Files are also written by others.
        metadata = {"format": "specdec vocabulary map", "version": "1", "vocab_size": "9",
                    "tokenizer_hash": tokenizer_hash(OURS), "forced": json.dumps(forced)}  # fmt: skip
        save_file({"rows": vocab_map.rows}, tmp_path / "map", metadata)
        with pytest.raises(error, match=message):
            load_map(tmp_path / "map", OURS)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": "2"}, "expected version 1 of a specdec vocabulary map file, got 2"),
            ({"format": "specdec token counts"}, "vocabulary map file, got a specdec token counts file"),
            ({"vocab_size": "many"}, "expected vocab_size, tokenizer_hash and forced in its metadata"),
            ({"tokenizer_hash": None}, "expected vocab_size, tokenizer_hash and forced in its metadata"),
            ({"name": "ids"}, "expected tensors rows, got none named rows"),
        ],
    )  # fmt: skip
    def test_files_that_are_not_whole(self, tmp_path, change, message):
        metadata = {"name": "rows", "format": "specdec vocabulary map", "version": "1", "vocab_size": "9",
                    "tokenizer_hash": tokenizer_hash(OURS), "forced": "[]", **change}  # fmt: skip
        name = metadata.pop("name")
        metadata = {key: value for key, value in metadata.items() if value is not None}
        save_file({name: MAP.rows}, tmp_path / "map", metadata)
        with pytest.raises(ValueError, match=message):
            load_map(tmp_path / "map", OURS)

    def test_other_files(self, tmp_path):
        (tmp_path / "text").write_text("no tensors at all")
        with pytest.raises(ValueError, match="expected a specdec vocabulary map file in safetensors, got"):
            load_map(tmp_path / "text", OURS)
        save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "plain")
        with pytest.raises(ValueError, match="vocabulary map file, got one without metadata that holds a, b"):
            load_map(tmp_path / "plain", OURS)
        with pytest.raises(ValueError, match=r"rows: expected one tensor in .*, got \['a', 'b'\]"):
            load_rows(tmp_path / "plain", OURS, 9)

    def test_plain_ids_are_sorted_and_checked(self, tmp_path):
        save_file({"ids": torch.tensor([5, 0, 2])}, tmp_path / "plain")
        assert load_rows(tmp_path / "plain", OURS, 9).tolist() == [0, 2, 5]
        with pytest.raises(ValueError, match=r"rows: expected ids in 0\.\.4, got 5"):
            load_rows(tmp_path / "plain", OURS, 5)


class TestForced:
    def test_tokenizer_and_configs_each_once(self):
        tokenizer = byte_level("</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
        several, one, none = (GenerationConfig(eos_token_id=ids) for ids in ([256, 3], 7, None))
        assert forced_ids(tokenizer, several, one, none, vocab_size=258, extra=[7, 9]) == (3, 7, 9, 256, 257)
        # The head has no row for the padding token.
        assert forced_ids(tokenizer, vocab_size=257) == (256,)
        assert forced_ids(byte_level(), vocab_size=256) == ()

    def test_an_end_that_the_head_does_not_have(self):
        with pytest.raises(ValueError, match=r"^eos_token_id: expected ids in 0\.\.255, got \[3, 256\]"):
            forced_ids(byte_level(), GenerationConfig(eos_token_id=[256, 3]), vocab_size=256)
        with pytest.raises(ValueError, match=r"^extra: expected ids in 0\.\.255, got \[-1\]"):
            forced_ids(byte_level(), vocab_size=256, extra=[-1])


class TestTrimmedHead:
    def test_copies_rows_of_an_untied_head(self):
        model = llama(0, tie_word_embeddings=False)
        head = trimmed_head(model, torch.tensor([1, 5, 96]))
        assert torch.equal(head.weight, model.lm_head.weight[[1, 5, 96]]) and head.bias is None
        assert head.token_ids.tolist() == [1, 5, 96] and head.token_ids.dtype == torch.int32
        assert head.weight.data_ptr() != model.lm_head.weight.data_ptr() and not head.weight.requires_grad

    def test_a_tied_head_is_copied_on_request_only(self):
        model = llama(0, tie_word_embeddings=True)
        with pytest.raises(
            ValueError, match=r"^copy_tied: expected True, got False, and the head of LlamaForCausalLM is"
        ):
            trimmed_head(model, torch.tensor([1, 5]))
        head = trimmed_head(model, torch.tensor([1, 5]), copy_tied=True)
        assert torch.equal(head.weight, model.get_input_embeddings().weight[[1, 5]])
        assert model.lm_head.weight.shape[0] == 97

    def test_rows_out_of_range(self):
        with pytest.raises(ValueError, match=r"rows: expected ids in 0\.\.96, got 97"):
            trimmed_head(llama(0, tie_word_embeddings=False), torch.tensor([1, 97]))


def test_ids_of_any_integer_type_are_taken():
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        rows = check_rows("rows", torch.tensor([0, 3], dtype=dtype), 4)
        assert rows.tolist() == [0, 3] and rows.dtype == torch.int32
    assert check_rows("rows", [0, 3], 4).tolist() == [0, 3]
    with pytest.raises(TypeError, match="rows: expected integer ids, got bool"):
        check_rows("rows", torch.tensor([False, True]), 4)
