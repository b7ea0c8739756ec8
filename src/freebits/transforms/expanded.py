"""A sliced model with every shortcut a matrix, also where it is stored as a factor."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freebits.errors import CheckpointError
from freebits.models.layout import RANKS, Layout
from freebits.models.table import Architecture
from freebits.storage.folder import Source
from freebits.transforms.polar import shortcut_from_factor
from freebits.types import TensorSpec


class Expanded:
    """A sliced model seen with dense shortcuts. Implements `Source`.

    Raises:
        CheckpointError: the model is not what its `config.json` says.
    """

    def __init__(self, source: Source, architecture: Architecture) -> None:
        self._source = source
        self._layout = Layout.of(source.config, architecture)
        self._layout.check({name: spec.shape for name, spec in source.specs.items()}, architecture)
        subs = [sub for sub in architecture.sublayers if self._layout.rank(sub.site) is not None]
        self._dense = {sub.shortcut.factor: sub.shortcut.weight for sub in subs}
        self._factors = {sub.shortcut.weight: sub for sub in subs}

    @property
    def config(self) -> Mapping[str, Any]:
        """What `config.json` says of the model, less the ranks."""
        return self.plain_config(self._source.config)

    @staticmethod
    def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """What `config.json` says of a model once its shortcuts are dense."""
        return {key: value for key, value in config.items() if key != RANKS}

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors, those of dense shortcuts among them."""
        specs = {self.name(name): spec for name, spec in self._source.specs.items()}
        some = next(spec.code for spec in specs.values())
        for name, sub in self._factors.items():
            after, before = (self._widths[sub.site], self._widths[sub.site - 1])
            specs[name] = TensorSpec(specs[name].code if name in specs else some, (after, before))
        return specs

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`."""
        if name not in self._factors:
            return self._source[name]
        factor = self._factors[name].shortcut.factor
        if factor not in self._source.specs:  # of rank 0, of which nothing needs to be stored
            return self.expand(factor, torch.empty(self.specs[name].shape[1], 0, dtype=self.specs[name].dtype))
        return self.expand(factor, self._source[factor])

    def name(self, name: str) -> str:
        """What a tensor of the source is called here."""
        return self._dense.get(name, name)

    def expand(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the source, as it is here.

        Raises:
            CheckpointError: it does not fit in memory.
        """
        if name not in self._dense:
            return tensor
        after = self._widths[self._factors[self._dense[name]].site]
        try:
            return shortcut_from_factor(tensor, after).to(tensor.dtype)
        except (RuntimeError, MemoryError) as error:  # of the allocator
            raise CheckpointError(
                f"tensor {name} stands for a shortcut that does not fit in memory ({error})"
            ) from None

    @property
    def _widths(self) -> tuple[int, ...]:
        return self._layout.widths or ()
