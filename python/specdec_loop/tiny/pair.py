"""The shipped pair."""

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .tokenizer import load_tokenizer

DATA = Path(str(files(__package__) / "data"))


class Pair(NamedTuple):
    """A target, a drafter that shares its vocabulary, and what goes with them."""

    target: PreTrainedModel
    drafter: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vocab_order: Tensor  # [V] int32, all ids, EOS first, then the most frequent in the target's own text first


def load(dtype: torch.dtype = torch.float32, folder: Path = DATA) -> Pair:
    """The pair in `folder`, by default the shipped one, its weights in `dtype`.

    The models share no configuration object: an attention implementation set on one must not reach the other.
    """
    for name in ("target", "drafter", "vocab_order.safetensors", "tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name}: not there; `python -m specdec_loop.tiny train` makes it")
    target, drafter = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype).eval() for name in ("target", "drafter")
    )
    order = load_file(folder / "vocab_order.safetensors")["vocab_order"]
    return Pair(target, drafter, load_tokenizer(folder), order)
