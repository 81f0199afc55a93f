"""The reference decoding loop: speculative decoding of any Hugging Face causal LM with specdec_kernels' ops."""

from . import hf, policies, vocab
from .drafters import Draft, Drafter, ModelDrafter, NgramDrafter, NoDrafter, Tree
from .generate import Generated, autoregressive, generate
from .statistics import Statistics

__all__ = [
    "Draft",
    "Drafter",
    "Generated",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "Statistics",
    "Tree",
    "autoregressive",
    "generate",
    "hf",
    "policies",
    "vocab",
]
