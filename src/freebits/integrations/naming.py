"""A checkpoint as transformers has it in memory: under its names, with the experts of a block in one tensor.

Checkpoints on the hub are as they were published. transformers renames their tensors while it loads them, and merges or
splits some; its own tables say how.
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
from freebits.integrations.packed_models import auto_for_text, inner_config, with_floats
from freebits.storage.folder import Source
from freebits.types import TensorSpec


def known_config(source: Source, path: str | os.PathLike[str]) -> PreTrainedConfig:
    """What transformers makes of a checkpoint's config.

    Raises:
        CheckpointError: it is no config, or asks for more blocks than there are tensors.
        UnsupportedModelError: transformers has no such model.
    """
    with one_line_errors(path, "model"):
        config = inner_config(source.config, auto_for_text(source.config)).from_dict(with_floats(source.config))
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(depth, int) and depth > len(source.specs):
        raise CheckpointError(
            f"config.json asks for {depth} blocks, but there are {len(source.specs)} tensors: the "
            "checkpoint is incomplete"
        )
    return config


class FileRows(NamedTuple):
    """Where rows of a tensor in memory are in the checkpoint.

    Tensors of more than two dimensions are seen as (rows, last dimension).

    Attributes:
        tensor: name in the checkpoint.
        start: first of its rows in which they are.
        stop: the row after the last.
        order: for each of these rows (columns, if `swapped`) which of the rows in memory it is, (n,), int64.
        swapped: whether rows in memory are columns there.
    """

    tensor: str
    start: int
    stop: int
    order: Tensor
    swapped: bool


@dataclass
class _Conversion:
    """Tensors of the checkpoint that become others together."""

    converter: WeightConverter
    first: str
    """Name of the first that they become."""
    patterns: dict[str, str] = field(default_factory=dict)
    """Name of each in the checkpoint → the converter's pattern for it."""


