"""A checkpoint as transformers has it in memory: under its names, with the experts of a block in one tensor.

Checkpoints on the hub are as they were published. transformers renames their tensors while it loads them, and merges
some; its own tables say how.
"""

import copy
import os
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from freebits.checkpoint import Source
from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.huggingface.blockwise import dense_model
from freebits.huggingface.loading import one_line_errors
from freebits.huggingface.packed_models import inner_config
from freebits.kind import Kind


def known_config(source: Source, path: str | os.PathLike[str]) -> PreTrainedConfig:
    """What transformers makes of a checkpoint's config.

    Raises:
        CheckpointError: it is no config, or asks for more blocks than there are tensors.
        UnsupportedModelError: transformers has no such model.
    """
    with one_line_errors(path, "model"):
        config = inner_config(source.config).from_dict(dict(source.config))
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise UnsupportedModelError(f"a model of type {config.model_type!r} has more than one stack of blocks, or none")
    if depth > len(source.kinds):
        raise CheckpointError(
            f"config.json asks for {depth} blocks, but there are {len(source.kinds)} tensors: the "
            "checkpoint is incomplete"
        )
    return config


class InMemory:
    """A checkpoint under the names of transformers' modules. Implements `Source`.

    A tensor of which transformers knows nothing keeps its name.
    """

    def __init__(self, source: Source, config: PreTrainedConfig) -> None:
        self.config = source.config
        self._source = source
        model = dense_model(config)
        self._model = model
        transforms = get_model_conversion_mapping(model)
        renamings = [of for of in transforms if isinstance(of, WeightRenaming)]
        converters = [of for of in transforms if isinstance(of, WeightConverter)]
        patterns = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        theirs = model.state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
        self._places: dict[str, Tensor] = {}
        self._made_of: dict[str, list[str]] = {}
        self._converters: dict[str, tuple[WeightConverter, dict[str, str]]] = {}
        for name in source.kinds:
            renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, theirs)
            if renamed not in self._shapes:
                renamed, pattern = name, None
            self._made_of.setdefault(renamed, []).append(name)
            if pattern is not None:
                self._converters.setdefault(renamed, (patterns[pattern], {}))[1][name] = pattern

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """Dtype and shape of every tensor, as transformers has it."""
        kinds = {}
        for name, made_of in self._made_of.items():
            first = self._source.kinds[made_of[0]]
            kinds[name] = Kind(first.code, self._shapes[name]) if name in self._converters else first
        return kinds

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, read and merged now."""
        if name not in self._converters:
            return self._source[self._made_of.get(name, [name])[0]]
        return self._merged(name, self._source.__getitem__)

    def origins(self, matrix: str) -> dict[str, slice]:
        """Where a matrix is in the checkpoint: names of tensors, with the rows that each has of it.

        Args:
            matrix: a tensor's name here, or `name[3]` for the fourth of a stack.
        """
        name, _, number = matrix.removesuffix("]").partition("[")
        if not number:
            return {self._made_of[name][0]: slice(None)} if name in self._made_of else {}
        if name not in self._converters:
            return {}
        if name not in self._places:
            parts = self._made_of[name]
            rows = {part: self._source.kinds[part].shape[0] for part in parts}
            index = {part: torch.full((rows[part], 1), number) for number, part in enumerate(parts)}
            self._places[name] = self._merged(name, index.__getitem__)[..., 0]
        place = self._places[name][int(number)]
        counts = place.unique_consecutive(return_counts=True)[1]
        ends = counts.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return {self._made_of[name][place[at]]: slice(at, end) for at, end in zip(starts, ends, strict=True)}

    def _merged(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """What becomes of the tensors that make one, as transformers merges them."""
        converter, patterns = self._converters[name]
        merging: Any = copy.deepcopy(converter)
        for part in self._made_of[name]:
            merging.add_tensor(name, part, patterns[part], partial(read, part))
        made = merging.convert(name, model=self._model, config=self._model.config)
        tensor: Tensor = made[name]
        return tensor if isinstance(tensor, torch.Tensor) else tensor[0]
