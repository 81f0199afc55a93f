"""Whether an answer of verification is exact but for what fp32 rounds.

A backend in fp32 computes probabilities to about 1e-6 of themselves, and so does the reference in fp32. A walk divides
by residual masses, multiplies ratios up along a path and solves for rho, so how far that moves a threshold depends on
the case; a distance on the last threshold cannot tell. So the band is put on what goes in: an answer is right iff it
is, token for token, the float64 answer to some input within 1e-6 of the given one. Inputs are sampled: a threshold that
the backend's rounding crossed is crossed by about half of the samples that move further than it did.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

import specdec_kernels as sk
from specdec_kernels.reference import coins, rows, verify

# Relative error of a probability, absolute error of a uniform.
BAND = 1e-6
# A log weight z = (x - peak) / T has a few roundings relative to itself: at z = -40 they are all there is of 1e-5.
ROUNDINGS = 2.0**-22
SAMPLES = 64


class _Shaken:
    """What stands where the reference reads rows and coins: the same, moved within the band.

    Request b moves by up to a share sizes[b] of the band. The shares span three decades, for a threshold may react to
    the logarithm of an error: K-SEQ's rho, where many draws leave next to nothing.
    """

    def __init__(self, samples: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = torch.logspace(0, -3, samples, dtype=torch.float64)

    def noise(self, requests: Tensor, *shape: int) -> Tensor:
        """[B, *shape] in [-1, 1] times the size of each of `requests` [B]."""
        noise = 2 * torch.rand(len(requests), *shape, generator=self.generator, dtype=torch.float64) - 1
        return noise * self.sizes[requests].reshape(-1, *(1 for _ in shape))

    def rows(self):
        noise = self.noise

        class ShakenRows(rows.Rows):
            """Filters see the logits as they are: the kept set is exact. What is kept moves, in float64."""

            def log_weights(self, index, requests):
                z, sound = super().log_weights(index, requests)
                V = z.shape[1]
                rounded = noise(requests, 1) + noise(requests, V)  # of the whole row, its slope's; of each z
                return z.double() * (1 + ROUNDINGS * rounded) + BAND * noise(requests, V), sound

            def probs(self, index, requests):
                z, sound = self.log_weights(index, requests)
                return z.softmax(1) * (1 + BAND * noise(requests, 1)), sound

        return ShakenRows

    def coins(self):
        noise = self.noise

        class ShakenCoins(coins.Coins):
            def _of_node(self, node, repeat=None):
                return self._near(super()._of_node(node, repeat))

            def final(self):
                return self._near(super().final())

            def _near(self, u):
                return (u.double() + BAND * noise(torch.arange(len(u)))).clamp(0, 1 - 2.0**-53)

        return ShakenCoins


def is_exact(case, answer: sk.Verified, request: int, samples: int = SAMPLES) -> bool:
    """Whether the walk that `answer` reports for `request` is exact for some input within the band."""
    copies = case.select([request] * samples)
    shaken = _Shaken(samples, seed=request)
    with mock.patch.multiple(verify, Rows=shaken.rows(), Coins=shaken.coins()):
        found = copies.run("reference", logprobs=False)
    return bool(_same(found, sk.Verified(*(x[request : request + 1] for x in answer[:3]))).any())


def _same(a: sk.Verified, b: sk.Verified) -> Tensor:
    """[B] bool: equal tokens, nodes and number."""
    return (a.tokens == b.tokens).all(1) & (a.nodes == b.nodes).all(1) & (a.num_tokens == b.num_tokens)


def assert_same_walks(case, got: sk.Verified, expected: sk.Verified, name: str = "backend") -> int:
    """Every request has the same walk in both, or both are right within the band. Returns how many differ.

    Logprobs are compared where walks are equal.
    """
    for field, a, b in zip(got._fields[:3], got, expected, strict=False):
        assert a.dtype == b.dtype == torch.int32 and a.shape == b.shape, field
    same = _same(got, expected)
    for request in (~same).nonzero()[:, 0].tolist():
        for who, answer in ((name, got), ("reference", expected)):
            assert is_exact(case, answer, request), (
                f"{who} is wrong in request {request}:\n"
                f"{name}: {got.tokens[request].tolist()} nodes {got.nodes[request].tolist()}\n"
                f"reference: {expected.tokens[request].tolist()} nodes {expected.nodes[request].tolist()}"
            )
    if got.logprobs is not None:
        torch.testing.assert_close(got.logprobs[same], expected.logprobs[same], rtol=1e-5, atol=1e-5, equal_nan=True)
    return int((~same).sum())
