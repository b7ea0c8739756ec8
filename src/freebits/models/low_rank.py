"""Low-rank models as classes for transformers: some linear layers consist of two factors (reduced-order modeling).

For each family, a configuration class and model classes are derived from classes in transformers. `low_ranks` in the
configuration maps the names of the layers to their ranks. A sliced model with this key has low-rank layers, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from freebits.codecs.pivots import identity_columns
from freebits.models.derived_classes import OwnModel, derive_classes
from freebits.models.families import LOW_RANKS, MODEL_TYPES


class LowRankLinear(nn.Module):
    """The layer `x ↦ (x Dᵀ) Uᵀ + b`. `down.weight` is `D: (rank, inputs)`, `up.weight` is `U: (outputs, rank)`."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.down: Any = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs)."""
        result: Tensor = self.up(self.down(x))
        return result


def split_layers(model: nn.Module, config: PreTrainedConfig) -> None:
    """Replace each layer that the config names by a low-rank layer, in place."""
    for name, rank in (getattr(config, LOW_RANKS, None) or {}).items():
        layer: Any = model.get_submodule(name)
        outputs, inputs = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
        low_rank = LowRankLinear(inputs, outputs, rank, bias=layer.bias is not None)
        model.set_submodule(name, low_rank.to(layer.weight.device, layer.weight.dtype))


class LowRankModel(OwnModel):
    """Mixin that turns a model class of transformers into a class of models with low-rank layers."""

    change_modules = staticmethod(split_layers)


_ABOUT = f"with low-rank layers. `{LOW_RANKS}` maps their names to their ranks."
_CLASSES: dict[str, type] = {}
for _family in MODEL_TYPES.values():
    _CLASSES |= derive_classes(
        _family, LowRankModel, _family.low_rank_model_type, _family.low_rank_classes, about=_ABOUT
    )


def __getattr__(name: str) -> Any:
    """Return the derived class of that name, such as `LowRankLlamaConfig` or `LowRankLlamaForCausalLM`."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CLASSES[name]


class PivotedLinear(nn.Module):
    """The layer `y = x[pivots] + x[others] Tᵀ`, for a matrix `(r, n_in)` with identity columns.

    `T` contains the other columns, so the layer has `r²` fewer weights than the matrix.

    Args:
        weight: the matrix.
        pivots: (r,), the indices of the identity columns, in the order of the identity.
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
        """Map (…, n_in) to (…, r)."""
        return linear(x[..., self.others], self.rest) + x[..., self.pivots]


def use_pivots(model: Any) -> Any:
    """Replace each `down` whose matrix has identity columns by a `PivotedLinear`, in place, and return the model."""
    for layer in [module for module in model.modules() if isinstance(module, LowRankLinear)]:
        columns = identity_columns(layer.down.weight.detach()) if isinstance(layer.down, nn.Linear) else None
        if columns is not None:
            layer.down = PivotedLinear(layer.down.weight.detach(), columns)
    return model
