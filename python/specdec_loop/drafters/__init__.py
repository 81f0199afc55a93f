"""Who proposes."""

from .base import Draft, Drafter, NoDrafter, Plan, Tree
from .model import ModelDrafter

__all__ = ["Draft", "Drafter", "ModelDrafter", "NoDrafter", "Plan", "Tree"]
