"""What the tests of the head's Triton kernels share: where they run, and calls that are compared with the reference."""

from __future__ import annotations

import torch

import specdec_kernels as sk
from head_cases import TOLERANCE, check_ranking


def there(value, device):
    """`value` and the tensors in it on `device`, in the strides that they have."""
    if isinstance(value, torch.Tensor):
        return value if value.device.type == device else value.to(device)
    if isinstance(value, tuple):
        parts = [there(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def stream(batch: int) -> sk.Philox:
    """Seeds beyond 32 bits, negative ones too, offsets that wrap, and rows."""
    index = torch.arange(batch)
    return sk.Philox((index - 2) * 0x1_0000_0003, index * 7 + 2**32 - 9, index.to(torch.int32) % 3)


def call(device, backend, hidden, weight, k, *, draws=False, **options):
    """The op's answer on the CPU."""
    op = sk.head_topk
    if draws:
        op, options["rng"] = sk.head_sample, stream(len(hidden))
    options = {"return_logits": True, **options}
    moved = {name: there(value, device) for name, value in options.items()}
    got = op(there(hidden, device), there(weight, device), k, backend=backend, **moved)
    return type(got)(*(part if part is None else part.cpu() for part in got))


def check(device, hidden, weight, k, *, exact=False, **options):
    """The Triton kernels' answer, after comparing it with the reference's; `exact`: no logit is rounded."""
    want = call("cpu", "reference", hidden, weight, k, **options)
    got = call(device, "triton", hidden, weight, k, **options)
    compare(got, want, exact)
    return got


def compare(got, want, exact=False) -> None:
    torch.testing.assert_close(got.all_logits, want.all_logits, **TOLERANCE)
    torch.testing.assert_close(got.lse, want.lse, **TOLERANCE, equal_nan=True)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)
    assert got.tokens.dtype == torch.int32 and got.logits.dtype == torch.float32
    if exact:
        assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.tokens, want.tokens), f"{got.tokens}\nexpected\n{want.tokens}"


__all__ = ["TOLERANCE", "call", "check", "check_ranking", "compare", "stream", "there"]
