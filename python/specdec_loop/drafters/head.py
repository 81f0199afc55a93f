"""A drafter's LM head through the head ops: logits exist only where verification needs them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import HeadSample, HeadTopK, Philox, head_sample, head_topk


class Head:
    """The output embedding of a model, or some of its rows.

    The weight stays where it is: a trimmed head gathers `rows` of it, so a tied embedding is not copied. A scale that
    the model puts on its logits (Cohere, Granite) is applied; a soft cap (Gemma 2) is not. The output law does not
    depend on either, because q is what is drawn from, but the acceptance does.
    """

    def __init__(self, model: PreTrainedModel, rows: Tensor | None):
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"model: expected one with an LM head, got {type(model).__name__}")
        self.weight, self.bias = layer.weight, getattr(layer, "bias", None)
        size = self.weight.shape[0]
        config = model.config.get_text_config()
        factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        # One number for each row, which is the form in which the head ops take a scale.
        self.scale = (
            None if factor == 1.0 else torch.full((size,), factor, dtype=torch.float32, device=self.weight.device)
        )
        if rows is not None:
            rows = torch.as_tensor(rows, device=self.weight.device).to(torch.int32)
            inside = len(rows) and int(rows.min()) >= 0 and int(rows.max()) < size
            if rows.ndim != 1 or not inside or not bool((rows[1:] > rows[:-1]).all()):
                raise ValueError(f"rows: expected ascending ids in 0..{size - 1}, got {list(rows.shape)} {rows}")
        self.rows = rows
        self.size = size if rows is None else len(rows)
        self.backend: str | None = None

    @property
    def bytes_omitted(self) -> int:
        """Bytes of the weight that a step does not read because of `rows`."""
        width = 0 if self.weight is None else self.weight.shape[1] * self.weight.element_size()
        return (self.weight.shape[0] - self.size) * width

    def topk(self, hidden: Tensor, k: int, *, return_logits: bool = False) -> HeadTopK:
        """The k largest logits of each row of [B, D]; k is cut to the rows there are."""
        return head_topk(
            hidden,
            self.weight,
            min(k, self.size),
            rows=self.rows,
            bias=self.bias,
            scale=self.scale,
            return_logits=return_logits,
            backend=self.backend,
        )

    def sample(self, hidden: Tensor, k: int, rng: Philox, temperature: float | Tensor) -> HeadSample:
        """Draw k tokens without replacement for each row of [B, D], and all logits, which verification needs as q."""
        return head_sample(
            hidden,
            self.weight,
            k,
            rng=rng,
            rows=self.rows,
            bias=self.bias,
            scale=self.scale,
            temperature=temperature,
            return_logits=True,
            backend=self.backend,
        )
