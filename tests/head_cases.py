"""What the head's tests share: inputs, and the definition in float64 that both backends are held against."""

from __future__ import annotations

import pytest
import torch

from specdec_kernels import backends

BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(backends.MISSING["cpu"] is not None, reason=str(backends.MISSING["cpu"]))
    ),
]
# Products are exact in fp32, sums of D of them are not; logits here are of order 1.
TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}


def inputs(batch: int, height: int, dim: int, dtype=torch.float32, seed: int = 0):
    """(hidden [B, D], weight [V, D]) whose logits have variance 4."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, dim, generator=generator)
    weight = torch.randn(height, dim, generator=generator) * (2 / max(dim, 1) ** 0.5)
    return hidden.to(dtype), weight.to(dtype)


def whole(batch: int, height: int, dim: int, dtype=torch.float32, seed: int = 0):
    """The same with small whole numbers: every logit is exact in every backend, and most are tied."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-1, 2, (batch, dim), generator=generator)
    weight = torch.randint(-1, 2, (height, dim), generator=generator)
    return hidden.to(dtype), weight.to(dtype)


def logits64(hidden, weight, rows=None, bias=None, scale=None):
    """[B, R] logits in float64."""
    rows = torch.arange(len(weight), device=weight.device) if rows is None else rows.long()
    rows = rows.expand(len(hidden), rows.shape[-1])
    logits = torch.einsum("bd,brd->br", hidden.double(), weight.double()[rows])
    if scale is not None:
        logits = logits * scale.double()[rows]
    if bias is not None:
        logits = logits + bias.double()[rows]
    return logits


def lse_and_entropy(logits, temperature):
    """Both of softmax(logits / temperature), float64."""
    scaled = logits / torch.as_tensor(temperature, dtype=torch.float64).expand(len(logits))[:, None]
    law = torch.distributions.Categorical(logits=scaled, validate_args=False)
    return torch.logsumexp(scaled, 1), law.entropy()


def check_ranking(tokens, keys, ids):
    """`tokens` [B, k] are the first k of `ids` [B, R] by descending `keys` [B, R], up to rounding of the keys."""
    k = min(tokens.shape[1], keys.shape[1])
    best = keys.topk(k, dim=1).values
    for b in range(len(tokens)):
        where = {int(token): i for i, token in enumerate(ids[b].tolist())}
        picked = tokens[b, :k].tolist()
        assert len(set(picked)) == k, f"request {b}: a token came twice: {picked}"
        got = torch.stack([keys[b, where[token]] for token in picked]) if k else best[b]
        torch.testing.assert_close(got, best[b], **TOLERANCE, msg=lambda m, b=b: f"request {b}: {m}")
    assert (tokens[:, k:] == -1).all()
