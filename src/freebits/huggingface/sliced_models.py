"""Sliced models in transformers: the library's own classes with narrower matrices and explicit shortcuts.

For each family a configuration and a model class are derived from the library's and registered with its Auto
classes. Attention, MLP, cache, masks and generation stay the library's.
"""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from freebits.architecture import MODEL_TYPES, Architecture, Axis, Family, Layout, Role
from freebits.checkpoint import auto_map, write_remote_code
from freebits.huggingface.blocks import (
    RESIDUAL,
    BareRMSNorm,
    FactoredEmbedding,
    ProjectedShortcut,
    residual_block,
    submodule,
)
from freebits.huggingface.low_rank_models import split_layers


class SlicedCausalLM(PreTrainedModel):
    """What a sliced model of any family adds to the library's class."""

    family: Family
    config_class: type[PreTrainedConfig]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        split_layers(self, config)
        _slice_modules(self, config)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: when the model is saved, our two lines of code go with it, not a copy of this module."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, and with the code that `trust_remote_code=True` asks for."""
        self.config.auto_map = auto_map(self.family.sliced_classes)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(Path(save_directory), __name__, self.family.sliced_classes)


def _slice_modules(model: PreTrainedModel, config: PreTrainedConfig) -> None:
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
        if name == architecture.head.bias and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(len(module.weight), dtype=module.weight.dtype))
        elif name not in shortcuts and weight.role is not Role.NORM and getattr(module, parameter, None) is not None:
            for axis in weight.axes:
                _crop(module, parameter, axis, widths)
    for norm_ in architecture.folded_norms:
        norm: Any = model.get_submodule(norm_.name)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        model.set_submodule(norm_.name, BareRMSNorm(architecture.hidden_size, eps))


def _shortcut(before: int, after: int, rank: int | None) -> nn.Module:
    """A dense shortcut, or in its canonical form, with a factor of that rank."""
    return nn.Linear(before, after, bias=False) if rank is None else ProjectedShortcut(before, after, rank)


def _crop(module: nn.Module, parameter: str, axis: Axis, widths: tuple[int, ...]) -> None:
    size = widths[axis.site]
    cropped = getattr(module, parameter).detach().narrow(axis.dim, 0, size).clone()
    setattr(module, parameter, nn.Parameter(cropped))
    if cropped.ndim == 2:  # keep what the module says of itself true
        for kind, features in _FEATURES.items():
            if isinstance(module, kind) and parameter == "weight":
                setattr(module, features[axis.dim], size)
    if hasattr(module, "hidden_dim") and not axis.writes:  # a router's, an expert's
        setattr(module, "hidden_dim", size)  # noqa: B010  (mypy takes it for a parameter)


_FEATURES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
}


def _register(family: Family) -> tuple[type[PreTrainedConfig], type[SlicedCausalLM]]:
    """Derive a family's sliced classes from the library's and make the Auto classes know them."""
    dense = getattr(transformers, family.causal_lm)
    here = {"__module__": __name__}
    config_class = type(
        family.sliced_config,
        (dense.config_class,),
        {
            "model_type": family.sliced_model_type,
            "register_for_auto_class": SlicedCausalLM.__dict__["register_for_auto_class"],
            "__doc__": f"Configuration of a sliced {family.model_type} model: `site_sizes` holds the width of "
            "the residual stream at each site, `hidden_size` the dense width.",
            **here,
        },
    )
    model_class = type(
        family.sliced_causal_lm,
        (SlicedCausalLM, dense),
        {
            "family": family,
            "config_class": config_class,
            "_no_split_modules": [f"{RESIDUAL}{name}" for name in dense._no_split_modules or ()],
            "__doc__": f"A sliced {dense.__name__}.",
            **here,
        },
    )
    AutoConfig.register(family.sliced_model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return config_class, model_class


_CLASSES = {kind.__name__: kind for family in MODEL_TYPES.values() for kind in _register(family)}


def __getattr__(name: str) -> Any:
    """The derived classes, by name: `SlicedLlamaConfig`, `SlicedLlamaForCausalLM` and so on."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CLASSES[name]
