"""Who proposes."""

from .base import Draft, Drafter, NoDrafter, Plan, Tree
from .head import HEAD_KINDS, Head, LowRankHead, ShortlistHead
from .model import ModelDrafter
from .ngram import NgramDrafter

__all__ = [
    "HEAD_KINDS",
    "Draft",
    "Drafter",
    "Head",
    "LowRankHead",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "Plan",
    "ShortlistHead",
    "Tree",
]
