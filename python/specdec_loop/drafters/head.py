"""A drafter's LM head through the head ops: logits exist only where verification needs them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import (
    HeadSample,
    HeadTopK,
    Philox,
    QuantizedHead,
    RowClusters,
    head_sample,
    head_topk,
    low_rank_factors,
    low_rank_head,
    quantize_head,
    route,
    scatter_logits,
)

QUANTIZED = ("int8", "int4", "fp8")
HEAD_KINDS = ("full", "trimmed", *QUANTIZED)


class Head:
    """The output embedding of a model, or some of its rows.

    The weight stays where it is: a trimmed head gathers `rows` of it, so a tied embedding is not copied. A scale that
    the model puts on its logits (Cohere, Granite) is applied; a soft cap (Gemma 2) is not. The output law does not
    depend on either, because q is what is drawn from, but the acceptance does.

    Args:
        model: a causal LM.
        rows: [R] ascending ids to which drafts are limited; default: all.
        dtype: `int8`, `int4` or `fp8` reads a quantised copy of the weight instead (see `quantize_head`).
    """

    def __init__(self, model: PreTrainedModel, rows: Tensor | None = None, dtype: str | None = None):
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"model: expected one with an LM head, got {type(model).__name__}")
        weight = layer.weight.detach()
        self.weight: Tensor | QuantizedHead = weight
        self.bias = getattr(layer, "bias", None)
        size = weight.shape[0]
        self.bytes_replaced = weight.nbytes  # of the model's own head, which is not read as such
        config = model.config.get_text_config()
        factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        # One number for each row, which is the form in which the head ops take a scale.
        self.scale = None if factor == 1.0 else torch.full((size,), factor, dtype=torch.float32, device=weight.device)
        if dtype is not None:
            self.weight = quantize_head(weight, dtype)
            self.weight = self.weight._replace(scales=self.weight.scales * factor)
            self.scale = None
        if rows is not None:
            rows = torch.as_tensor(rows, device=weight.device).to(torch.int32)
            inside = len(rows) and int(rows.min()) >= 0 and int(rows.max()) < size
            if rows.ndim != 1 or not inside or not bool((rows[1:] > rows[:-1]).all()):
                raise ValueError(f"rows: expected ascending ids in 0..{size - 1}, got {list(rows.shape)} {rows}")
        self.rows = rows
        self.size = size if rows is None else len(rows)
        self.backend: str | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the weight that a step reads."""
        parts = self.weight[:2] if isinstance(self.weight, QuantizedHead) else (self.weight,)
        return sum(part[0].nbytes for part in parts) * self.size

    def topk(self, hidden: Tensor, k: int, *, requests: int | None = None, return_logits: bool = False) -> HeadTopK:
        """The k largest logits of each row of [n, D]; k is cut to the rows there are.

        requests: how many requests the rows belong to, as many to each, one request behind the other; default: n.
        """
        return self._call(hidden, min(k, self.size), requests, return_logits=return_logits)

    def sample(
        self, hidden: Tensor, k: int, rng: Philox, temperature: float | Tensor, *, requests: int | None = None
    ) -> HeadSample:
        """Draw k tokens without replacement for each row of [n, D], and all logits, which verification needs as q."""
        return self._call(hidden, k, requests, rng=rng, temperature=temperature, return_logits=True)

    def _call(self, hidden: Tensor, k: int, requests: int | None, **options) -> HeadTopK | HeadSample:
        op = head_sample if "rng" in options else head_topk
        return op(hidden, self.weight, k, rows=self.rows, **self._common, **options)

    @property
    def _common(self) -> dict:
        return {"bias": self.bias, "scale": self.scale, "backend": self.backend}


