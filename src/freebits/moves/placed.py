"""A model whose tensors lie on a device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freebits.checkpoint import Source
from freebits.kind import Kind


@dataclass(frozen=True)
class Placed:
    """A source seen from where its tensors are worked on. Implements `Source`."""

    source: Source
    device: torch.device

    @property
    def config(self) -> Mapping[str, Any]:
        """What `config.json` says of the model."""
        return self.source.config

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """The tensors."""
        return self.source.kinds

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, on the device."""
        return self.source[name].to(self.device)
