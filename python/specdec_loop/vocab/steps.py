"""What the other steps of a round cost, and how often a draft of the whole vocabulary is accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import DraftTree, SamplingParams, verify_chain

from .. import attend
from ..drafters import ModelDrafter
from ..generate import generate
from ..statistics import Statistics
from .choice import acceptance_of
from .latency import time_calls


class Costs(NamedTuple):
    """Seconds of the steps whose time does not depend on the rows of the drafter's head."""

    target: float  # one forward of the target over a draft of K tokens and its root, and verification
    body: float  # one forward of the drafter over one token, without its head
    plain: float  # one forward of the target over one token: what plain decoding takes for each


class Steps(NamedTuple):
    """The same steps, to be called; valid inside `loop_steps`."""

    target: Callable[[], object]
    body: Callable[[], object]
    plain: Callable[[], object]
    shares: tuple[float, float, float]  # of each call's time, what the step takes
    device: torch.device


@contextmanager
def loop_steps(
    target: PreTrainedModel, drafter: PreTrainedModel | None, prompt: Tensor, *, draft_length: int, batch: int = 1
) -> Iterator[Steps]:
    """The steps of a round behind a prompt, as the loop runs them.

    Args:
        target: a causal LM that `specdec_loop.generate` serves.
        drafter: the model that drafts; None for a drafter of one layer of the target's (EAGLE), which is taken to need
            the time of the target's body divided by its layers.
        prompt: [P] integer; decoding behind this length is what is measured.
        draft_length: K.
        batch: requests of this prompt at once.
    """
    drafted = target if drafter is None else drafter
    prompts = [prompt.to(target.device)] * batch
    layers = 1 if drafter is not None else target.config.get_text_config().num_hidden_layers
    with torch.no_grad(), ExitStack() as stack:
        for model in {id(model): model for model in (target, drafted)}.values():
            stack.enter_context(attend.attending(model))
        yield Steps(
            _step(target, prompts, draft_length + 1, verified=True),
            _step(drafted.base_model, prompts, 1),
            _step(target, prompts, 1, verified=True),
            (1.0, 1 / layers, 1.0),
            target.device,
        )


def measure_costs(steps: Steps, *, rounds: int = 20, seconds: float = 30.0, console: Console | None = None) -> Costs:
    """Time the steps in turn; the best of the rounds counts. Options as for `time_calls`."""
    calls = [steps.target, steps.body, steps.plain]
    samples = time_calls(calls, device=steps.device, rounds=rounds, seconds=seconds, label="models", console=console)
    return Costs(*(best * share for best, share in zip(samples.amin(0).tolist(), steps.shares, strict=True)))


def _step(model, prompts: list[Tensor], nodes: int, *, verified: bool = False) -> Callable[[], object]:
    """A forward over chains of `nodes` tokens behind the prompts, as the loop runs it."""
    device, length = prompts[0].device, len(prompts[0])
    ends = torch.full((len(prompts),), length + nodes, dtype=torch.int64, device=device)
    cache = attend.SlotCache(length + nodes, ends)
    attend.prefill(model, cache, prompts, **({"logits_to_keep": 1} if verified else {}))
    roots = torch.stack([prompt[-1:] for prompt in prompts]).to(torch.int32).expand(-1, nodes).contiguous()
    prefix_lens = torch.full((len(prompts),), length - 1, dtype=torch.int32, device=device)

    def step():
        tree = DraftTree.chain(roots)
        positions, where = attend.tree_step(tree, prefix_lens)
        out = attend.forward(model, cache, tree.tokens, positions, where)
        if verified:
            greedy = SamplingParams(temperature=0.0)
            verify_chain(tree.tokens, tree.cu_nodes, out.logits[0], max_depth=nodes - 1, method="greedy", params=greedy)

    return step


def measure_acceptance(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    draft_length: int,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch: int = 8,
    seed: int = 0,
) -> tuple[float, Statistics]:
    """The acceptance of a drafter with its whole vocabulary: that of each draft by which the model explains its runs.

    Args:
        target, drafter: as for `specdec_loop.generate`.
        prompts: [P] integer tensors.
        draft_length: K.
        max_new_tokens, temperature, batch, seed: of the decoding it is measured on.

    Returns:
        The a in 0..1 with (1 - a^(K+1)) / (1 - a) = tokens for each target call, and the statistics of the run.
    """
    total = Statistics()
    for start in range(0, len(prompts), batch):
        part = [prompt.to(target.device) for prompt in prompts[start : start + batch]]
        result = generate(
            target,
            ModelDrafter(drafter),
            part,
            max_new_tokens=max_new_tokens,
            draft_length=draft_length,
            params=SamplingParams(temperature=temperature),
            seeds=seed + start,
        )
        total.add(result.statistics)
    return acceptance_of(total.block_efficiency, draft_length), total
