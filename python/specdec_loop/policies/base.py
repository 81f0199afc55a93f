"""What a draft-length policy decides."""

from __future__ import annotations

from specdec_kernels import HeadSample, HeadTopK


class Policy:
    """Draft the plan's length. Subclasses stop earlier; what they remember is kept for each request apart."""

    def start(self, rows: int, draft_length: int) -> None:
        """A call with `rows` requests and at most `draft_length` drafts in a chain begins."""

    def proceed(self, depth: int, step: HeadTopK | HeadSample) -> list[bool]:
        """For each request whether to keep the draft at this depth, 0 for the first, that the head just proposed."""
        return [True] * len(step.tokens)

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        """What a round drafted and how much of it was accepted."""

    def drop(self, row: int, last: int) -> None:
        """Request `row` left; the one at `last` takes its place."""


class Fixed(Policy):
    """Always the plan's length."""
