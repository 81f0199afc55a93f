"""`verify_tree` itself on one node: which of k drawn siblings it accepts, over many draws at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from acceptance_rates import tops
from torch import Tensor

import specdec_kernels as sk


class Row(NamedTuple):
    """Logits of both models at one position, and what they are as distributions."""

    target: Tensor  # [V] fp32 logits
    draft: Tensor  # [V] or [R] fp32 logits
    vocab: Tensor | None  # [R] int32
    temperature: float
    p: Tensor  # [V] fp64
    q: Tensor  # [V] fp64


def make_row(target: Tensor, draft: Tensor, vocab: Tensor | None, temperature: float) -> Row:
    """`draft` [V]; with `vocab` [R] only those columns are the drafter's."""
    p = (target.double() / temperature).softmax(0)
    if vocab is None:
        return Row(target, draft, None, temperature, p, (draft.double() / temperature).softmax(0))
    draft = draft[vocab.long()]
    q = torch.zeros_like(p).index_copy(0, vocab.long(), (draft.double() / temperature).softmax(0))
    return Row(target, draft, vocab, temperature, p, q)


def draws(method: str, q: Tensor, k: int, trials: int, generator: torch.Generator) -> Tensor:
    """[trials, k] int64 siblings, drawn from `q` [V] as the method expects them."""
    if method in ("without_replacement", "traversal"):
        return torch.multinomial(q.float().expand(trials, -1), k, generator=generator)
    if method in ("multi_round", "k_seq"):
        return torch.multinomial(q, trials * k, replacement=True, generator=generator).view(trials, k)
    if method == "target_only":
        return tops(q, k).expand(trials, k)
    top = tops(q, k - 1)
    last = torch.multinomial(q.index_fill(0, top, 0.0), trials, replacement=True, generator=generator)
    return torch.cat([top.expand(trials, -1), last[:, None]], 1)


def decide(method: str, row: Row, tokens: Tensor, generator: torch.Generator, backend: str | None) -> Tensor:
    """[trials] int64: which of the siblings `tokens` [trials, k] verify_tree accepts, k if none."""
    trials, k = tokens.shape
    nodes = trials * (k + 1)
    parents = torch.tensor([-1] + [0] * k, dtype=torch.int32).repeat(trials)
    cu_nodes = torch.arange(trials + 1, dtype=torch.int32) * (k + 1)
    flat = torch.nn.functional.pad(tokens, (1, 0)).to(torch.int32).view(-1)
    uniforms = torch.rand(nodes + trials, generator=generator)
    found = sk.verify_tree(
        sk.DraftTree(flat, parents, cu_nodes, k + 1, 1),
        row.target.expand(nodes, -1),
        None if method == "target_only" else row.draft.expand(nodes, -1),
        method=method,
        draft_vocab=None if method == "target_only" else row.vocab,
        params=sk.SamplingParams(temperature=row.temperature),
        accept_uniforms=uniforms[:nodes],
        final_uniforms=uniforms[nodes:],
        backend=backend,
    )
    if not bool((found.num_tokens > 0).all()):
        raise ValueError(f"row: {method} met logits that are no distribution")
    return torch.where(found.num_tokens == 2, found.nodes[:, 1] - 1, k).long()


def measure(method: str, row: Row, most: int, trials: int, generator: torch.Generator, backend: str | None) -> Tensor:
    """[most] fp64: how often verify_tree accepts one of k = 1..most siblings.

    A rule that tries siblings in order decides about the first k as if there were no others, so one run serves all k.
    """
    if method in ("k_seq", "greedy_multi"):
        runs = []
        for k in range(1, most + 1):
            tokens = draws(method, row.q, k, trials, generator)
            runs.append((decide(method, row, tokens, generator, backend) < k).double().mean())
        return torch.stack(runs)
    accepted = decide(method, row, draws(method, row.q, most, trials, generator), generator, backend)
    return (accepted[:, None] < torch.arange(1, most + 1)).double().mean(0)
