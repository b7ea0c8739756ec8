"""Load packed folders with the Auto classes of transformers.

All packed folders have the same model type. Without freebits, transformers does not know this model type, and raises an
error instead of creating a model with random weights. With freebits, `from_pretrained` of an Auto class decodes the
folder, and passes the tensors to transformers' class for the model. The result is an ordinary model of transformers.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto

from freebits.errors import CheckpointError, UnsupportedModelError, one_line
from freebits.integrations.integer_models import load_with_integers
from freebits.packed.reader import PackedFolder
from freebits.storage.auxiliary_files import REMOTE_CODE
from freebits.types import DTYPES

AUTO_CLASSES: list[Any] = [
    getattr(modeling_auto, name) for name in modeling_auto.__all__ if name.startswith("AutoModel")
]
"""All Auto classes that load models."""
_WITH_TEXT = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""Auto classes whose models predict the next token of a text."""
_PREFERRED = (*_WITH_TEXT, AutoModelForSeq2SeqLM)
"""Auto classes to prefer if several of them have a class for the same model."""
_FLOAT = "__float__"
_log = logging.getLogger(__name__)


class PackedConfig(PreTrainedConfig):
    """The content of a packed folder's `config.json`.

    The model's own config is under the key `model` or, with the codec `none`, in the manifest.
    """

    model_type = "freebits"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config. Unlike in transformers, `kwargs` do not change the config: they are for the model."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        config = super().from_dict(config_dict)
        config.name_or_path = str(kwargs.get("name_or_path", ""))
        return (config, kwargs) if return_unused else config

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing, because only packing writes folders with this config."""


class PackedFactory:
    """Loads packed folders for one Auto class. It has no instances; `from_pretrained` returns a transformers model."""

    config_class = PackedConfig
    auto: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *args: Any,
        config: object = None,
        verify: bool = True,
        base: str | os.PathLike[str] | None = None,
        keep_integers: bool = False,
        stay_packed: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the model in a packed folder. The folder is decoded on several threads while it is read.

        Args:
            path: folder, or id of a repository on the hub.
            args: positional arguments of the model's `from_pretrained`.
            config: ignored. Auto classes pass it, but the model's own config comes from the folder.
            verify: whether to check the digest of every tensor.
            base: folder or hub id of the model's base, if the base has moved since the folder was packed.
            keep_integers: whether the matrices of a quantized model stay integers in memory; see `load`.
            stay_packed: whether the matrices of a quantized model stay in the files, and are decoded block by block in
                each forward pass; see `load`.
            kwargs: keyword arguments of the model's `from_pretrained`, such as `dtype` and `device_map`.

        Raises:
            CheckpointError: the folder is damaged, or lacks a tensor of the model.
            UnsupportedModelError: the Auto class has no class for the model, or transformers has no such model.
        """
        del config
        folder = _local_folder(path, kwargs)
        packed = PackedFolder(folder, verify=verify, base=base)
        dtype_options = {
            key: kwargs.pop(key) for key in ("dtype", "torch_dtype", "quantization_config") if key in kwargs
        }
        model_config, options = config_of(packed.config, cls.auto, return_unused_kwargs=True, **kwargs)
        warn_about_remote_code(packed.config, path)
        for name, spec in packed.model_specs.items():
            if spec.dtype_name not in DTYPES:
                raise CheckpointError(
                    f"tensor {name} has dtype {spec.dtype_name}, which transformers cannot load: unpack {path}, then "
                    "load the unpacked model"
                )
        with_info = options.pop("output_loading_info", False)
        options |= {"auto": cls.auto, "output_loading_info": True}

        def from_state(state: Mapping[str, Tensor]) -> Any:
            return from_tensors(model_config, state, *args, **options, **dtype_options)

        if keep_integers or stay_packed:
            dtype = dtype_options.get("dtype", dtype_options.get("torch_dtype"))
            dtype = dtype if isinstance(dtype, torch.dtype) else model_config.dtype
            model, loading_info = load_with_integers(packed, dtype, from_state, late=stay_packed)
        else:
            state = {name: tensor for name, tensor in packed.model_tensors() if tensor.numel()}
            model, loading_info = from_state(state)
        check_complete(model, loading_info["missing_keys"], packed.config, path)
        model.name_or_path = model.config.name_or_path = str(path)
        adopt_generation_settings(model, folder)
        return (model, loading_info) if with_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Return a model with random weights, as `from_config` does."""
        model_config = getattr(config, "model", None) or PackedFolder(_local_folder(config.name_or_path, {})).config
        return cls.auto.from_config(config_of(model_config, cls.auto), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing, because the returned models are not of this class."""


