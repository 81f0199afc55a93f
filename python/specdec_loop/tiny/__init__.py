"""A small trained pair of Llamas for source code, how it was made, and a way to scale it to a real model's cost."""

from .pair import Pair, load
from .prompts import heldout_prompts
from .scaled import scale

__all__ = ["Pair", "heldout_prompts", "load", "scale"]
