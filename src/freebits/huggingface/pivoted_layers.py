"""Linear layers that do not multiply by the columns of the identity which canonical pairs have."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from freebits.codes import identity_columns
from freebits.huggingface.low_rank_models import LowRankLinear


class PivotedLinear(nn.Module):
    """`y = x[pivots] + x[others] Tᵀ` for a matrix `(r, n_in)` with the identity among its columns: `r²` numbers less.

    Args:
        weight: the matrix.
        pivots: (r,), which columns are the identity's, in its order.
    """

    pivots: Tensor
    others: Tensor

    def __init__(self, weight: Tensor, pivots: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        others = torch.ones(self.in_features, dtype=torch.bool, device=weight.device)
        others[pivots] = False
        self.register_buffer("pivots", pivots)
        self.register_buffer("others", others.nonzero().flatten())
        self.rest = nn.Parameter(weight[:, others].contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, n_in) to (…, r)."""
        return linear(x[..., self.others], self.rest) + x[..., self.pivots]


def with_pivots(model: Any) -> Any:
    """A loaded model, the first matrix of its layers of low rank replaced where it has pivots."""
    for layer in [module for module in model.modules() if isinstance(module, LowRankLinear)]:
        columns = identity_columns(layer.down.weight.detach()) if isinstance(layer.down, nn.Linear) else None
        if columns is not None:
            layer.down = PivotedLinear(layer.down.weight.detach(), columns)
    return model