class PackedModel(PackedFactory):
    """The factory for `AutoModel`. The remote code in packed folders refers to this class."""

    auto = AutoModel


class PackedForCausalLM(PackedFactory):
    """The factory for `AutoModelForCausalLM`. The remote code in packed folders refers to this class."""

    auto = AutoModelForCausalLM


class PackedTokenizer:
    """Loads tokenizers from packed folders if only the model type determines the class of the tokenizer."""

    auto: ClassVar[Any] = AutoTokenizer

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Return the tokenizer in a packed folder. The arguments are those of transformers."""
        config = PackedFolder(_local_folder(path, kwargs)).config
        model_type = str(config.get("model_type"))
        config_class: Any = PreTrainedConfig
        if model_type in CONFIG_MAPPING:  # not `get`, because it does not find the entries of this lazy mapping
            config_class = CONFIG_MAPPING[model_type]
        kwargs["config"] = config_class.from_dict(decode_floats(config))
        return cls.auto.from_pretrained(path, *args, **kwargs)


class PackedProcessor(PackedTokenizer):
    """Loads processors from packed folders, as `PackedTokenizer` loads tokenizers."""

    auto = AutoProcessor


def _factories() -> Iterable[type[PackedFactory]]:
    """Yield one factory for each Auto class."""
    named: list[type[PackedFactory]] = [PackedModel, PackedForCausalLM]
    yield from named
    for auto in AUTO_CLASSES:
        if auto not in [factory.auto for factory in named]:
            yield type(auto.__name__.replace("AutoModel", "Packed"), (PackedFactory,), {"auto": auto})


def from_tensors(
    config: PreTrainedConfig, tensors: Mapping[str, Any], *args: Any, auto: Any = AutoModelForCausalLM, **options: Any
) -> Any:
    """Return the same as `from_pretrained` of an Auto class for a folder with this config and these tensors."""
    model_class = _classes(auto, type(config), config.architectures)[0]
    if model_class.config_class is config.sub_configs.get("text_config"):  # the text part of a multimodal model
        config = config.get_text_config()
    return model_class.from_pretrained(None, *args, config=config, state_dict=tensors, **options)


def warn_about_remote_code(config: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Log, once per folder, that freebits uses transformers' class for a model, not the code in its repository."""
    auto_map = config.get("auto_map")
    classes = [str(name) for name in auto_map.values()] if isinstance(auto_map, dict) else []
    if any(f"{Path(REMOTE_CODE).stem}." not in name for name in classes) and auto_class(config) is not None:
        _warn_once(one_line(path), one_line(config.get("model_type")))


@cache
def _warn_once(path: str, model_type: str) -> None:
    _log.warning(
        "freebits: %s refers to code in a repository; freebits never runs it, but uses transformers' class for %s",
        path,
        model_type,
    )


