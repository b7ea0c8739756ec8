"""Modules that only sliced models have: norms without a scale, blocks with shortcuts, a factored embedding."""

import sys
from inspect import signature, unwrap
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from freebits.models.families import FAMILIES, Family

RESIDUAL = "Residual"
"""Prefix of the class name of a decoder layer that was converted to a residual block."""


class BareNorm(nn.Module):
    """The norm `x / rms(x)` without a scale, computed in float32 or wider.

    The mean is taken over the *dense* width, because slicing removes only dimensions that are (nearly) zero. The class
    is not called RMSNorm, because other libraries replace modules of that name.
    """

    def __init__(self, dense_size: int, eps: float) -> None:
        super().__init__()
        self.dense_size = dense_size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.square().sum(-1, keepdim=True) / self.dense_size
        return (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the parameters that `print(model)` shows."""
        return f"dense_size={self.dense_size}, eps={self.eps}"


class ProjectedShortcut(nn.Module):
    """The canonical shortcut `x ↦ [x - (x M) Mᵀ, 0]`, where `factor` is `M: (before, rank)`.

    Zeros widen the result from `before` to `after`.
    """

    def __init__(self, before: int, after: int, rank: int) -> None:
        super().__init__()
        self.before, self.after, self.rank = before, after, rank
        self.factor = nn.Parameter(torch.zeros(before, rank)) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, before) to (…, after)."""
        if self.factor is not None:
            rows = x.reshape(-1, self.before)
            x = torch.addmm(rows, rows @ self.factor, self.factor.T, alpha=-1).view_as(x)
        return x if self.after == self.before else pad(x, (0, self.after - self.before))

    def extra_repr(self) -> str:
        """Return the parameters that `print(model)` shows."""
        return f"before={self.before}, after={self.after}, rank={self.rank}"


class FactoredEmbedding(nn.Embedding):
    """A token embedding that stays tied to the head, followed by a factor that maps it to the stream.

    `weight` is the embedding of the dense model, (V, D). `factor` is (D, k).
    """

    def __init__(self, dense: nn.Embedding) -> None:
        super().__init__(dense.num_embeddings, dense.embedding_dim, dense.padding_idx, _weight=dense.weight)
        self.factor = nn.Parameter(torch.eye(dense.embedding_dim))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the stream at site 0, (…, k), for token ids (…)."""
        return super().forward(input) @ self.factor


class ResidualBlock(GradientCheckpointingLayer):
    """A pre-norm decoder layer of transformers that computes `x ← x A + Σ branch(norm(x))` for each sublayer.

    The block remains an instance of its class in transformers and keeps its children. Its shortcuts are identities
    until they are replaced.
    """

    family: Family

    def forward(self, hidden_states: Tensor, *args: Any, **context: Any) -> Any:
        """Return the stream after the block. Attention receives `context` (mask, positions, cache)."""
        if args:
            context.update(zip(self.arguments, args, strict=False))
        for index in range(len(self.family.sublayers)):
            hidden_states = self.run(index, hidden_states, **context)
        return (hidden_states,) if self.family.returns_tuple else hidden_states

    def run(self, index: int, hidden_states: Tensor, **context: Any) -> Tensor:
        """Return the stream after sublayer `index`."""
        sublayer = self.family.sublayers[index]
        after: Tensor = self.get_submodule(sublayer.shortcut)(hidden_states)
        for branch in sublayer.branches:
            result = self.get_submodule(branch.norm)(hidden_states)
            for name in branch.modules:
                module = self.get_submodule(name)
                result = module(hidden_states=result, **context)[0] if branch.is_attention else module(result)
            after = after + result
        return after

    @property
    def arguments(self) -> list[str]:
        """The names of the arguments after the stream in `forward` of the original class in transformers."""
        original_class: Any = type(self).__mro__[2]
        return list(signature(unwrap(original_class.forward)).parameters)[2:]


def residual_block(layer: Any, family: Family) -> ResidualBlock:
    """Convert a decoder layer of transformers to a residual block, in place.

    Each matrix gets the layout (outputs, inputs). If the norms have biases, each layer that reads the stream gets a
    bias, because folding moves the bias of the norm into the bias of the layer.
    """
    layer.__class__ = _residual_class(layer.__class__)
    layer.family = family
    for sublayer in family.sublayers:
        layer.add_module(sublayer.shortcut, nn.Identity())
        for branch in sublayer.branches:
            for name in (*branch.reads, *branch.writes):
                module = submodule(layer, name)
                if isinstance(module, Conv1D):
                    inputs, outputs = module.weight.shape
                    module = nn.Linear(inputs, outputs, dtype=module.weight.dtype, device=module.weight.device)
                    layer.set_submodule(name, module)
                last = submodule(layer, f"{name}.up") or module
                if family.centred and name in branch.reads and isinstance(last, nn.Linear) and last.bias is None:
                    last.bias = nn.Parameter(torch.zeros_like(last.weight[:, 0]))
    block: ResidualBlock = layer
    return block


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return the submodule of that name, or None if the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _residual_class(layer_class: type) -> Any:
    """Return the residual class of a decoder layer class, and store it in this module so that pickle finds it."""
    name = RESIDUAL + layer_class.__name__
    return globals().setdefault(name, type(name, (ResidualBlock, layer_class), {"__module__": __name__}))


def __getattr__(name: str) -> Any:
    """Return the residual block class of that name, such as `ResidualLlamaDecoderLayer`, for any family."""
    for family in FAMILIES if name.startswith(RESIDUAL) else ():
        module = sys.modules[getattr(transformers, family.causal_lm).__module__]
        layer_class = getattr(module, name.removeprefix(RESIDUAL), None)
        if isinstance(layer_class, type):
            return _residual_class(layer_class)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
