"""AdaEDL: stop where the drafter's entropy says that the target will not follow (arXiv 2410.18351)."""

from __future__ import annotations

from torch import Tensor

from .base import Policy


class AdaEDL(Policy):
    """Stop before a draft for which `1 - sqrt(gamma * H(q)) < threshold`; the first draft is always made.

    `1 - sqrt(gamma * H)` bounds the acceptance from below by the entropy H (nats). The threshold moves by `step` after
    each round: up where a moving average of the acceptance is below `aim`, down where a chain ended short of the most
    drafts and the average is well. The paper takes H of softmax(logits); here it is of softmax(logits / temperature),
    which is what the draft is drawn from.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.3,
        gamma: float = 0.2,
        aim: float = 0.9,
        step: float = 0.01,
        rate_decay: float = 0.5,
        threshold_decay: float = 0.9,
    ):
        self.initial, self.gamma, self.aim, self.step = threshold, gamma, aim, step
        self.rate_decay, self.threshold_decay = rate_decay, threshold_decay
        self.longest = 0
        self.thresholds: list[float] = []
        self.rates: list[float] = []

    def start(self, rows: int, draft_length: int) -> None:
        """See Policy."""
        self.longest = draft_length
        self.thresholds = [self.initial] * rows
        self.rates = [self.aim] * rows

    def proceed(self, depth: int, entropy: Tensor) -> list[bool]:
        """See Policy."""
        if depth == 0:
            return [True] * len(self.thresholds)
        bounds = (1 - (self.gamma * entropy).sqrt()).tolist()
        return [bound >= threshold for bound, threshold in zip(bounds, self.thresholds, strict=True)]

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        """See Policy."""
        for row, (offered, hits) in enumerate(zip(drafted, accepted, strict=True)):
            rate = self.rate_decay * self.rates[row] + (1 - self.rate_decay) * hits / max(offered, 1)
            move = self.step if rate < self.aim else -self.step if hits != self.longest else 0.0
            self.rates[row] = rate
            self.thresholds[row] += (1 - self.threshold_decay) * move

    def drop(self, row: int, last: int) -> None:
        """See Policy."""
        for values in (self.thresholds, self.rates):
            values[row] = values[last]
            values.pop()
