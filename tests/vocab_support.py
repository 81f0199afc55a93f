"""Small tokenizers, and corpora with two halves each, for the tests of the vocabulary toolkit."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specdec_loop import tiny
from specdec_loop.tiny.pair import DATA
from specdec_loop.tiny.tokenizer import load_tokenizer
from specdec_loop.vocab import encode_texts, read_pieces

ROOT = Path(__file__).resolve().parents[1]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"


def byte_level(*more: str, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the 256 bytes and what else is named; `special` are its special tokens."""
    vocabulary = {token: i for i, token in enumerate([*ALPHABET, *more])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def word_pieces(*tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer that writes a space as SentencePiece does."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=tokens[0]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=tokens[0])


@lru_cache(maxsize=1)
def pair_tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(DATA)


def zipf(vocabulary: int = 32000, tokens: int = 60_000) -> list[Tensor]:
    """Random ids with frequencies like those of words; every document has some favourites of its own."""
    generator = torch.Generator().manual_seed(0)
    names = torch.randperm(vocabulary, generator=generator)
    documents = []
    for _ in range(20):
        weights = 1 / (torch.arange(vocabulary) + 3.0) ** 1.05
        weights[torch.randint(vocabulary, (30,), generator=generator)] += 2e-3
        documents.append(names[torch.multinomial(weights, tokens // 20, replacement=True, generator=generator)])
    return documents


def source_code() -> list[Tensor]:
    """Files of the running Python's standard library."""
    return encode_texts(pair_tokenizer(), [file.text for file in tiny.corpus.heldout_stdlib()[:24]])


def prose() -> list[Tensor]:
    """This repository's own documents, by the page."""
    texts = "".join(path.read_text() for path in [*sorted(ROOT.glob("*.md")), ROOT / "LICENSE"])
    return encode_texts(pair_tokenizer(), read_pieces([texts], 2000))


CORPORA = {"zipf": zipf, "source code": source_code, "prose": prose}


@lru_cache(maxsize=3)
def halves(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Documents to count on and held-out ones, in turn."""
    documents = CORPORA[name]()
    return documents[::2], documents[1::2]
