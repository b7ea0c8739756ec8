"""A quantized checkpoint as a source of floats."""

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.packed.reader import PackedFolder, opened
from freebits.quantized_inputs.format import Format, Settings, Stored
from freebits.quantized_inputs.fp4 import FP4, StackedMXFP4
from freebits.quantized_inputs.packed_integers import AWQ, GPTQ, CompressedIntegers
from freebits.quantized_inputs.scaled import Scaled
from freebits.storage.folder import Checkpoint
from freebits.types import DTYPES, HALVES, TensorSpec

FORMATS: tuple[Format, ...] = (StackedMXFP4(), FP4(), CompressedIntegers(), GPTQ(), AWQ(), Scaled())
"""Those that are known; the first that recognizes a tensor reads it."""
_SETTINGS = ("quantization_config", "compression_config")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale", "k_scale", "v_scale", "weight_shape")
"""How the names of tensors end that a model without quantization does not have."""
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def readable(path: str | os.PathLike[str]) -> Checkpoint | PackedFolder:
    """The checkpoint in a folder, in floats: packed or not, or quantized by another tool.

    Raises:
        CheckpointError: the folder is no sound checkpoint.
        UnsupportedModelError: see `Dequantized`.
    """
    source = opened(path)
    return Dequantized(path) if isinstance(source, Checkpoint) and is_quantized(source.config) else source


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a model's config says that its weights are quantized, by another tool."""
    return bool(_settings(config))


class Dequantized(Checkpoint):
    """A checkpoint whose weights another tool has quantized, in floats. Implements `Source`.

    A matrix is read and multiplied by its scales when it is asked for. Its dtype is the one that the config has, or
    bfloat16. Scales of activations are left out.

    Raises:
        UnsupportedModelError: its format is not known.
        CheckpointError: see `Checkpoint`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        settings = _settings(self.config)
        method = settings.get("quant_method")
        stored = self.stored_specs()
        self._stored: dict[str, Stored] = {}
        used: set[str] = set()
        for name in stored:
            for format_ in FORMATS:
                found = format_.found(name, stored, settings)
                if found is not None:
                    lacking = next((part for part in found.parts.values() if part not in stored), None)
                    if lacking is not None:
                        raise CheckpointError(f"tensor {lacking} is missing in {path}: the checkpoint is incomplete")
                    self._stored[found.name] = found
                    used.update(found.parts.values())
                    break
        if not self._stored:
            raise UnsupportedModelError(
                f"the weights in {path} are quantized already, in a format that is not read here ({method}): take the "
                "model they came from, or keep every bit with --lossless"
            )
        self._code = _code_of(self.config)
        self._rest = {n: spec for n, spec in stored.items() if n not in used and not n.endswith(_OF_ACTIVATIONS)}
        self.config = _without_settings(self.config)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, dequantized."""
        return self._rest | {name: TensorSpec(self._code, of.shape) for name, of in self._stored.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, dequantized in float32 and rounded once."""
        of = self._stored.get(name)
        if of is None:
            return super().__getitem__(name) if name in self._rest else self._raw(name)
        try:
            matrix = of.decode({role: self._raw(part) for role, part in of.parts.items()})
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"{name} in {self.path} cannot be dequantized ({error})") from None
        if tuple(matrix.shape) != of.shape:
            raise CheckpointError(f"{name} in {self.path} has the shape {tuple(matrix.shape)}, not {of.shape}")
        return matrix.to(DTYPES[self._code]).contiguous()

    def _raw(self, name: str) -> Tensor:
        """A tensor as stored; of a dtype that PyTorch cannot compute with its bytes."""
        data = self.read(name)
        spec = self.weights[self.files[name]].entries[name].spec
        return spec.view(data) if spec.code in DTYPES else torch.from_numpy(data).reshape(spec.shape)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, read one at a time."""
        return ((name, self[name]) for name in self.specs)


def _settings(config: Mapping[str, Any]) -> Settings:
    parts = [config, *(of for of in config.values() if isinstance(of, Mapping))]
    found = (part[key] for part in parts for key in _SETTINGS if isinstance(part.get(key), Mapping))
    settings: Settings = next(found, {})
    return settings


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_settings(of) if isinstance(of, Mapping) else of
        for key, of in config.items()
        if key not in _SETTINGS
    }


def _code_of(config: Mapping[str, Any]) -> str:
    parts = [config, *(of for of in config.values() if isinstance(of, Mapping))]
    told = (_NAMES.get(str(part.get(key))) for part in parts for key in ("dtype", "torch_dtype"))
    return next((code for code in told if code in (*HALVES, "F32")), "BF16")
