"""What a draft-length policy decides."""

from __future__ import annotations

from torch import Tensor


class Policy:
    """Draft the plan's length. Subclasses stop earlier; what they remember is kept for each request apart."""

    def start(self, rows: int, draft_length: int) -> None:
        """A call with `rows` requests and at most `draft_length` drafts in a chain begins."""

    def proceed(self, depth: int, entropy: Tensor) -> list[bool]:
        """For each request whether it drafts at this depth, 0 for the first.

        Args:
            depth: drafts before this one.
            entropy: [B] fp32, nats, of the distribution from which it would be drawn. Not the draft itself: a chain
                that ends because of the token that was drawn changes the output's law.
        """
        return [True] * len(entropy)

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        """What a round drafted and how much of it was accepted."""

    def drop(self, row: int, last: int) -> None:
        """Request `row` left; the one at `last` takes its place."""


class Fixed(Policy):
    """Always the plan's length."""
