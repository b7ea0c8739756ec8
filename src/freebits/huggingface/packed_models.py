"""Packed folders in transformers: one model type for all of them, whose factory gives the library's own model.

Without freebits that model type is unknown to transformers, which then says so, instead of filling a model with random
weights. With it `AutoModelForCausalLM.from_pretrained` decodes the folder and hands the tensors to the class of the
model that is in it: an ordinary model.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
)

from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.kind import DTYPES
from freebits.packed import PackedFolder

_FLOAT = "__float__"


class PackedConfig(PreTrainedConfig):
    """What the `config.json` of a packed folder says; the model's own stands under `model`, or in the manifest."""

    model_type = "freebits"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but every other argument is the model's."""
        unused = kwargs.pop("return_unused_kwargs", False)
        config = super().from_dict(config_dict)
        config.name_or_path = str(kwargs.get("name_or_path", ""))
        return (config, kwargs) if unused else config

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: no folder is written with this config but by packing."""


class PackedForCausalLM:
    """The factory; it has no instances."""

    config_class = PackedConfig

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *args: Any, config: object = None, verify: bool = True, **kwargs: Any
    ) -> Any:
        """The model in a packed folder, decoded as it is read, on all threads. Arguments as in transformers.

        Args:
            path: folder or hub id.
            args: for the model's class.
            config: what the Auto classes read; the model's own config comes from the folder.
            verify: check the digest of every tensor.
            kwargs: `dtype`, `device_map` and what else the model's `from_pretrained` takes.

        Raises:
            CheckpointError: the folder is damaged, or lacks a tensor of the model.
            UnsupportedModelError: the model needs code that transformers does not have.
        """
        del config
        folder = _local_folder(path, kwargs)
        packed = PackedFolder(folder, verify=verify)
        kept = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype", "quantization_config") if key in kwargs}
        inner, rest = inner_config(packed.config).from_dict(
            with_floats(packed.config), return_unused_kwargs=True, **kwargs
        )
        for name, of in packed.model_kinds.items():
            if of.code not in DTYPES:
                raise CheckpointError(f"tensor {name} has dtype {of.code}: unpack it, then load")
        state = {name: tensor for name, tensor in packed.model_tensors() if tensor.numel()}
        with_info = rest.pop("output_loading_info", False)
        model, found = from_tensors(inner, state, *args, output_loading_info=True, **rest, **kept)
        if found["missing_keys"]:  # transformers fills them in at random
            raise CheckpointError(f"tensor {min(found['missing_keys'])} is missing in {path}: the model is incomplete")
        model.name_or_path = model.config.name_or_path = str(path)
        adopt_generation_settings(model, folder)
        return (model, found) if with_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights, as `from_config` makes it."""
        told = getattr(config, "model", None) or PackedFolder(_local_folder(config.name_or_path, {})).config
        return AutoModelForCausalLM.from_config(inner_config(told).from_dict(with_floats(told)), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: the models that come out are not of this class."""


class PackedModel(PackedForCausalLM):
    """The factory of models without a head."""

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return super()._from_config(config, **kwargs).base_model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """What is below the head of the model in a packed folder; arguments as above."""
        loaded = super().from_pretrained(*args, **kwargs)
        return (loaded[0].base_model, *loaded[1:]) if isinstance(loaded, tuple) else loaded.base_model


def from_tensors(config: PreTrainedConfig, tensors: Mapping[str, Any], *args: Any, **options: Any) -> Any:
    """What `AutoModelForCausalLM.from_pretrained` gives for a folder with that config and these tensors."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is config.sub_configs.get("text_config"):  # of a model that sees, too
        config = config.get_text_config()
    return kind.from_pretrained(None, *args, config=config, state_dict=tensors, **options)


def adopt_generation_settings(model: Any, folder: Path) -> None:
    """Read `generation_config.json`, which `from_pretrained` skips where it is given the weights."""
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def with_floats(value: Any) -> Any:
    """A config with the floats for which JSON has no word, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        return float(value[_FLOAT]) if value.keys() == {_FLOAT} else {k: with_floats(v) for k, v in value.items()}
    return [with_floats(part) for part in value] if isinstance(value, list) else value


def inner_config(config: Mapping[str, Any]) -> type[PreTrainedConfig]:
    """The class of a model's own config.

    Raises:
        UnsupportedModelError: transformers does not have it, or it would run the model maker's code.
    """
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"transformers has no causal language model of type {model_type!r} without custom code: "
            "unpack the folder and load it with its maker's code"
        )
    return CONFIG_MAPPING[model_type]


def _local_folder(path: str | os.PathLike[str], source: Mapping[str, Any]) -> Path:
    """Where a packed folder lies on this machine; one on the hub is downloaded as transformers would."""
    options = {
        key: source[key]
        for key in ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
        if key in source
    }
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path), **options))
    return folder / (source.get("subfolder") or "")


AutoConfig.register(PackedConfig.model_type, PackedConfig)
AutoModel.register(PackedConfig, PackedModel)
AutoModelForCausalLM.register(PackedConfig, PackedForCausalLM)
