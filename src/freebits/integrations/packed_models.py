"""Packed folders in transformers: one model type for all of them, for which every Auto class gives the library's model.

Without freebits that model type is unknown to transformers, which then says so instead of filling a model with random
weights. With freebits, `from_pretrained` of an Auto class decodes the folder and hands the tensors to the class that
the Auto class has for the model in it. The result is an ordinary model.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import snapshot_download
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
from freebits.packed.reader import PackedFolder
from freebits.storage.auxiliary_files import REMOTE_CODE
from freebits.types import DTYPES

AUTO_CLASSES: list[Any] = [
    getattr(modeling_auto, name) for name in modeling_auto.__all__ if name.startswith("AutoModel")
]
"""Every Auto class of models."""
_WITH_TEXT = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""Auto classes whose models predict the next token of a text."""
_PREFERRED = (*_WITH_TEXT, AutoModelForSeq2SeqLM)
"""Auto classes that are named before others that have the same model."""
_FLOAT = "__float__"
_log = logging.getLogger(__name__)


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


class PackedFactory:
    """Gives what an Auto class has for the model in a packed folder. It has no instances."""

    config_class = PackedConfig
    auto: ClassVar[Any]

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
            UnsupportedModelError: the Auto class has no class for the model.
        """
        del config
        folder = _local_folder(path, kwargs)
        packed = PackedFolder(folder, verify=verify)
        kept = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype", "quantization_config") if key in kwargs}
        inner, rest = config_of(packed.config, cls.auto, return_unused_kwargs=True, **kwargs)
        warn_of_code(packed.config, path)
        for name, spec in packed.model_specs.items():
            if spec.code not in DTYPES:
                raise CheckpointError(f"tensor {name} has dtype {spec.code}: unpack it, then load")
        state = {name: tensor for name, tensor in packed.model_tensors() if tensor.numel()}
        with_info = rest.pop("output_loading_info", False)
        model, found = from_tensors(inner, state, *args, auto=cls.auto, output_loading_info=True, **rest, **kept)
        check_complete(model, found["missing_keys"], packed.config, path)
        model.name_or_path = model.config.name_or_path = str(path)
        adopt_generation_settings(model, folder)
        return (model, found) if with_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights, as `from_config` makes it."""
        inner = getattr(config, "model", None) or PackedFolder(_local_folder(config.name_or_path, {})).config
        return cls.auto.from_config(config_of(inner, cls.auto), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: the models that come out are not of this class."""


class PackedModel(PackedFactory):
    """The factory for `AutoModel`. Folders name this class in their code."""

    auto = AutoModel


class PackedForCausalLM(PackedFactory):
    """The factory for `AutoModelForCausalLM`. Folders name this class in their code."""

    auto = AutoModelForCausalLM


class PackedTokenizer:
    """Gives the tokenizer of the model in a packed folder, where only the model's type says which class it has."""

    auto: ClassVar[Any] = AutoTokenizer

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """The tokenizer; arguments as in transformers."""
        config = PackedFolder(_local_folder(path, kwargs)).config
        model_type = str(config.get("model_type"))
        known: Any = PreTrainedConfig
        if model_type in CONFIG_MAPPING:  # a lazy mapping, whose `get` finds nothing
            known = CONFIG_MAPPING[model_type]
        kwargs["config"] = known.from_dict(with_floats(config))
        return cls.auto.from_pretrained(path, *args, **kwargs)


class PackedProcessor(PackedTokenizer):
    """Gives the processor, likewise."""

    auto = AutoProcessor


def _factories() -> Iterable[type[PackedFactory]]:
    """One factory for each Auto class."""
    named: list[type[PackedFactory]] = [PackedModel, PackedForCausalLM]
    yield from named
    for auto in AUTO_CLASSES:
        if auto not in [factory.auto for factory in named]:
            yield type(auto.__name__.replace("AutoModel", "Packed"), (PackedFactory,), {"auto": auto})


def from_tensors(
    config: PreTrainedConfig, tensors: Mapping[str, Any], *args: Any, auto: Any = AutoModelForCausalLM, **options: Any
) -> Any:
    """What an Auto class's `from_pretrained` gives for a folder with that config and these tensors."""
    spec = _classes(auto, type(config), config.architectures)[0]
    if spec.config_class is config.sub_configs.get("text_config"):  # of a model that sees, too
        config = config.get_text_config()
    return spec.from_pretrained(None, *args, config=config, state_dict=tensors, **options)


def warn_of_code(config: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Log, once for a folder, that a model comes with its maker's code and that the library's class is run instead."""
    named = config.get("auto_map")
    classes = [str(of) for of in named.values()] if isinstance(named, dict) else []
    if any(f"{Path(REMOTE_CODE).stem}." not in of for of in classes) and auto_class(config) is not None:
        _warn_once(one_line(path), one_line(config.get("model_type")))


@cache
def _warn_once(path: str, model_type: str) -> None:
    _log.warning(
        "freebits: %s names its maker's code, which is not run: transformers' own class for %s is", path, model_type
    )


def check_complete(model: Any, missing: Iterable[str], config: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check that a folder has every tensor of a model. transformers fills in what is missing at random.

    Raises:
        CheckpointError: it lacks one. The message names the Auto class that loads the folder, if it is another one.
    """
    name = min(missing, default=None)
    if name is None:
        return
    architecture = (config.get("architectures") or [type(model).__name__])[0]
    if architecture == type(model).__name__:
        raise CheckpointError(f"tensor {name} is missing in {path}: the checkpoint is incomplete")
    raise CheckpointError(
        f"{path} holds a {architecture}, which has no {name}: load it with {auto_class(config) or 'its own class'}"
    )


def auto_class(config: Mapping[str, Any]) -> str | None:
    """The name of the Auto class that loads the architecture in a config; None if transformers has no such model."""
    model_type, architectures = str(config.get("model_type")), config.get("architectures")
    if model_type not in CONFIG_MAPPING:
        return None
    spec = CONFIG_MAPPING[model_type]
    known = [auto for auto in (*_PREFERRED, *AUTO_CLASSES) if spec in auto._model_mapping]
    for auto in known:
        if {found.__name__ for found in _classes(auto, spec)} & {*(architectures or ())}:
            return str(auto.__name__)
    return known[0].__name__ if known else None


def class_for_text(config: PreTrainedConfig) -> Any:
    """The library's class for the model in a config, which predicts the next token of a text.

    Raises:
        UnsupportedModelError: the model does something else, or transformers has no such model.
    """
    return _classes(auto_for_text(config.to_dict()), type(config), config.architectures)[0]


def reads_text(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the model in a config, and it predicts the next token of a text."""
    return auto_class(config) in [auto.__name__ for auto in _WITH_TEXT]


def auto_for_text(config: Mapping[str, Any]) -> Any:
    """The Auto class that loads it.

    Raises:
        UnsupportedModelError: see `class_for_text`.
    """
    name = auto_class(config)
    if name is None:
        raise _needs_code(config)
    found = next((auto for auto in _WITH_TEXT if auto.__name__ == name), None)
    if found is None:
        architecture = (config.get("architectures") or [config.get("model_type")])[0]
        raise UnsupportedModelError(f"a {architecture} does not predict the next token of a text")
    return found


def _classes(auto: Any, config_class: type[PreTrainedConfig], architectures: Iterable[str] | None = ()) -> list[Any]:
    """The classes that an Auto class has for a config, those of these architectures first."""
    found = auto._model_mapping[config_class]
    classes = list(found) if isinstance(found, list | tuple) else [found]
    return sorted(classes, key=lambda spec: spec.__name__ not in (architectures or ()))


def adopt_generation_settings(model: Any, folder: Path) -> None:
    """Read `generation_config.json`, unless it is broken; `from_pretrained` skips it where it is given the weights."""
    if model.can_generate() and (folder / "generation_config.json").exists():
        with suppress(OSError, ValueError, TypeError):  # as transformers does
            model.generation_config = GenerationConfig.from_pretrained(folder)


def with_floats(value: Any) -> Any:
    """A config with the floats for which JSON has no word, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        return float(value[_FLOAT]) if value.keys() == {_FLOAT} else {k: with_floats(v) for k, v in value.items()}
    return [with_floats(part) for part in value] if isinstance(value, list) else value


def inner_config(config: Mapping[str, Any], auto: Any = AutoModelForCausalLM) -> type[PreTrainedConfig]:
    """The class of a model's own config.

    Raises:
        UnsupportedModelError: the Auto class has no class for the model, or it would run the model maker's code.
    """
    model_type = str(config.get("model_type"))
    if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in auto._model_mapping:
        return CONFIG_MAPPING[model_type]
    other = auto_class(config)
    if other is None:
        raise _needs_code(config)
    raise UnsupportedModelError(f"{auto.__name__} loads no models of type {model_type!r}, but {other} does")


def _needs_code(config: Mapping[str, Any]) -> UnsupportedModelError:
    model_type = config.get("model_type", config.get("_class_name"))
    return UnsupportedModelError(f"transformers has no model of type {model_type!r} without its maker's code")


def config_of(config: Mapping[str, Any], auto: Any, **options: Any) -> Any:
    """A model's own config, as transformers' `from_dict` gives it; without `auto_map`, as no code of it is run."""
    plain = {key: value for key, value in with_floats(config).items() if key != "auto_map"}
    return inner_config(config, auto).from_dict(plain, **options)


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
AutoTokenizer.register(PackedConfig, PackedTokenizer)
AutoProcessor.register(PackedConfig, PackedProcessor)
for _factory in _factories():
    _factory.auto.register(PackedConfig, _factory)
