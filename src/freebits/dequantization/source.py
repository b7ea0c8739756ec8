"""Read a quantized checkpoint as floats."""

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freebits.dequantization.format import Format, Settings, StoredMatrix
from freebits.dequantization.fp4 import FP4, StackedMXFP4
from freebits.dequantization.packed_integers import AWQ, GPTQ, CompressedIntegers
from freebits.dequantization.scaled import Scaled
from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.packed.reader import open_folder
from freebits.storage.checkpoint import Checkpoint, Folder
from freebits.types import DTYPES, HALF_DTYPES, TensorSpec

FORMATS: tuple[Format, ...] = (StackedMXFP4(), FP4(), CompressedIntegers(), GPTQ(), AWQ(), Scaled())
"""All input formats. The first format that matches a tensor decodes the tensor."""
_SETTINGS_KEYS = ("quantization_config", "compression_config")
_IGNORED_SUFFIXES = ("input_scale", "activation_scale", "input_global_scale", "k_scale", "v_scale", "weight_shape")
"""Suffixes of the names of tensors that only quantized models have and that are not needed to decode weights."""
_DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def open_as_floats(path: str | os.PathLike[str]) -> Folder:
    """Open the checkpoint in a folder, packed or not. Weights that another tool has quantized are read as floats.

    Raises:
        CheckpointError: the folder holds no valid checkpoint.
        UnsupportedModelError: see `Dequantized`.
    """
    source = open_folder(path)
    return Dequantized(path) if isinstance(source, Checkpoint) and is_quantized(source.config) else source


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Return whether a model's config says that another tool has quantized the weights."""
    return bool(_settings(config))


class Dequantized(Checkpoint):
    """A checkpoint that another tool has quantized, read as floats. Implements `Source`.

    Each matrix is read and multiplied by its scales on request. It gets the dtype in the config, or bfloat16 if the
    config has none. Scales of activations are left out.

    Raises:
        UnsupportedModelError: freebits does not read the format.
        CheckpointError: see `Checkpoint`; or a tensor is missing or does not fit the settings in the config.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        settings = _settings(self.config)
        method = settings.get("quant_method")
        specs = self.stored_specs()
        self._matrices: dict[str, StoredMatrix] = {}
        part_names: set[str] = set()
        for name in specs:
            try:
                matches = (format_.match(name, specs, settings) for format_ in FORMATS)
                matrix = next((match for match in matches if match is not None), None)
            except (ValueError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"tensor {name} in {path} does not fit the quantization settings in its config ({error}): "
                    "download the model again"
                ) from None
            if matrix is None:
                continue
            missing = next((part for part in matrix.parts.values() if part not in specs), None)
            if missing is not None:
                raise CheckpointError(
                    f"tensor {missing} is missing in {path}, so the checkpoint is incomplete: download it again"
                )
            self._matrices[matrix.name] = matrix
            part_names.update(matrix.parts.values())
        if not self._matrices:
            raise UnsupportedModelError(
                f"{path} is quantized in a format that freebits does not read ({method}): use the unquantized "
                "model, or compress this one with `lossless`"
            )
        self._dtype_name = _float_dtype(self.config)
        self._plain_specs = {
            name: spec
            for name, spec in specs.items()
            if name not in part_names and not name.endswith(_IGNORED_SUFFIXES)
        }
        self.config = _without_settings(self.config)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor after dequantization."""
        matrices = {name: TensorSpec(self._dtype_name, matrix.shape) for name, matrix in self._matrices.items()}
        return self._plain_specs | matrices

    def __getitem__(self, name: str) -> Tensor:
        """Read the tensor called `name`. A quantized matrix is decoded in float32 and then rounded once."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return super().__getitem__(name) if name in self._plain_specs else self._stored_tensor(name)
        try:
            values = matrix.decode({role: self._stored_tensor(part) for role, part in matrix.parts.items()})
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"tensor {name} in {self.path} cannot be dequantized ({error}): download the model again"
            ) from None
        if tuple(values.shape) != matrix.shape:
            raise CheckpointError(
                f"tensor {name} in {self.path} has shape {tuple(values.shape)}, not {matrix.shape}: "
                "download the model again"
            )
        return values.to(DTYPES[self._dtype_name]).contiguous()

    def _stored_tensor(self, name: str) -> Tensor:
        """Read a stored tensor; return it as bytes if PyTorch does not compute with its dtype."""
        data = self.read(name)
        spec = self.weights[self.files[name]].entries[name].spec
        return spec.view(data) if spec.dtype_name in DTYPES else torch.from_numpy(data).reshape(spec.shape)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name, reading one tensor at a time."""
        return ((name, self[name]) for name in self.specs)


def _settings(config: Mapping[str, Any]) -> Settings:
    """Return the quantization settings of a config or of one of its sub-configs; empty if there are none."""
    for subconfig in _with_subconfigs(config):
        for key in _SETTINGS_KEYS:
            if isinstance(settings := subconfig.get(key), Mapping):
                return settings
    return {}


def _with_subconfigs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config, *(value for value in config.values() if isinstance(value, Mapping))]


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _SETTINGS_KEYS
    }


def _float_dtype(config: Mapping[str, Any]) -> str:
    """Return the safetensors name of the dtype in a config or in one of its sub-configs; `BF16` if there is none."""
    values = (subconfig.get(key) for subconfig in _with_subconfigs(config) for key in ("dtype", "torch_dtype"))
    dtype_names = (_DTYPE_NAMES.get(str(value)) for value in values)
    return next((name for name in dtype_names if name in (*HALF_DTYPES, "F32")), "BF16")
