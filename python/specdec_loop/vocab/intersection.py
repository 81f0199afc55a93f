"""The tokens that two vocabularies share (token-level intersection, TLI: arXiv 2502.05202).

A drafter with another tokenizer may draw tokens whose text is a token of the target too. Its head is trimmed to
`draft_ids`, and what it draws is renamed to `target_ids`; verification sees a draft distribution over target ids and
stays lossless, whatever the names mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .identity import check_hash, read, tokenizer_hash, write
from .rows import check_ids, check_rows

KIND = "specdec vocabulary intersection"
SPACE_SIGNS = ("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "\N{LOWER ONE EIGHTH BLOCK}")  # byte-level, SentencePiece


class Intersection(NamedTuple):
    """Shared tokens, in the order of their target ids: entry i of both lists is the same text."""

    target_ids: Tensor  # [R] int32, ascending: `draft_vocab` of verification
    draft_ids: Tensor  # [R] int32, each once, in any order: `rows` of the head ops
    target_hash: str
    draft_hash: str

    def to_target(self, draft_vocab_size: int) -> Tensor:
        """[draft_vocab_size] int32: the target id of each draft id, -1 where there is none."""
        check_ids("draft_ids", self.draft_ids, draft_vocab_size)
        table = torch.full((draft_vocab_size,), -1, dtype=torch.int32)
        table[self.draft_ids.long()] = self.target_ids
        return table


def intersect(
    target_tokenizer, draft_tokenizer, *, target_vocab_size: int | None = None, draft_vocab_size: int | None = None
) -> Intersection:
    """The tokens whose text both vocabularies hold; the sign that stands for a space may differ.

    A byte-level vocabulary writes text beyond ASCII in a way of its own, so beside one that is not byte-level such
    tokens are not found. Of several ids with the same text in one vocabulary the lowest counts.

    Args:
        target_tokenizer, draft_tokenizer: Hugging Face tokenizers.
        target_vocab_size, draft_vocab_size: rows of the heads; tokens behind them do not count. Default: all tokens.

    Raises:
        ValueError: no token is shared.
    """
    target, draft = _texts(target_tokenizer, target_vocab_size), _texts(draft_tokenizer, draft_vocab_size)
    pairs = sorted((number, draft[text]) for text, number in target.items() if text in draft)
    if not pairs:
        raise ValueError(f"draft_tokenizer: expected shared tokens, got none among {len(target)} and {len(draft)}")
    target_ids, draft_ids = torch.tensor(pairs, dtype=torch.int32).unbind(1)
    hashes = tokenizer_hash(target_tokenizer), tokenizer_hash(draft_tokenizer)
    return Intersection(target_ids.contiguous(), draft_ids.contiguous(), *hashes)


def save_intersection(path: Path | str, shared: Intersection) -> None:
    """Write an intersection as safetensors, with the hashes of both vocabularies."""
    _check(shared)
    tensors = {"target_ids": shared.target_ids, "draft_ids": shared.draft_ids}
    hashes = {name: tokenizer_hash(getattr(shared, name)) for name in ("target_hash", "draft_hash")}
    write(path, KIND, tensors, hashes)


def load_intersection(path: Path | str, target_tokenizer, draft_tokenizer) -> Intersection:
    """Read an intersection and check that it is of these two vocabularies.

    Raises:
        FileNotFoundError, TypeError, ValueError: no such file, another kind of file, a foreign vocabulary, or ids that
            are doubled or, the target's, not ascending.
    """
    tensors, metadata = read(path, KIND, ("target_ids", "draft_ids"))
    shared = Intersection(*tensors, metadata.get("target_hash", ""), metadata.get("draft_hash", ""))
    check_hash(Path(path), shared.target_hash, target_tokenizer, "target_tokenizer")
    check_hash(Path(path), shared.draft_hash, draft_tokenizer, "draft_tokenizer")
    _check(shared)
    return shared


def _check(shared: Intersection) -> None:
    limit = torch.iinfo(torch.int32).max
    check_rows("target_ids", shared.target_ids, limit)
    check_ids("draft_ids", shared.draft_ids, limit)
    if shared.draft_ids.shape != shared.target_ids.shape:
        raise ValueError(
            f"draft_ids: expected one for each of {len(shared.target_ids)} target ids, got {len(shared.draft_ids)}"
        )


def _texts(tokenizer, vocab_size: int | None) -> dict[str, int]:
    """The lowest id of each text, a space written as a space."""
    sign = _space_sign(tokenizer)
    texts: dict[str, int] = {}
    for token, number in tokenizer.get_vocab().items():
        text = token.replace(sign, " ") if sign else token
        if vocab_size is None or number < vocab_size:
            texts[text] = min(number, texts.get(text, number))
    return texts


def _space_sign(tokenizer) -> str | None:
    """What a tokenizer writes for a space, unless that is a space."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(" ", add_special_tokens=False)["input_ids"])
    # The token of a space may also be an unknown one, whose name says nothing.
    return next((sign for sign in SPACE_SIGNS if tokens and tokens[0].startswith(sign)), None)
