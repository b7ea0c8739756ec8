"""What runs a dense model for calibration, and how well it then predicts."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Runner(Protocol):
    """Runs a dense model: its embedding, one block's sublayers at a time, its head.

    Streams are on the CPU, whatever the device.

    Attributes:
        device: where it runs.
        loaded: the block that it can run.
    """

    device: torch.device
    loaded: int | None

    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """The stream before the first block, (windows, T, D), for tokens (windows, T)."""

    def load(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over the folded tensors of block number `block`."""

    def run(self, sublayer: int, x: Tensor) -> Tensor:
        """The stream after the loaded block's `sublayer`, for the stream before it; both (1, T, D)."""

    def losses(self, tensors: Mapping[str, Tensor], x: Tensor, tokens: Tensor) -> list[float]:
        """Mean negative log-likelihood of each window's tokens after the first, for the stream after the last block."""


def perplexity(losses: Sequence[float]) -> float:
    """The perplexity over windows of equal length, from their mean losses in nats; NaN stays NaN."""
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if not mean >= math.log(sys.float_info.max) else math.inf
