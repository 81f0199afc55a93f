"""Who proposes."""

from .base import Draft, Drafter, NoDrafter, Plan, Tree
from .model import ModelDrafter
from .ngram import NgramDrafter

__all__ = ["Draft", "Drafter", "ModelDrafter", "NgramDrafter", "NoDrafter", "Plan", "Tree"]
