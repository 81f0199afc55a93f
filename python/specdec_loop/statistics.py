"""What a run of the loop cost and what it gained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from specdec_kernels import DraftTree

PHASES = ("prefill", "draft", "target", "verify", "compact")


@dataclass
class Statistics:
    """Counts and times of one call; a ratio of nothing is 0.

    A request-round is one request's share of one target forward, so every ratio is per request whatever the batch.
    """

    rounds: int = 0  # rounds of the batch, one target forward each
    target_calls: int = 0  # forwards of the target after the prefill
    draft_calls: int = 0  # forwards of the drafter after the prefill
    request_rounds: int = 0  # requests in flight, summed over the rounds
    tokens: int = 0  # tokens that came out
    drafted: int = 0  # draft tokens that were verified
    accepted: int = 0  # draft tokens that came out
    offered_at: list[int] = field(default_factory=list)  # request-rounds with a draft at depth 1, 2, ...
    accepted_at: list[int] = field(default_factory=list)  # request-rounds whose path was accepted that deep
    drafter_bytes: int = 0  # what one draft step reads: parameters, a trimmed head counted by its rows
    target_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    wall_seconds: float = 0.0  # of the whole call

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens; a tree offers alternatives, so its rate is low by design."""
        return self.accepted / max(self.drafted, 1)

    @property
    def acceptance_at(self) -> list[float]:
        """For depth 1, 2, ...: the share of request-rounds whose path was accepted that deep."""
        return [hits / max(self.request_rounds, 1) for hits in self.accepted_at]

    @property
    def mean_accepted(self) -> float:
        """Accepted draft tokens for each target call of a request."""
        return self.accepted / max(self.request_rounds, 1)

    @property
    def block_efficiency(self) -> float:
        """Tokens for each target call of a request (tau); 1 without drafts."""
        return self.tokens / max(self.request_rounds, 1)

    @property
    def mbsu(self) -> float:
        """Memory-bound speed-up tau / (c K + 1): c = drafter / target bytes, K = draft forwards of a round."""
        if not self.target_bytes or not self.rounds:
            return 0.0
        cost = self.drafter_bytes / self.target_bytes
        return self.block_efficiency / (cost * self.draft_calls / self.rounds + 1)

    @property
    def decode_seconds(self) -> float:
        """Seconds after the prefill."""
        return max(self.wall_seconds - self.seconds["prefill"], 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all requests for each second after the prefill."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the block's time to a phase. Waits for a CUDA device, else the time falls on whoever waits first."""
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[name] += time.perf_counter() - start

    def count_round(self, tree: DraftTree, paths: list[list[int]], kept: list[list[int]]) -> None:
        """One round: each request's draft, the tokens that verification gave and those that were kept."""
        self.rounds += 1
        self.target_calls += 1
        self.request_rounds += len(kept)
        bounds, parents, tokens = tree.cu_nodes.tolist(), tree.parents.tolist(), tree.tokens.tolist()
        for b, (path, new) in enumerate(zip(paths, kept, strict=True)):
            depths: list[int] = []
            for node in range(bounds[b], bounds[b + 1]):
                parent = parents[node]
                # A token of -1 is no draft, and nothing below it is one.
                dead = parent >= 0 and (tokens[node] < 0 or depths[parent] < 0)
                depths.append(-1 if dead else 0 if parent < 0 else depths[parent] + 1)
            accepted = min(len(new), max(len(path) - 1, 0))
            self.tokens += len(new)
            self.drafted += sum(depth > 0 for depth in depths)
            self.accepted += accepted
            self._count(self.offered_at, max(depths))
            self._count(self.accepted_at, accepted)

    def _count(self, counts: list[int], depth: int) -> None:
        longest = max(depth, len(self.offered_at))
        for each in (self.offered_at, self.accepted_at):
            each.extend([0] * (longest - len(each)))
        for i in range(depth):
            counts[i] += 1

    def add(self, other: Statistics) -> None:
        """Add another run's counts and times, e.g. one prompt after the other."""
        for name in ("rounds", "target_calls", "draft_calls", "request_rounds", "tokens", "drafted", "accepted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("offered_at", "accepted_at"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine.extend([0] * (len(theirs) - len(mine)))
            for i, value in enumerate(theirs):
                mine[i] += value
        self.drafter_bytes, self.target_bytes = other.drafter_bytes, other.target_bytes
        self.wall_seconds += other.wall_seconds
        for name, value in other.seconds.items():
            self.seconds[name] += value


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
