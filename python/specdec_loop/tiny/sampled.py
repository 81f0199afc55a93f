"""Softmax losses over a few thousand candidates instead of the whole vocabulary.

On two cores the full softmax over 32 000 entries costs several times the rest of the model. The candidates of a step
are shared by all its positions: the step's own labels and draws from the unigram distribution. From each logit the
logarithm of the probability that its entry became a candidate is subtracted; then the loss is least at the same model
as the full softmax, though its value is lower, as fewer entries compete.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Candidates(NamedTuple):
    """The vocabulary entries that stand for all in one step."""

    ids: Tensor  # [C] int64, ascending
    log_inclusion: Tensor  # [C] fp32, log of the probability of being a candidate
    labels: Tensor  # [N] int64, where each position's label stands in `ids`


class UnigramSampler:
    """Draws candidates from the unigram distribution of a token stream."""

    def __init__(self, counts: Tensor, negatives: int, seed: int):
        """`counts`: [V] fp32, how often each entry occurs; `negatives`: unigram draws per step."""
        smoothed = counts.double() + 0.5
        self.probs = (smoothed / smoothed.sum()).float()
        self.cumulative = (smoothed / smoothed.sum()).cumsum(0).float()
        self.negatives = negatives
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, labels: Tensor) -> Candidates:
        """Candidates for the `labels` [N] int64 of one step."""
        uniforms = torch.rand(self.negatives, generator=self.generator)
        drawn = torch.searchsorted(self.cumulative, uniforms).clamp_(max=self.probs.numel() - 1)
        ids = torch.unique(torch.cat([labels, drawn]))
        # The labels count as unigram draws too.
        draws = labels.numel() + self.negatives
        log_inclusion = torch.log(-torch.expm1(-draws * self.probs[ids]))
        return Candidates(ids, log_inclusion, torch.searchsorted(ids, labels))


def candidate_logits(hidden: Tensor, weight: Tensor, candidates: Candidates) -> Tensor:
    """[N, C] fp32 corrected logits of `hidden` [N, D] under the head `weight` [V, D]."""
    logits = hidden @ F.embedding(candidates.ids, weight).T
    return logits.float() - candidates.log_inclusion


def sampled_cross_entropy(hidden: Tensor, weight: Tensor, candidates: Candidates) -> Tensor:
    """Mean cross entropy of the candidates' labels; arguments as in `candidate_logits`."""
    return F.cross_entropy(candidate_logits(hidden, weight, candidates), candidates.labels)


def sampled_distillation(student: Tensor, teacher: Tensor, candidates: Candidates, hard: float) -> Tensor:
    """KL(teacher || student) over the candidates plus `hard` times the cross entropy of the teacher's best candidate.

    student: [N, C] fp32, corrected logits of the model that learns.
    teacher: [N, C] fp32, corrected logits of the model to be imitated.
    """
    log_student = F.log_softmax(student, dim=-1)
    divergence = F.kl_div(log_student, F.log_softmax(teacher, dim=-1), reduction="batchmean", log_target=True)
    best = (teacher + candidates.log_inclusion).argmax(dim=-1)
    return divergence + hard * F.nll_loss(log_student, best)
