"""Sliced models as classes for transformers: narrower matrices, and a matrix on each skip connection (the shortcut).

For each family, a configuration class and model classes are derived from classes in transformers and registered with
the Auto classes there. Attention, MLP, cache, masks and generation remain those of transformers.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from freebits.models.architecture import Architecture, Axis, Role
from freebits.models.blocks import RESIDUAL, BareNorm, FactoredEmbedding, ProjectedShortcut, residual_block, submodule
from freebits.models.derived_classes import OwnModel, derive_classes
from freebits.models.families import MODEL_TYPES
from freebits.models.layout import Layout
from freebits.models.low_rank import split_layers


class SlicedModel(OwnModel):
    """Mixin that turns a model class of transformers into a class of sliced models."""

    @staticmethod
    def change_modules(model: nn.Module, config: PreTrainedConfig) -> None:
        """Insert the low-rank layers that the config names, if it names any. Then slice all modules."""
        split_layers(model, config)
        _slice_modules(model, config)


def _slice_modules(model: nn.Module, config: PreTrainedConfig) -> None:
    """Crop the matrices of a dense model to the widths of the sliced stream, replace norms, and add shortcuts."""
    config_dict = config.to_dict()
    architecture = Architecture.of(config_dict)
    layout = Layout.of(config_dict, architecture)
    widths = layout.widths or ()
    for layer in model.get_submodule(architecture.family.blocks).children():
        residual_block(layer, architecture.family)
    for sub in architecture.sublayers:
        shortcut = _shortcut(widths[sub.site - 1], widths[sub.site], layout.rank(sub.site))
        model.set_submodule(sub.shortcut.name, shortcut)
    if architecture.tied:
        embedding: Any = model.get_submodule(architecture.embedding.name)
        model.set_submodule(architecture.embedding.name, FactoredEmbedding(embedding))
    shortcuts = {name for sub in architecture.sublayers for name in (sub.shortcut.weight, sub.shortcut.factor)}
    for name, weight in layout.weights(architecture).items():
        module_name, _, parameter = name.rpartition(".")
        module: Any = submodule(model, module_name)
        if name == architecture.head.bias and module is not None and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(len(module.weight), dtype=module.weight.dtype))
        elif name not in shortcuts and weight.role is not Role.NORM and getattr(module, parameter, None) is not None:
            for axis in weight.axes:
                _crop(module, parameter, axis, widths)
    for folded_norm in architecture.folded_norms:
        norm: Any = model.get_submodule(folded_norm.name)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        model.set_submodule(folded_norm.name, BareNorm(architecture.hidden_size, eps))


def _shortcut(before: int, after: int, rank: int | None) -> nn.Module:
    """Return a shortcut's module: a `ProjectedShortcut` of the given rank, or a linear layer if the rank is None."""
    return nn.Linear(before, after, bias=False) if rank is None else ProjectedShortcut(before, after, rank)


def _crop(module: nn.Module, parameter: str, axis: Axis, widths: tuple[int, ...]) -> None:
    """Crop one axis of a parameter to the width of its site, and update the sizes that the module stores."""
    size = widths[axis.site]
    cropped = getattr(module, parameter).detach().narrow(axis.dim, 0, size).clone()
    setattr(module, parameter, nn.Parameter(cropped))
    if cropped.ndim == 2:
        for module_class, features in _FEATURES.items():
            if isinstance(module, module_class) and parameter == "weight":
                setattr(module, features[axis.dim], size)
    if hasattr(module, "hidden_dim") and not axis.writes:  # a router or a stack of experts
        setattr(module, "hidden_dim", size)  # noqa: B010


_FEATURES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
}
"""Names of the attributes that store the sizes of `weight`, by dimension."""


_ABOUT = (
    "that is sliced. `site_sizes` contains the widths of the residual stream: before the first sublayer, and after "
    "each sublayer. `hidden_size` is the width of the dense model."
)
_CLASSES: dict[str, type] = {}
for _family in MODEL_TYPES.values():
    _no_split = getattr(transformers, _family.causal_lm)._no_split_modules or ()
    _CLASSES |= derive_classes(
        _family,
        SlicedModel,
        _family.sliced_model_type,
        _family.sliced_classes,
        about=_ABOUT,
        _no_split_modules=[f"{RESIDUAL}{name}" for name in _no_split],
    )


def __getattr__(name: str) -> Any:
    """Return the derived class of that name: `SlicedLlamaConfig`, `SlicedLlamaForCausalLM` and so on."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CLASSES[name]
