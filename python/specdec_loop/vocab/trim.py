"""A copy of some rows of a head, for engines that cannot gather them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from .rows import check_rows


class TrimmedHead(NamedTuple):
    """Some rows of a head, copied: `weight`, `bias` and `token_ids` of the head ops."""

    weight: Tensor  # [R, D], the head's dtype
    bias: Tensor | None  # [R]
    token_ids: Tensor  # [R] int32, ascending


def trimmed_head(model: PreTrainedModel, rows: Tensor, *, copy_tied: bool = False) -> TrimmedHead:
    """Copy the rows of a model's head; `ModelDrafter(model, rows=rows)` gathers them without a copy.

    Args:
        model: a causal LM; it stays as it is.
        rows: [R] ascending ids.
        copy_tied: also where the head is the embedding. Its rows then cost memory a second time, and writing them back
            as the head would shrink or untie the embedding, which engines ignore or do in silence.

    Raises:
        TypeError, ValueError: ids that do not fit, no head, or one that is tied and was not to be copied.
    """
    layer, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if layer is None:
        raise ValueError(f"model: expected one with an LM head, got {type(model).__name__}")
    tied = embedding is not None and layer.weight.data_ptr() == embedding.weight.data_ptr()
    if tied and not copy_tied:
        raise ValueError(
            f"copy_tied: expected True, got False, and the head of {type(model).__name__} is its embedding; rows= of "
            "the head ops and of ModelDrafter gathers from it without a copy"
        )
    index = check_rows("rows", rows, layer.weight.shape[0]).to(layer.weight.device)
    bias = getattr(layer, "bias", None)
    return TrimmedHead(layer.weight.detach()[index], None if bias is None else bias.detach()[index], index)
