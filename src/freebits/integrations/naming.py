"""A view of a checkpoint in which tensors have the names and shapes that they have in transformers.

Checkpoints on the hub keep the tensor names under which they were published. While transformers loads a checkpoint, it
renames tensors, and converts some of them: it merges, splits or transposes them. For example, it merges the experts of
a block into one tensor. Tables in transformers define how tensors are renamed and converted.
"""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from freebits.errors import CheckpointError
from freebits.integrations.empty_models import empty_model
from freebits.integrations.loading import one_line_errors
from freebits.integrations.packed_models import decode_floats, inner_config, text_auto_class
from freebits.storage.checkpoint import CONFIG, Source
from freebits.types import TensorSpec


def config_object(source: Source, path: str | os.PathLike[str]) -> PreTrainedConfig:
    """Return transformers' config object for a checkpoint.

    Raises:
        CheckpointError: the config is not valid, or has more blocks than there are tensors.
        UnsupportedModelError: transformers does not support the model.
    """
    with one_line_errors(path, "model"):
        config = inner_config(source.config, text_auto_class(source.config)).from_dict(decode_floats(source.config))
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(depth, int) and depth > len(source.specs):
        raise CheckpointError(
            f"{CONFIG} in {path} has {depth} blocks, but there are only {len(source.specs)} tensors, so the checkpoint "
            "is incomplete: download it again"
        )
    return config


class FileRows(NamedTuple):
    """A range of rows of one checkpoint tensor, which contains requested rows of a tensor in memory.

    A tensor of more than two dimensions is viewed as (rows, last dimension).

    Attributes:
        tensor: name of the checkpoint tensor.
        start: index of the first row of the range.
        stop: index of the last row of the range, plus 1.
        swapped: whether the requested rows are the columns of the range.
        order: (n,), int64. `order[i]` is the index of the requested row that is row `start + i` of the checkpoint
            tensor, or column `i` of the range if `swapped`. The first requested row has index 0.
    """

    tensor: str
    start: int
    stop: int
    swapped: bool
    order: Tensor


@dataclass
class _Conversion:
    """Tensors of the checkpoint that transformers converts together."""

    converter: WeightConverter
    first: str
    """Name of the first converted tensor."""
    patterns: dict[str, str] = field(default_factory=dict)
    """Name of each tensor in the checkpoint → the converter's pattern for it."""


