"""Linear layers that store their weights as 8-bit integers, and multiply by the integers directly."""

from typing import Any

import torch
from torch import Tensor, nn

from freebits.codecs.integers import Integers, ScaledIntegers, steps
from freebits.codecs.registry import CODES
from freebits.packed.reader import PackedFolder

_MAX_INTEGER = 127


class IntegerLinear(nn.Module):
    """The layer `y = ((x * columns) integersᵀ) * rows + bias`. It takes half the memory of a layer with 16-bit weights.

    Args:
        matrix: weights, (n_out, n_in), as integers that fit 8 bits, with scales.
        bias: bias, (n_out,); None for a layer without bias.
    """

    integers: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, matrix: ScaledIntegers, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.integers.shape
        self.register_buffer("integers", matrix.integers.to(torch.int8).contiguous())
        self.register_buffer("rows", steps(matrix.rows))
        self.register_buffer("columns", steps(matrix.columns))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (…, n_in) to outputs (…, n_out)."""
        scaled = (x * self.columns).to(x.dtype).flatten(0, -2)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(scaled, self.integers, torch.ones_like(self.rows, dtype=x.dtype))
        else:
            y = scaled @ self.integers.T.to(x.dtype)
        y = (y * self.rows).to(x.dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def with_integer_layers(model: Any, packed: PackedFolder) -> Any:
    """Replace a model's linear layers whose integers in the folder fit 8 bits by `IntegerLinear`. Return the model."""
    for recipe in packed.manifest.recipes:
        codec = CODES.get(recipe.code)
        if isinstance(codec, Integers):
            for name, matrix in zip(recipe.makes, packed.matrices(recipe, codec), strict=True):
                path = name.removesuffix(".weight")
                layer = dict(model.named_modules()).get(path)
                if type(layer) is nn.Linear and layer is not model.get_output_embeddings() and _fits(matrix):
                    model.set_submodule(path, IntegerLinear(matrix, layer.bias))
    return model


def _fits(matrix: ScaledIntegers) -> bool:
    return bool((matrix.integers.abs() <= _MAX_INTEGER).all())
