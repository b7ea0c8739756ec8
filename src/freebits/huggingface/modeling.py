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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from freebits.architecture import FAMILIES, Architecture, Family
from freebits.huggingface.blocks import RESIDUAL, BareRMSNorm, residual_block
from freebits.packed import is_packed, unpacked_tensors


class SlicedCausalLM(PreTrainedModel):
    """What a sliced model of any family adds to the library's class."""

    family: Family
    config_class: type[PreTrainedConfig]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _slice_modules(self, self.family, config)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, from a sliced or a packed directory; a packed one is decoded as it is read."""
        path = pretrained_model_name_or_path
        if path is None or not is_packed(path):
            return super().from_pretrained(path, *args, **kwargs)
        config = kwargs.pop("config", None) or cls.config_class.from_pretrained(path)
        vars(config).pop("packed", None)  # the model in memory is a sliced one, and is saved as such
        state = dict(unpacked_tensors(path))
        loaded = super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
        if (Path(path) / "generation_config.json").exists():
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
            model.generation_config = GenerationConfig.from_pretrained(path)
        return loaded


def _slice_modules(model: PreTrainedModel, family: Family, config: PreTrainedConfig) -> None:
    """Crop every matrix of a dense model to the sizes of its sites, bare its norms, add its shortcuts."""
    architecture = Architecture.of(config.to_dict())
    sizes: list[int] = config.site_sizes
    for layer in model.get_submodule(family.blocks).children():
        residual_block(layer, family.sublayers)
    for name, axes in architecture.axes.items():
        module_name, _, parameter = name.rpartition(".")
        module: Any = model.get_submodule(module_name)
        if isinstance(module, nn.Identity):
            before, after = (sizes[axis.site] for axis in axes)
            model.set_submodule(module_name, nn.Linear(before, after, bias=False))
        elif name == f"{family.head}.bias":  # what becomes of the final norm's bias
            module.bias = nn.Parameter(torch.zeros(len(module.weight), dtype=module.weight.dtype))
        elif getattr(module, parameter, None) is not None:
            for axis in axes:
                _crop(module, parameter, axis.dim, sizes[axis.site])
    for name in architecture.norms:
        norm: Any = model.get_submodule(name)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        model.set_submodule(name, BareRMSNorm(architecture.hidden_size, eps))


def _crop(module: nn.Module, parameter: str, dim: int, size: int) -> None:
    cropped = getattr(module, parameter).detach().narrow(dim, 0, size).clone()
    setattr(module, parameter, nn.Parameter(cropped))
    if parameter == "weight":  # keep what the module says of itself true
        for kind, features in _FEATURES.items():
            if isinstance(module, kind):
                setattr(module, features[dim], size)


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
            "_no_split_modules": [f"{RESIDUAL}{name}" for name in dense._no_split_modules],
            "__doc__": f"A sliced {dense.__name__}.",
            **here,
        },
    )
    AutoConfig.register(family.sliced_model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return config_class, model_class


_CLASSES = {kind.__name__: kind for family in FAMILIES.values() for kind in _register(family)}


def __getattr__(name: str) -> Any:
    """The derived classes, by name: `SlicedLlamaConfig`, `SlicedLlamaForCausalLM` and so on."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CLASSES[name]
