"""Sliced models in transformers: the library's own classes with narrower matrices and explicit shortcuts.

For each family a configuration and a model class are derived from the library's and registered with its Auto
classes. Attention, MLP, cache, masks and generation stay the library's.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from freebits.models.blocks import RESIDUAL, BareNorm, FactoredEmbedding, ProjectedShortcut, residual_block, submodule
from freebits.models.families import MODEL_TYPES
from freebits.models.layout import Layout
from freebits.models.low_rank import split_layers
from freebits.models.registration import OwnModel, derive
from freebits.models.table import Architecture, Axis, Role


class SlicedModel(OwnModel):
    """What a sliced model of any family adds to the library's class."""

    @staticmethod
    def make_ours(model: nn.Module, config: PreTrainedConfig) -> None:
        """Narrow layers, where there are some, then narrow sites."""
        split_layers(model, config)
        _slice_modules(model, config)


def _slice_modules(model: nn.Module, config: PreTrainedConfig) -> None:
    """Crop every matrix of a dense model to the widths of its sites, bare its norms, add its shortcuts."""
    told = config.to_dict()
    architecture = Architecture.of(told)
    layout = Layout.of(told, architecture)
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
    for norm_ in architecture.folded_norms:
        norm: Any = model.get_submodule(norm_.name)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        model.set_submodule(norm_.name, BareNorm(architecture.hidden_size, eps))


def _shortcut(before: int, after: int, rank: int | None) -> nn.Module:
    """A dense shortcut, or in its canonical form, with a factor of that rank."""
    return nn.Linear(before, after, bias=False) if rank is None else ProjectedShortcut(before, after, rank)


def _crop(module: nn.Module, parameter: str, axis: Axis, widths: tuple[int, ...]) -> None:
    size = widths[axis.site]
    cropped = getattr(module, parameter).detach().narrow(axis.dim, 0, size).clone()
    setattr(module, parameter, nn.Parameter(cropped))
    if cropped.ndim == 2:  # keep what the module says of itself true
        for spec, features in _FEATURES.items():
            if isinstance(module, spec) and parameter == "weight":
                setattr(module, features[axis.dim], size)
    if hasattr(module, "hidden_dim") and not axis.writes:  # a router's, an expert's
        setattr(module, "hidden_dim", size)  # noqa: B010


_FEATURES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
}


_ABOUT = "sliced: `site_sizes` holds the width of the residual stream at each site, `hidden_size` the dense width."
_CLASSES: dict[str, type] = {}
for _family in MODEL_TYPES.values():
    _theirs = getattr(transformers, _family.causal_lm)._no_split_modules or ()
    _blocks = [f"{RESIDUAL}{name}" for name in _theirs]
    _types = _family.sliced_model_type, _family.sliced_classes
    _CLASSES |= derive(_family, SlicedModel, *_types, _ABOUT, _no_split_modules=_blocks)


def __getattr__(name: str) -> Any:
    """The derived classes, by name: `SlicedLlamaConfig`, `SlicedLlamaForCausalLM` and so on."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CLASSES[name]
