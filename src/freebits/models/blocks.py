"""The modules a sliced model has and a dense one has not: bare norms, blocks with shortcuts, a factored embedding."""

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
"""Prefix of the class name of a decoder layer turned residual block."""


class BareNorm(nn.Module):
    """`x / rms(x)` without a scale, in float32 or wider. Its name is no RMSNorm's, which others put their own for.

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


class ProjectedShortcut(nn.Module):
    """The canonical shortcut `x ↦ [x - (x M) Mᵀ, 0]`: `factor` is `M: (before, rank)`, zeros widen `x` to `after`."""

    def __init__(self, before: int, after: int, rank: int) -> None:
        super().__init__()
        self.before, self.after, self.rank = before, after, rank
        self.factor = nn.Parameter(torch.zeros(before, rank)) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        """Project (…, before) to (…, after)."""
        if self.factor is not None:
            rows = x.reshape(-1, self.before)
            x = torch.addmm(rows, rows @ self.factor, self.factor.T, alpha=-1).view_as(x)
        return x if self.after == self.before else pad(x, (0, self.after - self.before))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"before={self.before}, after={self.after}, rank={self.rank}"


class FactoredEmbedding(nn.Embedding):
    """A token embedding that stays tied to the head, and the factor that leads from it to the stream.

    `weight` is (V, D), the dense model's; `factor` is (D, k).
    """

    def __init__(self, dense: nn.Embedding) -> None:
        super().__init__(dense.num_embeddings, dense.embedding_dim, dense.padding_idx, _weight=dense.weight)
        self.factor = nn.Parameter(torch.eye(dense.embedding_dim))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The stream at site 0, (…, k), for token ids (…)."""
        return super().forward(input) @ self.factor


class ResidualBlock(GradientCheckpointingLayer):
    """A library's pre-norm decoder layer that computes `x ← x A + Σ branch(norm(x))` for each of its sublayers.

    It is still an instance of the library's class, with the same children. Its shortcuts are identities until set.
    """

    family: Family

    def forward(self, hidden_states: Tensor, *args: Any, **context: Any) -> Any:
        """The stream after the block; `context` (mask, positions, cache) goes to the attention."""
        if args:
            context.update(zip(self.arguments, args, strict=False))
        for index in range(len(self.family.sublayers)):
            hidden_states = self.run(index, hidden_states, **context)
        return (hidden_states,) if self.family.in_tuple else hidden_states

    def run(self, index: int, hidden_states: Tensor, **context: Any) -> Tensor:
        """The stream after sublayer `index`."""
        sublayer = self.family.sublayers[index]
        after: Tensor = self.get_submodule(sublayer.shortcut)(hidden_states)
        for branch in sublayer.branches:
            result = self.get_submodule(branch.norm)(hidden_states)
            for name in branch.modules:
                module = self.get_submodule(name)
                result = module(hidden_states=result, **context)[0] if branch.attends else module(result)
            after = after + result
        return after

    @property
    def arguments(self) -> list[str]:
        """What the library's blocks call their arguments after the stream."""
        theirs: Any = type(self).__mro__[2]
        return list(signature(unwrap(theirs.forward)).parameters)[2:]


def residual_block(layer: Any, family: Family) -> ResidualBlock:
    """Turn a library's decoder layer into a residual block, in place.

    Its matrices become those of folded models: (outputs, inputs), with a bias where a norm's bias has to go.
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
    """The module of that name; None where the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _residual_class(layer_class: type) -> Any:
    """The class of such blocks, kept in this module, where pickle looks for it."""
    name = RESIDUAL + layer_class.__name__
    return globals().setdefault(name, type(name, (ResidualBlock, layer_class), {"__module__": __name__}))


def __getattr__(name: str) -> Any:
    """The residual blocks of all families, by name: `ResidualLlamaDecoderLayer` and so on."""
    for family in FAMILIES if name.startswith(RESIDUAL) else ():
        module = sys.modules[getattr(transformers, family.causal_lm).__module__]
        layer_class = getattr(module, name.removeprefix(RESIDUAL), None)
        if isinstance(layer_class, type):
            return _residual_class(layer_class)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
