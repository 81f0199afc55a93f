"""A byte-level BPE tokenizer of 32 000 entries, trained on the corpus and loaded as any Hugging Face tokenizer."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 32_000
EOS = "<|endoftext|>"
EOS_ID = 0


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `texts`; `EOS` is entry 0 and its only special token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, model_max_length=2048, clean_up_tokenization_spaces=False
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str], label: str) -> np.ndarray:
    """[T] uint16: the tokens of all `texts`, one EOS after each."""
    pieces = []
    for text in tqdm(texts, desc=label, unit="file"):
        pieces.append(np.array([*tokenizer.backend_tokenizer.encode(text).ids, EOS_ID], dtype=np.uint16))
    return np.concatenate(pieces)
