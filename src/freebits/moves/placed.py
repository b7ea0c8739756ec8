"""A model whose tensors lie on a device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from freebits.checkpoint import View


@dataclass(frozen=True)
class Placed(View):
    """A source seen from where its tensors are worked on."""

    device: torch.device

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, on the device."""
        return self.source[name].to(self.device)
