"""A view of a sliced model in which every shortcut is a matrix, even if the model stores a factor instead."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freebits.errors import CheckpointError
from freebits.models.architecture import Architecture
from freebits.models.layout import RANKS, Layout
from freebits.storage.checkpoint import Source
from freebits.transforms.polar import shortcut_from_factor
from freebits.types import TensorSpec


class DenseShortcutView:
    """A view of a sliced model with dense shortcuts. Implements `Source`.

    Raises:
        CheckpointError: the tensors do not match `config.json`.
    """

    def __init__(self, source: Source, architecture: Architecture) -> None:
        self._source = source
        self._layout = Layout.of(source.config, architecture)
        self._layout.check({name: spec.shape for name, spec in source.specs.items()}, architecture)
        subs = [sub for sub in architecture.sublayers if self._layout.rank(sub.site) is not None]
        self._weight_of_factor = {sub.shortcut.factor: sub.shortcut.weight for sub in subs}
        self._sublayers = {sub.shortcut.weight: sub for sub in subs}

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of `config.json` without the ranks."""
        return self.plain_config(self._source.config)

    @staticmethod
    def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of `config.json` for a model with dense shortcuts."""
        return {key: value for key, value in config.items() if key != RANKS}

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensor specs, including those of the dense shortcuts."""
        specs = {self.name(name): spec for name, spec in self._source.specs.items()}
        default_dtype = next(spec.dtype_name for spec in specs.values())
        for name, sub in self._sublayers.items():
            after, before = (self._widths[sub.site], self._widths[sub.site - 1])
            specs[name] = TensorSpec(specs[name].dtype_name if name in specs else default_dtype, (after, before))
        return specs

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor called `name`."""
        if name not in self._sublayers:
            return self._source[name]
        factor = self._sublayers[name].shortcut.factor
        if factor not in self._source.specs:  # a factor of rank 0 need not be stored
            return self.expand(factor, torch.empty(self.specs[name].shape[1], 0, dtype=self.specs[name].dtype))
        return self.expand(factor, self._source[factor])

    def name(self, name: str) -> str:
        """Return the name that a tensor of the source has in this view."""
        return self._weight_of_factor.get(name, name)

    def expand(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the source, or the dense shortcut if the tensor is a shortcut factor.

        Raises:
            CheckpointError: the dense shortcut does not fit in memory.
        """
        if name not in self._weight_of_factor:
            return tensor
        after = self._widths[self._sublayers[self._weight_of_factor[name]].site]
        try:
            return shortcut_from_factor(tensor, after).to(tensor.dtype)
        except (RuntimeError, MemoryError) as error:  # raised by the allocator
            raise CheckpointError(
                f"tensor {name} expands to a shortcut that does not fit in memory ({error}): "
                "use a machine with more memory"
            ) from None

    @property
    def _widths(self) -> tuple[int, ...]:
        return self._layout.widths or ()