class TransformersView:
    """A view of a checkpoint with the tensor names of transformers' modules. Implements `Source`.

    A tensor that transformers does not use keeps its name.
    """

    def __init__(self, source: Source, config: PreTrainedConfig) -> None:
        self.config = source.config
        self._source = source
        model = empty_model(config)
        self._model = model
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = model.state_dict()
        self._renamed: dict[str, str] = {}
        conversions: dict[str, _Conversion] = {}
        for name in source.specs:
            renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if pattern is not None:
                conversion = conversions.setdefault(renamed, _Conversion(by_pattern[pattern], renamed))
                conversion.patterns[name] = pattern
            else:
                self._renamed[renamed if renamed in state else name] = name
        self._conversions: dict[str, _Conversion] = {}
        self._converted_specs: dict[str, TensorSpec] = {}
        for conversion in conversions.values():
            dtype_name = source.specs[next(iter(conversion.patterns))].dtype_name
            for name, shape in self._shapes(conversion).items():
                self._conversions[name] = conversion
                self._converted_specs[name] = TensorSpec(dtype_name, shape)
        self._last: tuple[_Conversion | None, dict[str, Tensor]] = None, {}

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor after renaming and conversion."""
        renamed_specs = {name: self._source.specs[file_name] for name, file_name in self._renamed.items()}
        return self._converted_specs | renamed_specs

    def __getitem__(self, name: str) -> Tensor:
        """Read the tensor called `name`, converted as in transformers."""
        conversion = self._conversions.get(name)
        if conversion is None:
            return self._source[self._renamed.get(name, name)]
        last, converted = self._last
        if last is not conversion or name not in converted:
            converted = self._converted(conversion, self._source.__getitem__)
        tensor = converted.pop(name)
        self._last = conversion, converted  # the caller usually reads the other tensors of the conversion next
        return tensor

    def checkpoint_name(self, name: str) -> str | None:
        """Return the name that a tensor has in the checkpoint; None if transformers converts the tensor."""
        return self._renamed.get(name)

    def rows(self, name: str, start: int, stop: int) -> list[FileRows]:
        """Locate the rows `start` to `stop - 1` of a tensor of this view in the checkpoint.

        The requested rows must be consecutive rows of checkpoint tensors, or all the columns of one checkpoint matrix.
        Otherwise, return [].
        """
        if name in self._renamed:
            return [FileRows(self._renamed[name], start, stop, swapped=False, order=torch.arange(stop - start))]
        if name not in self._conversions:
            return []
        tensors, origin_rows, origin_columns = self._origin(name)
        offsets = torch.tensor([0, *(self._n_rows(tensor) for tensor in tensors)]).cumsum(0)
        if origin_columns is not None:
            return self._swapped(tensors, offsets, origin_rows[start:stop], origin_columns[start:stop])
        selected = origin_rows[start:stop]
        result = []
        tensor_numbers = torch.bucketize(selected, offsets, right=True) - 1
        for number in tensor_numbers.unique().tolist():
            order = (tensor_numbers == number).nonzero()[:, 0]
            file_rows = selected[order] - offsets[number]
            first, end = int(file_rows.min()), int(file_rows.max()) + 1
            if end - first != len(file_rows):  # rows of other matrices are in between
                return []
            result.append(FileRows(tensors[number], first, end, swapped=False, order=order[file_rows.argsort()]))
        return result

    def _swapped(self, tensors: list[str], offsets: Tensor, rows: Tensor, columns: Tensor) -> list[FileRows]:
        """Locate rows that are columns in the checkpoint. Return [] unless they are all the columns of one matrix."""
        if len(rows.unique(dim=0)) != 1 or len(columns.unique()) != len(columns):
            return []
        first, end = int(rows[0, 0]), int(rows[0, -1]) + 1
        number = int(torch.bucketize(rows[0, 0], offsets, right=True)) - 1
        if end - first != rows.shape[1] or len(columns) != self._source.specs[tensors[number]].shape[-1]:
            return []
        offset = int(offsets[number])
        return [FileRows(tensors[number], first - offset, end - offset, swapped=True, order=columns.argsort())]

    def _origin(self, name: str) -> tuple[list[str], Tensor, Tensor | None]:
        """Trace the rows of a converted tensor back to the checkpoint.

        Returns:
            The names of the checkpoint tensors from which the tensor is made, row indices, and column indices. The
            rows of all these tensors are numbered consecutively, as if the tensors were stacked in this order. If rows
            stay rows, there is one row index for each row, (rows,), and the column indices are None. If rows are
            columns in the checkpoint, there is a row index for each value, (rows, width), and a column index for each
            row, (rows,).
        """
        cached: dict[str, tuple[list[str], Tensor, Tensor | None]] = self.__dict__.setdefault("_origins", {})
        if name not in cached:
            cached.clear()
            cached[name] = self._traced(name)
        return cached[name]

    def _traced(self, name: str) -> tuple[list[str], Tensor, Tensor | None]:
        """Compute the result of `_origin` by converting tensors that contain row indices, then column indices."""
        conversion = self._conversions[name]
        tensors = sorted(conversion.patterns)
        row_numbers: dict[str, Tensor] = {}
        n_rows = 0
        for tensor in tensors:
            shape = self._source.specs[tensor].shape
            row_numbers[tensor] = torch.arange(n_rows, n_rows + self._n_rows(tensor)).reshape(*shape[:-1], 1)
            n_rows += self._n_rows(tensor)
        shape = self._converted_specs[name].shape
        with suppress(Exception):  # a conversion that does not keep rows can fail on tensors of one column
            rows = self._converted(conversion, row_numbers.__getitem__)[name]
            if tuple(rows.shape) == (*shape[:-1], 1):
                return tensors, rows.flatten(), None
        shapes = {tensor: self._source.specs[tensor].shape for tensor in tensors}
        full = {tensor: numbers.expand(shapes[tensor]).contiguous() for tensor, numbers in row_numbers.items()}
        rows = self._converted(conversion, full.__getitem__)[name].reshape(-1, shape[-1])
        if (rows == rows[:, :1]).all():
            return tensors, rows[:, 0], None
        full = {tensor: torch.arange(sizes[-1]).expand(sizes).contiguous() for tensor, sizes in shapes.items()}
        columns = self._converted(conversion, full.__getitem__)[name].reshape(-1, shape[-1])
        return tensors, rows, columns[:, 0]

    def _n_rows(self, tensor: str) -> int:
        shape = self._source.specs[tensor].shape
        return TensorSpec("U8", shape).numel // max(1, shape[-1]) if shape else 1

    def _shapes(self, conversion: _Conversion) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the converted tensors, without reading a tensor."""
        specs = self._source.specs

        def empty(name: str) -> Tensor:
            return torch.empty(specs[name].shape, dtype=torch.float32, device="meta")

        return {name: tuple(tensor.shape) for name, tensor in self._converted(conversion, empty).items()}

    def _converted(self, conversion: _Conversion, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the tensors that transformers makes in a conversion, by name."""
        converter: Any = copy.deepcopy(conversion.converter)
        for name, pattern in sorted(conversion.patterns.items(), key=_natural_order):
            converter.add_tensor(conversion.first, name, pattern, partial(read, name))
        result = converter.convert(conversion.first, model=self._model, config=self._model.config)
        return {name: value if isinstance(value, torch.Tensor) else value[0] for name, value in result.items()}


def _natural_order(name_and_pattern: tuple[str, str]) -> list[tuple[int, str]]:
    """Return a sort key for the order in which transformers merges tensors. Experts are ordered by number."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name_and_pattern[0].split(".")]
