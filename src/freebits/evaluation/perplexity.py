"""Perplexity on a text."""

import math
import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from freebits.huggingface import load, token_windows
from freebits.huggingface.loading import device_of
from freebits.progress import Progress, silent
from freebits.text import embedded_text

WINDOW = 512


def evaluate(
    model: str | os.PathLike[str],
    *,
    text: str | None = None,
    seq_len: int = WINDOW,
    limit: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity of a dense, sliced or packed model, run in float32.

    Args:
        model: folder of the checkpoint.
        text: what to predict; by default the embedded held-out text.
        seq_len: tokens a window; windows do not overlap, so each predicts `seq_len - 1` tokens.
        limit: use the first so many windows only.
        device: where to run.
        progress: called after each window.

    Returns:
        `perplexity`, `tokens` (how many were predicted), `tasks` (empty: perplexity alone is measured).
    """
    windows = token_windows(model, embedded_text()[1] if text is None else text, seq_len, limit)
    running = load(model, dtype=torch.float32).to(device_of(device)).eval()
    losses = []
    for done, window in enumerate(windows, start=1):
        losses.append(loss(logits(running, window), window))
        progress(done, len(windows))
    return {"perplexity": mean_perplexity(losses), "tokens": windows[:, 1:].numel(), "tasks": {}}


@torch.no_grad()
def logits(model: Any, window: Tensor) -> Tensor:
    """The model's logits for the tokens after the first, (T - 1, V)."""
    result: Tensor = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1].float()
    return result


def loss(logits: Tensor, window: Tensor) -> float:
    """Mean negative log-likelihood of a window's tokens after the first, in nats."""
    return cross_entropy(logits, window[1:].to(logits.device)).item()


def mean_perplexity(losses: list[float]) -> float:
    """The perplexity over windows of equal length, from their mean losses."""
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf
