"""The two modules a sliced model has and a dense one has not: the bare norm and the block with shortcuts."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from freebits.architecture.families import SublayerNames

RESIDUAL = "Residual"
"""Prefix of the class name of a decoder layer turned residual block."""


class BareRMSNorm(nn.Module):
    """`x / rms(x)` without a scale, in float32 or wider.

    The mean is taken over the *dense* width, as slicing removes only what is (nearly) zero there.
    """

    def __init__(self, dense_size: int, eps: float) -> None:
        super().__init__()
        self.dense_size = dense_size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.square().sum(-1, keepdim=True) / self.dense_size
        return (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"dense_size={self.dense_size}, eps={self.eps}"


class ResidualBlock(GradientCheckpointingLayer):
    """A library's pre-norm decoder layer that computes `x ← x A + branch(norm(x))` for each of its sublayers.

    It is still an instance of the library's class, with the same children. Its shortcuts are identities until set.
    """

    sublayers: tuple[SublayerNames, ...]

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        """The stream after the block; `context` (mask, positions, cache) goes to the attention."""
        for index in range(len(self.sublayers)):
            hidden_states = self.run(index, hidden_states, **context)
        return hidden_states

    def run(self, index: int, hidden_states: Tensor, **context: Any) -> Tensor:
        """The stream after sublayer `index`."""
        sublayer = self.sublayers[index]
        branch = self.get_submodule(sublayer.norm)(hidden_states)
        for name in sublayer.modules:
            module = self.get_submodule(name)
            branch = module(hidden_states=branch, **context)[0] if sublayer.attends else module(branch)
        shortcut: Tensor = self.get_submodule(f"{sublayer.name}_shortcut")(hidden_states)
        return shortcut + branch


@cache
def _residual_class(layer_class: Any) -> type[ResidualBlock]:
    return type(f"{RESIDUAL}{layer_class.__name__}", (ResidualBlock, layer_class), {"__module__": __name__})


def residual_block(layer: Any, sublayers: tuple[SublayerNames, ...]) -> ResidualBlock:
    """Turn a library's decoder layer into a residual block, in place."""
    layer.__class__ = _residual_class(layer.__class__)
    layer.sublayers = sublayers
    for sublayer in sublayers:
        layer.add_module(f"{sublayer.name}_shortcut", nn.Identity())
    block: ResidualBlock = layer
    return block
