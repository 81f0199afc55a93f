"""When a chain stops growing."""

from .adaedl import AdaEDL
from .base import Fixed, Policy

__all__ = ["AdaEDL", "Fixed", "Policy"]
