"""One optimisation loop for both models: AdamW, warm-up and cosine, checkpoints to go on from when interrupted."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    tokens: int
    batch: int = 4
    length: int = 512
    peak_lr: float = 3e-3
    final_fraction: float = 0.05
    warmup_steps: int = 150
    weight_decay: float = 0.1

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return math.ceil(self.tokens / (self.batch * self.length))

    def lr(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.peak_lr * (self.final_fraction + (1 - self.final_fraction) * cosine)


class Windows:
    """Random access to a token stream in windows; every epoch cuts it at another place and in another order."""

    def __init__(self, tokens: np.ndarray, length: int, seed: int):
        """`tokens`: [T] uint16; windows hold `length` + 1 tokens, the last one only as a label."""
        self.tokens, self.length, self.seed = tokens, length, seed
        self.per_epoch = (len(tokens) - length - 1) // length

    def batch(self, step: int, size: int) -> Tensor:
        """[size, length + 1] int64: the windows of step `step`, the same at every call."""
        rows = []
        for index in range(step * size, (step + 1) * size):
            epoch, within = divmod(index, self.per_epoch)
            rng = np.random.default_rng((self.seed, epoch))
            start = int(rng.integers(self.length)) + self.length * int(rng.permutation(self.per_epoch)[within])
            rows.append(self.tokens[start : start + self.length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


def make_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW that decays the matrices of the layers only: most rows of an embedding see no gradient in most steps."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim == 2 and "embed" not in name else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.peak_lr, betas=(0.9, 0.98), fused=True)


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    batch_of: Callable[[int], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    label: str,
    save_seconds: float = 60.0,
) -> None:
    """Trains `model` in place and goes on from `checkpoint` where there is one.

    loss_of: the loss of one batch of tokens; batch_of: the batch of a step.
    """
    optimizer = make_optimizer(model, schedule)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    def save(step: int) -> None:
        unfinished = checkpoint.with_suffix(".part")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, unfinished)
        unfinished.replace(checkpoint)

    model.train()
    smooth, saved = None, time.monotonic()
    per_step = schedule.batch * schedule.length
    bar = tqdm(total=schedule.steps * per_step, initial=start * per_step, desc=label, unit="tok", unit_scale=True)
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        loss = loss_of(batch_of(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.update(per_step)
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if time.monotonic() - saved > save_seconds:
            save(step + 1)
            saved = time.monotonic()
    bar.close()
    save(schedule.steps)
    model.eval()
