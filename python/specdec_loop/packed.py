"""Linear layers that are quick for a handful of rows on a CPU, where speculation verifies its drafts.

In fp32 torch's own linear layer takes about twice as long for five rows as for one on a CPU, which eats what
speculation gains. oneDNN with a weight that was laid out beforehand does not; it is what torch.compile uses when it
freezes weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# The number of rows that oneDNN picks the layout for.
_ROWS = 8


class PackedLinear(nn.Module):
    """The function of a CPU fp32 nn.Linear, with a second, packed copy of its weight for inputs of several rows."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]; a single row goes to torch's own matrix-vector product, which is the quickest there."""
        if x.numel() == x.shape[-1]:
            return linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_linears_(model: nn.Module) -> bool:
    """Replace the linear layers of a CPU fp32 model, for inference only.

    Returns:
        False, with the model untouched, where it is not an fp32 model on a CPU or torch was built without oneDNN.
    """
    weight = next(model.parameters())
    has_ops = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not has_ops:
        return False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
    return True
