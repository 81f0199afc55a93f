"""The reference decoding loop: speculative decoding of any Hugging Face causal LM with specdec_kernels' ops."""

from . import hf, policies, vocab
from .drafters import Draft, Drafter, LowRankHead, ModelDrafter, NgramDrafter, NoDrafter, ShortlistHead, Tree
from .generate import Generated, autoregressive, generate
from .statistics import Statistics

__all__ = [
    "Draft",
    "Drafter",
    "Generated",
    "LowRankHead",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "ShortlistHead",
    "Statistics",
    "Tree",
    "autoregressive",
    "generate",
    "hf",
    "policies",
    "vocab",
]
