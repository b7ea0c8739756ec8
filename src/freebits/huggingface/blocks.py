"""The two modules a sliced model has and a dense one has not: the bare norm and the block with shortcuts."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from freebits.architecture.families import SublayerNames


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
    """A pre-norm block of sublayers `x ← x A + branch(norm(x))` over the modules of a library's decoder layer.

    It takes the layer's children over under their names. Its shortcuts are identities until set.
    """

    def __init__(self, layer: nn.Module, sublayers: tuple[SublayerNames, ...]) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        for sublayer in sublayers:
            self.add_module(f"{sublayer.name}_shortcut", nn.Identity())
        self.sublayers = sublayers

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
