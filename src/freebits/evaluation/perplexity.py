"""How well a model predicts a text, and, if asked, how well it answers."""

import importlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from freebits.errors import UsageError
from freebits.huggingface import load, token_windows
from freebits.huggingface.loading import device_of, load_tokenizer
from freebits.progress import Progress, silent
from freebits.text import embedded_text

WINDOW = 512


def evaluate(
    model: str | os.PathLike[str],
    *,
    text: str | None = None,
    seq_len: int = WINDOW,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    data_dir: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity and zero-shot accuracy of a dense, sliced or packed model, run in float32.

    Args:
        model: folder of the checkpoint.
        text: what to predict; by default the embedded held-out text.
        seq_len: tokens a window; windows do not overlap, so each predicts `seq_len - 1` tokens.
        limit: use the first so many windows of the text, and documents of each task, only.
        tasks: names that lm-eval knows; needs the extra `eval`.
        data_dir: folder with the tasks' documents (see `evaluation.tasks.LOCAL_TASKS`); by default the hub's are taken.
        device: where to run.
        progress: called after each window, then after each batch of a task.

    Returns:
        `perplexity`, `tokens` (how many were predicted), `tasks` {name: {`acc`, `acc_stderr`, …}} as of `zero_shot`.

    Raises:
        UsageError: an argument cannot be, or the extra is not installed.
        CheckpointError: `model` is no sound checkpoint.
    """
    if data_dir is not None and not tasks:
        raise UsageError("--data-dir holds the documents of tasks: name them with --tasks")
    lm_eval = _lm_eval() if tasks else None
    prepared = lm_eval.prepare(tasks, data_dir and Path(data_dir)) if lm_eval else []
    windows = token_windows(model, embedded_text()[1] if text is None else text, seq_len, limit)
    running = load(model, dtype=torch.float32).to(device_of(device)).eval()
    losses = []
    for done, window in enumerate(windows, start=1):
        losses.append(loss(logits(running, window), window))
        progress(done, len(windows))
    answers = {}
    if lm_eval:
        answers = lm_eval.zero_shot(running, load_tokenizer(model), prepared, limit=limit, progress=progress)
    return {"perplexity": mean_perplexity(losses), "tokens": windows[:, 1:].numel(), "tasks": answers}


def _lm_eval() -> Any:
    try:
        return importlib.import_module("freebits.evaluation.tasks")
    except ImportError as error:
        raise UsageError(f"tasks need lm-eval ({error}): pip install 'freebits[eval]'") from None


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
