"""Random chains for the Triton backend, run there and on the reference."""

from __future__ import annotations

import torch

import specdec_kernels as sk


def packed_bits(keep: torch.Tensor) -> torch.Tensor:
    """[N, ceil(V/32)] int32 bit mask of a [N, V] boolean."""
    words = torch.nn.functional.pad(keep, (0, -keep.shape[1] % 32)).reshape(len(keep), -1, 32)
    bits = (words.long() << torch.arange(32)).sum(2)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


class Case:
    """Random ragged chains whose drafts were drawn from q, with everything that verify_chain takes."""

    def __init__(self, V, *, lengths=(5, 1, 3, 2, 5, 4, 5), dtype=torch.float32, q="dense", seed=0):
        make = torch.Generator().manual_seed(seed)
        self.V, self.lengths = V, list(lengths)
        N, B = sum(lengths), len(lengths)
        self.max_depth = max(lengths, default=1) - 1
        target = torch.randn(N, V, generator=make) * 3
        draft = (target + torch.randn(N, V, generator=make) / 2) if q != "none" else None
        self.vocab = None
        if q == "compact":
            self.vocab = torch.randperm(V, generator=make)[: max(1, V // 3)].sort().values.to(torch.int32)
            draft = draft[:, self.vocab.long()]
        self.target, self.draft = target.to(dtype), None if draft is None else draft.to(dtype)
        # A point mass may stand anywhere: near the top it is accepted now and then.
        drawn = torch.multinomial((2 * target if draft is None else self.draft.float()).softmax(1), 1, generator=make)[
            :, 0
        ]
        drawn = drawn if self.vocab is None else self.vocab.long()[drawn]
        self.tokens = torch.cat([torch.zeros(min(N, 1)), drawn[:-1]]).to(torch.int32)
        self.cu = torch.tensor([0, *torch.tensor(self.lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32)
        self.options = {
            "accept_uniforms": torch.rand(N, generator=make),
            "final_uniforms": torch.rand(B, generator=make),
        }
        self.keep = torch.rand(N, V, generator=make) < 0.7

    def run(self, backend, device, **changes):
        def there(value):
            if isinstance(value, torch.Tensor):
                return value.to(device)
            if isinstance(value, tuple):
                return type(value)(*map(there, value))
            return value

        options = {"max_depth": self.max_depth, "draft_vocab": self.vocab, "logprobs": True, **self.options, **changes}
        tensors = (self.tokens, self.cu, self.target, self.draft)
        found = sk.verify_chain(
            *map(there, tensors), backend=backend, **{name: there(value) for name, value in options.items()}
        )
        return type(found)(*(value.cpu() for value in found))

    def check(self, device, **changes):
        wanted, got = self.run("reference", "cpu", **changes), self.run("triton", device, **changes)
        for name in ("tokens", "nodes", "num_tokens"):
            left, right = getattr(got, name), getattr(wanted, name)
            assert torch.equal(left, right), f"{name}:\n{left}\nexpected\n{right}"
        torch.testing.assert_close(got.logprobs, wanted.logprobs, rtol=1e-5, atol=2e-5, equal_nan=True)
        return got
