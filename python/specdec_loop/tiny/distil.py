"""The drafter: trained to say what the target says, on the corpus and on the target's own text."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .fit import Schedule, Windows
from .sampled import UnigramSampler, candidate_logits, sampled_distillation


def mixed_batches(
    corpus: np.ndarray, generated: np.ndarray, schedule: Schedule, share: float
) -> Callable[[int], Tensor]:
    """The batch of a step: corpus windows and, for the given share of the steps, text of the target.

    corpus: [T] uint16; generated: [R, L] uint16.
    """
    windows = Windows(corpus, schedule.length, seed=5)
    rows = schedule.batch * schedule.length // (generated.shape[1] - 1)

    def batch_of(step: int) -> Tensor:
        if int((step + 1) * share) == int(step * share):
            return windows.batch(step, schedule.batch)
        picked = np.random.default_rng((6, step)).integers(0, len(generated), size=rows)
        return torch.from_numpy(generated[picked].astype(np.int64))

    return batch_of


def distillation_loss(
    target: LlamaForCausalLM,
    drafter: LlamaForCausalLM,
    sampler: UnigramSampler,
    hard: float,
    bf16: bool,
    compiled: bool,
) -> Callable[[Tensor], Tensor]:
    """The loss of a batch [B, L + 1] int64: see `sampled_distillation`."""
    teacher, student = target.model, drafter.model
    if compiled:
        teacher, student = torch.compile(teacher, dynamic=False), torch.compile(student, dynamic=False)

    def loss_of(batch: Tensor) -> Tensor:
        candidates = sampler.draw(batch[:, 1:].flatten())
        inputs = batch[:, :-1]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                hidden = teacher(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
                wanted = candidate_logits(hidden, target.lm_head.weight, candidates)
            hidden = student(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
            given = candidate_logits(hidden, drafter.lm_head.weight, candidates)
        return sampled_distillation(given, wanted, candidates, hard)

    return loss_of
