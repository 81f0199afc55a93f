"""Text to count, text that the target writes, and tokens that two tokenizers share."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers.generation.candidate_generator import AssistantToTargetTranslator

from loop_support import llama, noisy, one_thread  # noqa: F401 (a fixture)
from specdec_loop import autoregressive
from specdec_loop.vocab import (
    Intersection,
    encode_texts,
    generate_texts,
    intersect,
    load_intersection,
    passages,
    read_pieces,
    save_intersection,
    split,
)
from vocab_support import SPACE_MARK, byte_level, word_pieces


class TestText:
    def test_pieces_end_where_lines_do(self, tmp_path):
        text = "".join(f"line {i}\n" for i in range(50)) + "x" * 100 + "end"
        (tmp_path / "text").write_text(text)
        for source in (text, tmp_path / "text"):
            pieces = list(read_pieces([source], 40))
            assert "".join(pieces) == text and max(map(len, pieces)) <= 80
            assert all(piece.endswith("\n") for piece in pieces[:8])

    def test_strings_and_files_in_their_order(self, tmp_path):
        (tmp_path / "text").write_text("h\u00e9", encoding="utf-8")
        shown = io.StringIO()
        found = encode_texts(byte_level(), ["ab", tmp_path / "text", ""], Console(file=shown))
        expected = [byte_level()(text)["input_ids"] for text in ("ab", "h\u00e9")]
        assert [ids.tolist() for ids in found] == expected and len(expected[1]) == 3
        assert "tokenizing" in shown.getvalue()

    def test_special_tokens_are_not_text(self):
        tokenizer = byte_level("</s>", "<s>", eos_token="</s>", bos_token="<s>")
        (ids,) = encode_texts(tokenizer, ["ab"])
        assert len(ids) == 2

    def test_files_that_are_no_text(self, tmp_path):
        (tmp_path / "text").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(ValueError, match=r"^texts: expected UTF-8 in .*text, got "):
            encode_texts(byte_level(), [tmp_path / "text"])
        with pytest.raises(FileNotFoundError):
            encode_texts(byte_level(), [tmp_path / "nothing"])

    def test_passages_are_spread_over_all(self):
        sequences = [torch.arange(10), torch.arange(100, 103), torch.arange(200, 212)]
        assert [row.tolist() for row in passages(sequences, 5, 2)] == [list(range(5)), list(range(200, 205))]
        assert [int(row[0]) for row in passages(sequences, 5, 9)] == [0, 5, 200, 205]
        with pytest.raises(ValueError, match=r"^sequences: expected one of at least 13 tokens, got 12 as the longest"):
            passages(sequences, 13, 1)

    def test_split_holds_out_documents_or_ends(self):
        many = [torch.full((3,), i) for i in range(11)]
        counted, heldout = split(many)
        assert [int(s[0]) for s in heldout] == [4, 9]
        assert [int(s[0]) for s in counted] == [0, 1, 2, 3, 5, 6, 7, 8, 10]
        counted, heldout = split([torch.arange(10), torch.arange(3)])
        assert [s.tolist() for s in counted] == [list(range(8)), [0, 1, 2]]
        assert [s.tolist() for s in heldout] == [[8, 9]]
        with pytest.raises(ValueError, match=r"^sequences: expected 5 tokens or more in one of them, got \[3\]"):
            split([torch.arange(3)])
        with pytest.raises(ValueError, match=r"^every: expected >= 2, got 1"):
            split(many, 1)


class TestGenerated:
    PROMPTS = (torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6]))

    def test_greedy_text_is_that_of_plain_decoding(self):
        target = llama(0)
        shown = io.StringIO()
        texts = generate_texts(
            target, self.PROMPTS, max_new_tokens=9, temperature=0.0, drafter=noisy(target, 0.03), batch=2,
            console=Console(file=shown),
        )  # fmt: skip
        plain = autoregressive(target, list(self.PROMPTS), max_new_tokens=9).tokens
        assert [text.tolist() for text in texts] == plain
        assert "27/27" in shown.getvalue()

    def test_a_seed_says_what_is_drawn_whatever_the_batch(self):
        target = llama(0)
        one, all_at_once, other = (
            [t.tolist() for t in generate_texts(target, self.PROMPTS, max_new_tokens=9, batch=batch, seed=seed)]
            for batch, seed in ((1, 5), (3, 5), (3, 6))
        )
        assert one == all_at_once != other
        # Seeds count up from the first, so a run that was cut in two goes on where it was.
        rest = generate_texts(target, self.PROMPTS[1:], max_new_tokens=9, seed=6)
        assert [t.tolist() for t in rest] == one[1:]

    def test_text_ends_at_its_end(self):
        target = llama(0)
        (text,) = generate_texts(target, self.PROMPTS[:1], max_new_tokens=9, temperature=0.0)
        target.generation_config.eos_token_id = int(text[3])
        (short,) = generate_texts(target, self.PROMPTS[:1], max_new_tokens=9, temperature=0.0)
        assert short.tolist() == text[: text.tolist().index(int(text[3])) + 1].tolist()


class TestIntersection:
    """Byte-level against SentencePiece's sign for a space."""

    TARGET = byte_level("\u0120hello", "world", "\u0120only", "<s>")
    DRAFT = word_pieces("<unk>", SPACE_MARK, f"{SPACE_MARK}hello", "world", "z", "\u0120", "\u0120only", "<s>")

    def test_shared_text(self):
        shared = intersect(self.TARGET, self.DRAFT)
        names = self.TARGET.convert_ids_to_tokens(shared.target_ids.tolist())
        pairs = dict(zip(names, self.DRAFT.convert_ids_to_tokens(shared.draft_ids.tolist()), strict=True))
        # The draft's "\u0120only" is a letter and a word, not a space and a word.
        assert pairs == {
            "\u0120": SPACE_MARK, "\u0120hello": f"{SPACE_MARK}hello", "world": "world", "z": "z", "<s>": "<s>",
        }  # fmt: skip
        assert bool((shared.target_ids.diff() > 0).all())
        assert shared.target_ids.dtype == shared.draft_ids.dtype == torch.int32

    def test_agrees_with_transformers(self):
        """Where no token holds the other tokenizer's sign for a space as a letter."""
        draft = word_pieces("<unk>", SPACE_MARK, f"{SPACE_MARK}hello", "world", "y", "z", "<s>")
        theirs = AssistantToTargetTranslator(self.TARGET, draft, len(self.TARGET)).target_to_assistant_input_ids
        ours = intersect(self.TARGET, draft)
        assert dict(zip(ours.target_ids.tolist(), ours.draft_ids.tolist(), strict=True)) == theirs

    def test_table_of_a_draft_vocabulary(self):
        shared = intersect(self.TARGET, self.DRAFT)
        table = shared.to_target(10)
        assert table.dtype == torch.int32 and int((table >= 0).sum()) == len(shared.target_ids)
        assert torch.equal(table[shared.draft_ids.long()], shared.target_ids)
        with pytest.raises(ValueError, match=r"draft_ids: expected ids in 0\.\.3"):
            shared.to_target(4)

    def test_tokens_behind_a_head_do_not_count(self):
        shared = intersect(self.TARGET, self.DRAFT, target_vocab_size=257, draft_vocab_size=4)
        assert self.TARGET.convert_ids_to_tokens(shared.target_ids.tolist()) == ["\u0120", "\u0120hello"]

    def test_of_one_tokenizer_is_all_of_it(self):
        shared = intersect(self.TARGET, self.TARGET)
        assert torch.equal(shared.target_ids, shared.draft_ids) and len(shared.target_ids) == len(self.TARGET)

    def test_nothing_is_shared(self):
        with pytest.raises(ValueError, match=r"^draft_tokenizer: expected shared tokens, got none among 260 and 2"):
            intersect(self.TARGET, word_pieces("<unk>", "no such token"))

    def test_file(self, tmp_path):
        shared = intersect(self.TARGET, self.DRAFT)
        save_intersection(tmp_path / "tli", shared)
        found = load_intersection(tmp_path / "tli", self.TARGET, self.DRAFT)
        assert torch.equal(found.target_ids, shared.target_ids) and torch.equal(found.draft_ids, shared.draft_ids)
        with pytest.raises(ValueError, match=r"^target_tokenizer: expected a file for the vocabulary"):
            load_intersection(tmp_path / "tli", self.DRAFT, self.DRAFT)
        with pytest.raises(ValueError, match=r"^draft_tokenizer: expected a file for the vocabulary"):
            load_intersection(tmp_path / "tli", self.TARGET, self.TARGET)
        save_file({"rows": shared.target_ids}, tmp_path / "other")
        with pytest.raises(
            ValueError,
            match="expected a specdec vocabulary intersection file, got one without metadata that holds rows",
        ):
            load_intersection(tmp_path / "other", self.TARGET, self.DRAFT)

    def test_ids_that_cannot_be_drawn(self, tmp_path):
        shared = intersect(self.TARGET, self.DRAFT)
        for changed, message in (
            (shared._replace(target_ids=shared.target_ids.flip(0)), "target_ids: expected ascending ids"),
            (shared._replace(draft_ids=torch.zeros_like(shared.draft_ids)), "draft_ids: expected each id once"),
            (
                shared._replace(draft_ids=shared.draft_ids[1:]),
                "draft_ids: expected one for each of 5 target ids, got 4",
            ),
        ):
            assert isinstance(changed, Intersection)
            with pytest.raises(ValueError, match=rf"^{message}"):
                save_intersection(tmp_path / "tli", changed)
