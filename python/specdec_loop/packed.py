"""Linear layers that are quick for a handful of rows on a CPU, where speculation verifies its drafts.

In fp32 torch's own linear layer reads its weight at half of what oneDNN reaches for one row with a weight that was laid
out beforehand, and at a third for five rows, which eats what speculation gains. torch.compile uses the same when it
freezes weights. Every method of a comparison runs on these layers, plain decoding too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The number of rows that oneDNN picks the layout for.
_ROWS = 8


class PackedLinear(nn.Module):
    """The function of a CPU fp32 nn.Linear on a packed copy of its weight.

    The weight itself stays too, for head ops and tied embeddings: memory doubles, and a later change of the weight does
    not reach the copy.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_linears_(model: nn.Module) -> bool:
    """Replace the linear layers of a CPU fp32 model, for inference only.

    Returns:
        Whether anything was replaced: only fp32 layers on a CPU are, and only where torch was built with oneDNN.
    """
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return False
    found = False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child))
                found = True
    return found