class LowRankHead(Head):
    """A head in two thin stages over the whole vocabulary (SlimSpec, arXiv 2605.10453).

    Args:
        model: a causal LM.
        rank: of the factors that `low_rank_factors` makes of its head.
        factors: (down [r, D], up [V, r]) instead, e.g. trained ones; up may be a QuantizedHead.
        hidden: [n, D] calibration states for `low_rank_factors`.
        rows: as for Head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rank: int | None = None,
        *,
        factors: tuple[Tensor, Tensor | QuantizedHead] | None = None,
        hidden: Tensor | None = None,
        rows: Tensor | None = None,
    ):
        super().__init__(model, rows)
        if (rank is None) == (factors is None):
            raise ValueError(f"rank: expected either rank or factors, got {'neither' if rank is None else 'both'}")
        height = len(self.weight)
        self.down, self.weight = factors or low_rank_factors(self.weight, rank, hidden=hidden)
        up = self.weight.values if isinstance(self.weight, QuantizedHead) else self.weight
        if len(up) != height:
            raise ValueError(f"factors: expected {height} rows of the second, as the model's head has, got {len(up)}")
        if isinstance(self.weight, QuantizedHead) and self.scale is not None:
            # All rows of a model's head share one factor.
            self.weight = self.weight._replace(scales=self.weight.scales * self.scale[0])
            self.scale = None

    @property
    def bytes_read(self) -> int:
        """Bytes of both stages that a step reads."""
        return self.down.nbytes + super().bytes_read

    def _call(self, hidden: Tensor, k: int, requests: int | None, **options) -> HeadTopK | HeadSample:
        return low_rank_head(hidden, self.down, self.weight, k, rows=self.rows, **self._common, **options)


class ShortlistHead(Head):
    """A head that reads some clusters of its rows, picked anew by every hidden state (DynaSpec, arXiv 2510.13847).

    The nodes that a level of one request's tree expands share the union of what they picked. q of a node is zero
    outside of the list it was drawn from, so it is handed to verification over the whole vocabulary.

    Args:
        model: a causal LM.
        clusters: of its head's rows, see `specdec_kernels.cluster_rows`.
        count: clusters that each node picks.
        budget: clusters of a request's list at most; default 2 * count.
    """

    def __init__(self, model: PreTrainedModel, clusters: RowClusters, count: int, *, budget: int | None = None):
        super().__init__(model)
        self.clusters, self.count = clusters, count
        self.budget = min(2 * count if budget is None else budget, len(clusters.rows))

    @property
    def bytes_read(self) -> int:
        """Bytes of the centroids and of the rows that one node picks."""
        rows = len(self.clusters.always) + self.count * self.clusters.rows.shape[1]
        return self.clusters.centroids.nbytes + rows * self.weight[0].nbytes

    def _call(self, hidden: Tensor, k: int, requests: int | None, **options) -> HeadTopK | HeadSample:
        requests = len(hidden) if requests is None else requests
        index = torch.arange(requests, dtype=torch.int32, device=hidden.device)
        groups = index.repeat_interleave(len(hidden) // max(requests, 1))
        lists = route(
            hidden, self.clusters, self.count, row_groups=groups, groups=requests, budget=self.budget
        )  # fmt: skip
        op = head_sample if "rng" in options else head_topk
        step = op(hidden, self.weight, k, rows=lists.rows, row_groups=groups, **self._common, **options)
        if step.all_logits is None:
            return step
        return step._replace(all_logits=scatter_logits(step.all_logits, lists, self.size))


def make_head(model: PreTrainedModel, kind: str | Head | None, rows: Tensor | None) -> Head:
    """A head of one of `HEAD_KINDS`; default: `trimmed` where there are rows, else `full`. A Head is handed back."""
    if isinstance(kind, Head):
        if rows is not None:
            raise ValueError("rows: expected None beside a Head, which brings its own")
        return kind
    if kind is None:
        kind = "full" if rows is None else "trimmed"
    if kind not in HEAD_KINDS:
        raise ValueError(f"head: expected a Head or one of {', '.join(map(repr, HEAD_KINDS))}, got {kind!r}")
    if (kind == "trimmed" and rows is None) or (kind == "full" and rows is not None):
        raise ValueError(f"rows: expected {'ids' if rows is None else 'None'} with head {kind!r}")
    return Head(model, rows, kind if kind in QUANTIZED else None)
