"""How many rows: measured time against held-out coverage.

The model, for chains of K drafts. With the whole vocabulary each draft is accepted with probability a, whatever came
before it. A trimmed head never draws a token that it does not hold, and is taken to be as good as before on those that
it holds: the first j drafts of a round are accepted with probability a^j C_j(R), where C_j(R) is the share of runs of j
tokens of held-out text that lie wholly within the R rows. Rare tokens come in clusters, so C_j is counted instead of
taking C_1^j. Then

    tokens for each target call   tau(R)   = sum over j = 0..K of a^j C_j(R)
    seconds of a round            round(R) = target + K (body + head(R))
    speed-up over plain decoding           = plain tau(R) / round(R)

and the best R is that with the fewest seconds for each token. That acceptance depends on coverage alone is an
approximation, and a careful one: a trimmed q is renormalised, which helps where mass was outside, and drafts fail more
often where tokens are rare anyway, so that coverage costs less than this says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .rows import check_order

if TYPE_CHECKING:
    from .latency import Latency
    from .steps import Costs


class Choice(NamedTuple):
    """The chosen size, and the curves it was chosen from."""

    size: int
    sizes: Tensor  # [n] int64, the sizes that were weighed, ascending
    head_seconds: Tensor  # [n] fp64
    coverage: Tensor  # [n] fp64, share of held-out tokens
    efficiency: Tensor  # [n] fp64, tokens for each target call, tau
    round_seconds: Tensor  # [n] fp64
    speedup: Tensor  # [n] fp64, over plain decoding

    @property
    def place(self) -> int:
        """Where the chosen size stands among `sizes`."""
        return int(torch.searchsorted(self.sizes, self.size))


def run_coverage(sequences: Iterable[Tensor], order: Tensor, draft_length: int) -> Tensor:
    """C_j(R): the share of runs of j tokens that lie wholly within the first R ids of an order.

    Args:
        sequences: [T] integer tensors of held-out text; no run goes across two of them.
        order: [V] integer, all ids, best first, with forced ids before all (see `frequency_order`).
        draft_length: K.

    Returns:
        [K, V+1] fp64: row j-1 for runs of j tokens, column R for the first R ids.

    Raises:
        ValueError: an id outside 0..V-1, or no sequence of K tokens.
    """
    order = check_order(order)
    vocab_size = len(order)
    rank = torch.empty(vocab_size, dtype=torch.int64)
    rank[order] = torch.arange(vocab_size)
    runs = torch.zeros(draft_length, vocab_size + 1, dtype=torch.float64)
    for sequence in sequences:
        ids = torch.as_tensor(sequence).to(torch.int64).cpu()
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
            raise ValueError(f"sequences: expected ids in 0..{vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}")
        ranks = rank[ids]
        for j in range(1, min(draft_length, len(ids)) + 1):
            # A run lies within the first R ids from the rank of its rarest token on.
            rarest = ranks.unfold(0, j, 1).amax(1)
            runs[j - 1] += torch.bincount(rarest + 1, minlength=vocab_size + 1)
    runs = runs.cumsum(1)
    if not bool((runs[:, -1] > 0).all()):
        raise ValueError(f"sequences: expected at least one of draft_length={draft_length} tokens, got none")
    return runs / runs[:, -1:]


def block_efficiency(runs: Tensor, acceptance: float) -> Tensor:
    """tau(R) = 1 + sum over j of a^j C_j(R), tokens for each target call.

    Args:
        runs: [K, n] fp64 (see `run_coverage`).
        acceptance: a, in 0..1.

    Returns:
        [n] fp64.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance: expected a number in 0..1, got {acceptance}")
    powers = acceptance ** torch.arange(1, len(runs) + 1, dtype=torch.float64)
    return 1 + powers @ runs


def acceptance_of(efficiency: float, draft_length: int) -> float:
    """The a in 0..1 with 1 + a + ... + a^K = tau: the inverse of `block_efficiency` for the whole vocabulary.

    Raises:
        ValueError: `efficiency` is not in 1..K+1.
    """
    if not 1 <= efficiency <= draft_length + 1:
        raise ValueError(
            f"efficiency: expected 1..{draft_length + 1} for draft_length={draft_length}, got {efficiency}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**j for j in range(draft_length + 1)) < efficiency:
            low = middle
        else:
            high = middle
    return high


def size_grid(vocab_size: int, lowest: int, count: int = 24) -> list[int]:
    """About `count` sizes from `lowest` to V, each larger than the last by the same factor: what to measure."""
    if not 1 <= lowest <= vocab_size:
        raise ValueError(f"lowest: expected 1..{vocab_size}, got {lowest}")
    factor = (vocab_size / lowest) ** (1 / max(count - 1, 1))
    return sorted({*(round(lowest * factor**i) for i in range(count - 1)), vocab_size})


def choose_size(
    runs: Tensor, latency: Latency, costs: Costs, *, acceptance: float, step: int = 64, tolerance: float = 0.005
) -> Choice:
    """The smallest size whose seconds for each token are the fewest, or more by no more than a tolerance.

    Every multiple of `step` within the measured sizes is weighed, and the measured sizes themselves.

    Args:
        runs: [K, V+1] fp64 coverage of held-out text (see `run_coverage`).
        latency: seconds of the head (see `measure_head`).
        costs: seconds of the other steps (see `measure_costs`).
        acceptance: a, in 0..1, of a draft with the whole vocabulary (see `measure_acceptance`).
        step: sizes that are weighed are this far apart.
        tolerance: the share of time that a smaller size may cost. Differences below the noise of any measurement are
            not worth rows, which also cost where this does not look: in verification at a temperature.

    Raises:
        ValueError: costs that are not positive, a negative tolerance, or sizes beyond the vocabulary.
    """
    for name, value in zip(costs._fields, costs, strict=True):
        if not value >= 0 or (name != "body" and value == 0):
            raise ValueError(f"costs.{name}: expected seconds {'>= 0' if name == 'body' else '> 0'}, got {value}")
    if step < 1:
        raise ValueError(f"step: expected >= 1, got {step}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected >= 0, got {tolerance}")
    low, high = int(latency.sizes[0]), int(latency.sizes[-1])
    if high >= runs.shape[1]:
        raise ValueError(f"latency: expected sizes up to V={runs.shape[1] - 1}, got {high}")
    sizes = torch.tensor(sorted({*latency.sizes.tolist(), *range(-(-low // step) * step, high, step)}))
    efficiency = block_efficiency(runs[:, sizes], acceptance)
    head = latency.at(sizes)
    seconds = costs.target + len(runs) * (costs.body + head)
    speedup = costs.plain * efficiency / seconds
    each = seconds / efficiency
    best = int((each <= each.min() * (1 + tolerance)).nonzero()[0])
    return Choice(int(sizes[best]), sizes, head, runs[0, sizes], efficiency, seconds, speedup)
