"""The requests of a batch: prompts in, tokens out, and when each one is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from specdec_kernels import Philox, SamplingParams


@dataclass
class Request:
    """One request; `index` is its place in the caller's batch, whatever cache row it holds."""

    index: int
    shown: Tensor  # [P'] int64, the prompt as the caller gave it, left padding included: what stopping criteria see
    prompt: Tensor  # [P] int64, without padding
    seed: int
    tokens: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def root(self) -> int:
        """The last committed token, whose keys are not in the cache yet."""
        return self.tokens[-1] if self.tokens else int(self.prompt[-1])

    @property
    def prefix_len(self) -> int:
        """Committed tokens before the root, which is also the root's absolute position."""
        return len(self.prompt) + len(self.tokens) - 1

    def since(self, position: int) -> list[int]:
        """The committed tokens from an absolute position to the root."""
        behind = position - len(self.prompt)
        return self.tokens[behind:] if behind >= 0 else self.prompt[position:].tolist() + self.tokens


@dataclass
class Limits:
    """When a request ends."""

    max_new_tokens: int
    eos: frozenset[int]
    criteria: Sequence[Callable]

    def begin(self, requests: list[Request]) -> list[Request]:
        """The requests that want tokens at all."""
        if self.max_new_tokens:
            return list(requests)
        for request in requests:
            request.finish_reason = "length"
        return []

    def extend(self, request: Request, tokens: list[int]) -> list[int]:
        """Append a round's tokens (accepted drafts, then one of the target's own) up to the request's end.

        Returns:
            The tokens that were kept; `request.finish_reason` is set where the request ended. No tokens at all is how
            verification says that it read NaN or nothing finite.
        """
        if not tokens:
            request.finish_reason = "invalid"
        kept = 0
        for token in tokens:
            if request.finish_reason is not None:
                break
            request.tokens.append(token)
            request.from_draft.append(kept < len(tokens) - 1)
            kept += 1
            if token in self.eos:
                request.finish_reason = "eos"
            elif self.criteria and self._stopped(request):
                request.finish_reason = "stop"
            elif len(request.tokens) >= self.max_new_tokens:
                request.finish_reason = "length"
        return tokens[:kept]

    def _stopped(self, request: Request) -> bool:
        """Ask the criteria as `generate` would after every single token: a [1, n] row, no scores."""
        ids = torch.cat([request.shown, request.shown.new_tensor(request.tokens)])[None]
        return any(bool(torch.as_tensor(criterion(ids, None)).any()) for criterion in self.criteria)


def make_requests(input_ids, attention_mask: Tensor | None, seeds, device: torch.device) -> list[Request]:
    """Requests of a [B, P] tensor with optional left or right padding, or of a sequence of ragged prompts.

    Raises:
        TypeError, ValueError: an argument that does not fit; names it, what came and what was expected.
    """
    if isinstance(input_ids, Tensor):
        rows, prompts = _padded(input_ids, attention_mask)
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None beside a sequence of ragged prompts")
        rows = [torch.as_tensor(prompt) for prompt in input_ids]
        for index, row in enumerate(rows):
            if row.is_floating_point() and row.numel():
                raise TypeError(f"input_ids: expected integers in prompt {index}, got {row.dtype}")
        rows = [row.to(torch.int64) for row in rows]
        prompts = rows
    for index, prompt in enumerate(prompts):
        if prompt.ndim != 1 or len(prompt) < 1:
            raise ValueError(f"input_ids: expected at least one token in prompt {index}, got {list(prompt.shape)}")
    keys = _seeds(seeds, len(prompts))
    return [
        Request(index, row.to(device), prompt.to(device), key)
        for index, (row, prompt, key) in enumerate(zip(rows, prompts, keys, strict=True))
    ]


def _padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Rows as the caller sees them (right padding cut) and prompts without any padding."""
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids: expected an integer tensor [B, P], got {input_ids.dtype} {list(input_ids.shape)}")
    rows = list(input_ids.long())
    if attention_mask is None:
        return rows, rows
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(input_ids.shape)}, got {list(attention_mask.shape)}")
    shown, prompts = [], []
    for index, (row, mask) in enumerate(zip(rows, attention_mask.bool(), strict=True)):
        places = mask.nonzero()[:, 0].tolist()
        if not places or places[-1] - places[0] + 1 != len(places):
            raise ValueError(f"attention_mask: expected one run of ones in row {index}, got {mask.int().tolist()}")
        shown.append(row[: places[-1] + 1])
        prompts.append(row[places[0] : places[-1] + 1])
    return shown, prompts


def _seeds(seeds, batch: int) -> list[int]:
    """One 64-bit seed for each request: given, counted up from one number, or drawn from torch's generator."""
    if seeds is None:
        return torch.randint(-(2**63), 2**63 - 1, (batch,)).tolist()
    if isinstance(seeds, Integral):
        keys = [int(seeds) + index for index in range(batch)]
    else:
        keys = [int(seed) for seed in seeds]
    if len(keys) != batch:
        raise ValueError(f"seeds: expected an int or one for each of {batch} requests, got {len(keys)}")
    return [(key + 2**63) % 2**64 - 2**63 for key in keys]  # any integer, as the signed 64 bits that tensors hold


def eos_ids(eos_token_id, generation_config) -> frozenset[int]:
    """Ids that end a request: one, several, none (an empty sequence), or by default the generation config's."""
    if eos_token_id is None:
        eos_token_id = getattr(generation_config, "eos_token_id", None)
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else map(int, eos_token_id))


def random_streams(requests: list[Request], device: torch.device) -> Philox:
    """Each request's stream at its root: nothing of it depends on the batch around the request."""
    return Philox(
        torch.tensor([request.seed for request in requests], dtype=torch.int64, device=device),
        torch.tensor([request.prefix_len for request in requests], dtype=torch.int64, device=device),
    )


def last_positions(requests: list[Request], max_new_tokens: int, device: torch.device) -> Tensor:
    """[B] int64: the highest position of each request whose logits can give a token that is kept."""
    ends = [max(len(request.prompt) + max_new_tokens - 2, 0) for request in requests]
    return torch.tensor(ends, dtype=torch.int64, device=device)


def rows_of(params: SamplingParams, requests: list[Request]) -> SamplingParams:
    """The parameters of some requests, in their order; plain numbers hold for all."""
    index = [request.index for request in requests]

    def chosen(value):
        return value[index] if isinstance(value, Tensor) else value

    return SamplingParams(*map(chosen, params))


def pad(requests: Iterable[Request], pad_token_id: int) -> Tensor:
    """[B, longest] int64: each request's row and its new tokens, padded on the right."""
    rows = [torch.cat([request.shown, request.shown.new_tensor(request.tokens)]) for request in requests]
    if not rows:
        return torch.empty(0, 0, dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
