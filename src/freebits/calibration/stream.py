"""What runs a dense model for calibration, and how well it then predicts."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

AtSite = Callable[[int, Tensor], Tensor]
"""Takes a site and the stream there, (windows, T, D), float32; returns the stream that the model continues with."""


class Runner(Protocol):
    """Runs a dense model whose norms are folded.

    Attributes:
        device: where it runs.
    """

    device: torch.device

    def losses(self, tokens: Tensor, at_site: AtSite, n_measured: int) -> list[float]:
        """Run windows of tokens through the model, all of them from site to site.

        Args:
            tokens: (windows, T), int64.
            at_site: sees the stream at each site, in order, and may replace it.
            n_measured: for how many windows, the last ones, losses are wanted.

        Returns:
            For each of these windows the mean negative log-likelihood of its tokens after the first, in nats.
        """


def perplexity(losses: Sequence[float]) -> float:
    """The perplexity over windows of equal length, from their mean losses in nats; NaN stays NaN."""
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if not mean >= math.log(sys.float_info.max) else math.inf
