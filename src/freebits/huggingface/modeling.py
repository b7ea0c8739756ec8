"""Sliced models in transformers: the library's own classes with narrower matrices and explicit shortcuts.

For each family a configuration and a model class are derived from the library's and registered with its Auto
classes. Attention, MLP, cache, masks and generation stay the library's.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from freebits.architecture import FAMILIES, Architecture, Family
from freebits.checkpoint import REMOTE_CODE
from freebits.huggingface.blocks import RESIDUAL, BareRMSNorm, FactoredEmbedding, ProjectedShortcut, residual_block
from freebits.packed import PackedCheckpoint


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
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, from a sliced or a packed checkpoint; a packed one is decoded as it is read."""
        path = pretrained_model_name_or_path
        if path is None:
            return super().from_pretrained(None, *args, config=config, **kwargs)
        parsed, rest = config, kwargs
        if not isinstance(config, PreTrainedConfig):
            parsed, rest = cls.config_class.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
        if not hasattr(parsed, "packed"):
            return super().from_pretrained(path, *args, config=config, **kwargs)
        folder = _local_folder(path, kwargs)
        parts = PackedCheckpoint(folder).mapped()
        state = {name: tensor for part in parts for name, tensor in part.items() if tensor.numel()}
        parsed = copy.deepcopy(parsed)
        del parsed.packed  # the model in memory is a sliced one, and is saved as such
        loaded = super().from_pretrained(None, *args, config=parsed, state_dict=state, **rest)
        settle(loaded[0] if isinstance(loaded, tuple) else loaded, path, folder)  # with output_loading_info=True
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, and with the code that `trust_remote_code=True` asks for."""
        self.config.auto_map = auto_map(self.family)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(Path(save_directory), self.family)


def settle(model: Any, path: str | os.PathLike[str], folder: Path) -> None:
    """Do what transformers does for a model only where it reads the weights itself."""
    model.name_or_path = model.config.name_or_path = str(path)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _local_folder(path: str | os.PathLike[str], source: Mapping[str, Any]) -> Path:
    """Where a packed checkpoint lies on this machine; one on the hub is downloaded as transformers would."""
    options = {key: source[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in source}
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path), **options))
    return folder / (source.get("subfolder") or "")


def auto_map(family: Family) -> dict[str, str]:
    """What `config.json` says of the classes, for `trust_remote_code=True`."""
    module = Path(REMOTE_CODE).stem
    names = {"AutoConfig": family.sliced_config, "AutoModelForCausalLM": family.sliced_causal_lm}
    return {auto: f"{module}.{name}" for auto, name in names.items()}


def write_remote_code(directory: Path, family: Family) -> None:
    """Write the module that `auto_map` names: with it no `import freebits` is needed, only the package."""
    (directory / REMOTE_CODE).write_text(
        f'"""The sliced {family.model_type} model of freebits: pip install freebits."""\n\n'
        f"from freebits.huggingface.modeling import {family.sliced_config}, {family.sliced_causal_lm}  # noqa: F401\n",
        encoding="utf-8",
    )


def _slice_modules(model: PreTrainedModel, family: Family, config: PreTrainedConfig) -> None:
    """Crop every matrix of a dense model to the sizes of its sites, bare its norms, add its shortcuts."""
    architecture = Architecture.of(config.to_dict())
    sizes: list[int] = config.site_sizes
    ranks = iter(getattr(config, "shortcut_ranks", None) or [None] * architecture.n_sites)
    for layer in model.get_submodule(family.blocks).children():
        residual_block(layer, family.sublayers)
    if architecture.tied:
        embedding: Any = model.get_submodule(family.embeddings[0])
        model.set_submodule(family.embeddings[0], FactoredEmbedding(embedding))
    for name, axes in architecture.axes.items():
        module_name, _, parameter = name.rpartition(".")
        module: Any = model.get_submodule(module_name)
        if isinstance(module, nn.Identity):
            before, after = (sizes[axis.site] for axis in axes)
            model.set_submodule(module_name, _shortcut(before, after, next(ranks)))
        elif name == f"{family.head}.bias":  # what becomes of the final norm's bias
            module.bias = nn.Parameter(torch.zeros(len(module.weight), dtype=module.weight.dtype))
        elif getattr(module, parameter, None) is not None:
            for axis in axes:
                _crop(module, parameter, axis.dim, sizes[axis.site])
    for name in architecture.folded_norms:
        norm: Any = model.get_submodule(name)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        model.set_submodule(name, BareRMSNorm(architecture.hidden_size, eps))


def _shortcut(before: int, after: int, rank: int | None) -> nn.Module:
    """A dense shortcut, or in its canonical form, with a factor of that rank."""
    return nn.Linear(before, after, bias=False) if rank is None else ProjectedShortcut(before, after, rank)


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