def check_complete(model: Any, missing: Iterable[str], config: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check that a folder has every tensor of a model, because transformers initializes missing tensors at random.

    Raises:
        CheckpointError: a tensor is missing. If another Auto class fits the folder, the message names that class.
    """
    name = min(missing, default=None)
    if name is None:
        return
    architecture = (config.get("architectures") or [type(model).__name__])[0]
    if architecture == type(model).__name__:
        raise CheckpointError(f"tensor {name} is missing in {path}, so the checkpoint is incomplete: download it again")
    suitable = auto_class(config) or "its own class"
    raise CheckpointError(f"{path} holds a {architecture}, which has no tensor {name}: load it with {suitable}")


def auto_class(config: Mapping[str, Any]) -> str | None:
    """Return the name of the Auto class that loads a config's architecture; None if transformers has no such model."""
    model_type, architectures = str(config.get("model_type")), config.get("architectures")
    if model_type not in CONFIG_MAPPING:
        return None
    config_class = CONFIG_MAPPING[model_type]
    candidates = [auto for auto in (*_PREFERRED, *AUTO_CLASSES) if config_class in auto._model_mapping]
    for auto in candidates:
        if {model_class.__name__ for model_class in _classes(auto, config_class)} & {*(architectures or ())}:
            return str(auto.__name__)
    return candidates[0].__name__ if candidates else None


def class_for_text(config: PreTrainedConfig) -> Any:
    """Return transformers' class for a config's model, which must predict the next token of a text.

    Raises:
        UnsupportedModelError: the model does not predict the next token, or transformers has no such model.
    """
    return _classes(text_auto_class(config.to_dict()), type(config), config.architectures)[0]


def predicts_text(config: Mapping[str, Any]) -> bool:
    """Return whether a config describes a model that transformers has and that predicts the next token of a text."""
    return auto_class(config) in [auto.__name__ for auto in _WITH_TEXT]


def text_auto_class(config: Mapping[str, Any]) -> Any:
    """Return the Auto class for a config's model, which must predict the next token of a text.

    Raises:
        UnsupportedModelError: see `class_for_text`.
    """
    name = auto_class(config)
    if name is None:
        raise _needs_remote_code(config)
    auto = next((auto for auto in _WITH_TEXT if auto.__name__ == name), None)
    if auto is None:
        architecture = (config.get("architectures") or [config.get("model_type")])[0]
        raise UnsupportedModelError(f"a {architecture} does not predict the next token of a text")
    return auto


def _classes(auto: Any, config_class: type[PreTrainedConfig], architectures: Iterable[str] | None = ()) -> list[Any]:
    """Return the classes that an Auto class has for a config class. Classes named in `architectures` come first."""
    entry = auto._model_mapping[config_class]
    classes = list(entry) if isinstance(entry, list | tuple) else [entry]
    return sorted(classes, key=lambda model_class: model_class.__name__ not in (architectures or ()))


def adopt_generation_settings(model: Any, folder: Path) -> None:
    """Give a model the settings in `generation_config.json`, if the folder has a valid one.

    `from_pretrained` does not read this file if it gets the weights as tensors.
    """
    if model.can_generate() and (folder / "generation_config.json").exists():
        with suppress(OSError, ValueError, TypeError):  # transformers ignores the same errors
            model.generation_config = GenerationConfig.from_pretrained(folder)


def decode_floats(value: Any) -> Any:
    """Decode floats that JSON lacks, such as infinity, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        return float(value[_FLOAT]) if value.keys() == {_FLOAT} else {k: decode_floats(v) for k, v in value.items()}
    return [decode_floats(item) for item in value] if isinstance(value, list) else value


def inner_config(config: Mapping[str, Any], auto: Any = AutoModelForCausalLM) -> type[PreTrainedConfig]:
    """Return transformers' class for a model's own config.

    Raises:
        UnsupportedModelError: the Auto class has no class for the model, or the model needs code from its repository.
    """
    model_type = str(config.get("model_type"))
    if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in auto._model_mapping:
        return CONFIG_MAPPING[model_type]
    other = auto_class(config)
    if other is None:
        raise _needs_remote_code(config)
    raise UnsupportedModelError(f"{auto.__name__} cannot load a model of type {model_type!r}: use {other}")


def _needs_remote_code(config: Mapping[str, Any]) -> UnsupportedModelError:
    model_type = config.get("model_type", config.get("_class_name"))
    return UnsupportedModelError(
        f"transformers has no model of type {model_type!r}, and freebits never runs code from a model's repository"
    )


def config_of(config: Mapping[str, Any], auto: Any, **options: Any) -> Any:
    """Create a model's own config without `auto_map`, with which transformers could run code from a repository."""
    plain = {key: value for key, value in decode_floats(config).items() if key != "auto_map"}
    return inner_config(config, auto).from_dict(plain, **options)


def _local_folder(path: str | os.PathLike[str], arguments: Mapping[str, Any]) -> Path:
    """Return the local path of a packed folder. Download a folder on the hub, with the options in `arguments`."""
    options = {
        key: arguments[key]
        for key in ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
        if key in arguments
    }
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path), **options))
    return folder / (arguments.get("subfolder") or "")


AutoConfig.register(PackedConfig.model_type, PackedConfig)
AutoTokenizer.register(PackedConfig, PackedTokenizer)
AutoProcessor.register(PackedConfig, PackedProcessor)
for _factory in _factories():
    _factory.auto.register(PackedConfig, _factory)