class InMemory:
    """A checkpoint under the names of transformers' modules. Implements `Source`.

    A tensor of which transformers knows nothing keeps its name.
    """

    def __init__(self, source: Source, config: PreTrainedConfig) -> None:
        self.config = source.config
        self._source = source
        model = empty_model(config)
        self._model = model
        transforms = get_model_conversion_mapping(model)
        renamings = [of for of in transforms if isinstance(of, WeightRenaming)]
        converters = [of for of in transforms if isinstance(of, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        theirs = model.state_dict()
        self._names = set(theirs)
        self._renamed: dict[str, str] = {}
        conversions: dict[str, _Conversion] = {}
        for name in source.specs:
            renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, theirs)
            if pattern is not None:
                conversion = conversions.setdefault(renamed, _Conversion(by_pattern[pattern], renamed))
                conversion.patterns[name] = pattern
            else:
                self._renamed[renamed if renamed in theirs else name] = name
        self._conversions: dict[str, _Conversion] = {}
        self._converted_kinds: dict[str, TensorSpec] = {}
        for conversion in conversions.values():
            code = source.specs[next(iter(conversion.patterns))].code
            for name, shape in self._shapes(conversion).items():
                self._conversions[name] = conversion
                self._converted_kinds[name] = TensorSpec(code, shape)
        self._last: tuple[_Conversion | None, dict[str, Tensor]] = None, {}

    @cached_property
    def in_memory(self) -> set[str]:
        """The tensors of the checkpoint that are in the model."""
        converted = {name for conversion in self._conversions.values() for name in conversion.patterns}
        return converted | {of for name, of in self._renamed.items() if name in self._names}

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor, as transformers has it."""
        return self._converted_kinds | {name: self._source.specs[of] for name, of in self._renamed.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, read, merged and split now."""
        conversion = self._conversions.get(name)
        if conversion is None:
            return self._source[self._renamed.get(name, name)]
        last, made = self._last
        if last is not conversion or name not in made:
            made = self._converted(conversion, self._source.__getitem__)
        tensor = made.pop(name)
        self._last = conversion, made  # for those that are split from the same tensor, which are asked for next
        return tensor

    def in_file(self, name: str) -> str | None:
        """The tensor of the checkpoint that a tensor is, if it is just one under another name."""
        return self._renamed.get(name)

    def rows(self, name: str, start: int, stop: int) -> list[FileRows]:
        """Where some rows of a tensor are in the checkpoint; empty where they are not there as rows or columns."""
        if name in self._renamed:
            return [FileRows(self._renamed[name], start, stop, torch.arange(stop - start), swapped=False)]
        if name not in self._conversions:
            return []
        tensors, rows, swapped = self._origin(name)
        offsets = torch.tensor([0, *(self._n_rows(tensor) for tensor in tensors)]).cumsum(0)
        if swapped is not None:
            return self._swapped(tensors, offsets, rows[start:stop], swapped[start:stop])
        here = rows[start:stop]
        found = []
        which = torch.bucketize(here, offsets, right=True) - 1
        for number in which.unique().tolist():
            order = (which == number).nonzero()[:, 0]
            of_file = here[order] - offsets[number]
            first, last = int(of_file.min()), int(of_file.max()) + 1
            if last - first != len(of_file):  # rows of others lie between
                return []
            found.append(FileRows(tensors[number], first, last, order[of_file.argsort()], swapped=False))
        return found

    def _swapped(self, tensors: list[str], offsets: Tensor, rows: Tensor, columns: Tensor) -> list[FileRows]:
        """The same of rows that are columns in the checkpoint: of the matrix that has these rows there."""
        if len(rows.unique(dim=0)) != 1 or len(columns.unique()) != len(columns):
            return []
        first, last = int(rows[0, 0]), int(rows[0, -1]) + 1
        number = int(torch.bucketize(rows[0, 0], offsets, right=True)) - 1
        if last - first != rows.shape[1] or len(columns) != self._source.specs[tensors[number]].shape[-1]:
            return []
        offset = int(offsets[number])
        return [FileRows(tensors[number], first - offset, last - offset, columns.argsort(), swapped=True)]

    def _origin(self, name: str) -> tuple[list[str], Tensor, Tensor | None]:
        """The tensors that one is made of, and for each of its rows the row that it is among all of theirs.

        If rows are columns there, for each its row at every column, (rows, width), and which column it is.
        """
        cached: dict[str, tuple[list[str], Tensor, Tensor | None]] = self.__dict__.setdefault("_origins", {})
        if name not in cached:
            cached.clear()
            cached[name] = self._traced(name)
        return cached[name]

    def _traced(self, name: str) -> tuple[list[str], Tensor, Tensor | None]:
        conversion = self._conversions[name]
        tensors = sorted(conversion.patterns)
        ids: dict[str, Tensor] = {}
        n_rows = 0
        for tensor in tensors:
            shape = self._source.specs[tensor].shape
            ids[tensor] = torch.arange(n_rows, n_rows + self._n_rows(tensor)).reshape(*shape[:-1], 1)
            n_rows += self._n_rows(tensor)
        shape = self._converted_kinds[name].shape
        with suppress(Exception):  # what does not keep rows may not take tensors that are one column
            rows = self._converted(conversion, ids.__getitem__)[name]
            if tuple(rows.shape) == (*shape[:-1], 1):
                return tensors, rows.flatten(), None
        shapes = {tensor: self._source.specs[tensor].shape for tensor in tensors}
        whole = {tensor: of.expand(shapes[tensor]).contiguous() for tensor, of in ids.items()}
        rows = self._converted(conversion, whole.__getitem__)[name].reshape(-1, shape[-1])
        if (rows == rows[:, :1]).all():
            return tensors, rows[:, 0], None
        whole = {tensor: torch.arange(of[-1]).expand(of).contiguous() for tensor, of in shapes.items()}
        columns = self._converted(conversion, whole.__getitem__)[name].reshape(-1, shape[-1])
        return tensors, rows, columns[:, 0]

    def _n_rows(self, tensor: str) -> int:
        shape = self._source.specs[tensor].shape
        return TensorSpec("U8", shape).numel // max(1, shape[-1]) if shape else 1

    def _shapes(self, conversion: _Conversion) -> dict[str, tuple[int, ...]]:
        """What tensors become, without reading them."""
        specs = self._source.specs

        def empty(name: str) -> Tensor:
            return torch.empty(specs[name].shape, dtype=torch.float32, device="meta")

        return {name: tuple(tensor.shape) for name, tensor in self._converted(conversion, empty).items()}

    def _converted(self, conversion: _Conversion, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What tensors become, as transformers merges and splits them."""
        converter: Any = copy.deepcopy(conversion.converter)
        for name, pattern in sorted(conversion.patterns.items(), key=_in_natural_order):
            converter.add_tensor(conversion.first, name, pattern, partial(read, name))
        made = converter.convert(conversion.first, model=self._model, config=self._model.config)
        return {name: of if isinstance(of, torch.Tensor) else of[0] for name, of in made.items()}


def _in_natural_order(named: tuple[str, str]) -> list[tuple[int, str]]:
    """The order in which transformers merges: experts by number."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in named[0].split(".")]
