"""Measure the perplexity of a model on a text, and its zero-shot accuracy on tasks."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from freebits.calibration.self_generated import cache_parameter
from freebits.calibration.tokens import embedded_text, token_windows
from freebits.errors import UsageError
from freebits.evaluation.coarse_activations import Simulation
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.integrations.loading import load, load_tokenizer
from freebits.transforms.slicing import perplexity as perplexity_of

WINDOW = 512


def evaluate(
    model: str | os.PathLike[str],
    *,
    text: str | None = None,
    seq_len: int = WINDOW,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    data_dir: str | os.PathLike[str] | None = None,
    perplexity: bool = True,
    activations: int | None = None,
    kv: int | None = None,
    rotate: str = "none",
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure perplexity and zero-shot accuracy of a dense, sliced or packed model in float32.

    Args:
        model: folder of the checkpoint.
        text: text to predict; by default pages of Python's documentation (see `embedded_text`).
        seq_len: tokens per window. Windows do not overlap, and the first token of a window is not predicted.
        limit: largest number of windows of the text, and largest number of documents of a task; None uses all.
        tasks: names of lm-eval tasks, which need the extra `eval`.
        data_dir: folder with the documents of the tasks (see `LOCAL_TASKS`); by default, documents are downloaded.
        perplexity: whether to measure perplexity, or only the tasks.
        activations: bits to which inputs of linear layers are rounded; None if they are not rounded. Not with `tasks`.
        kv: bits to which keys and values are rounded; None if they are not rounded. Not with `tasks`.
        rotate: `hadamard` rounds inputs, keys and values in a rotated basis, as in QuaRot.
        device: device on which to run the model.
        progress: callback, called after each window, then after each batch of a task.

    Returns:
        `perplexity` (None if not measured), `tokens` (number of predicted tokens) and `tasks` (see `zero_shot`).

    Raises:
        UsageError: an argument is invalid, the extra `eval` is not installed, or lm-eval cannot measure the tasks.
        CheckpointError: `model` is not a sound checkpoint, or a file in `data_dir` is damaged.
        UnsupportedModelError: transformers has no class for the model, or the model does not predict text.
    """
    if data_dir is not None and not tasks:
        raise UsageError("`data_dir` is given without `tasks`: name the tasks in `tasks`, or leave out `data_dir`")
    lm_eval = _lm_eval() if tasks else None
    prepared = lm_eval.prepare(tasks, data_dir and Path(data_dir)) if lm_eval else []
    simulation = Simulation(activations, kv, rotate)
    if tasks and simulation != Simulation():
        raise UsageError("`activations`, `kv` and `rotate` apply to perplexity only: leave out these or `tasks`")
    if not (perplexity or tasks):
        raise UsageError("there is nothing to measure: give `tasks`, or measure perplexity")
    text = embedded_text()[1] if text is None else text
    windows = token_windows(model, text, seq_len, limit) if perplexity else torch.empty(0, 1, dtype=torch.int64)
    loaded = load(model, dtype=torch.float32).to(device_of(device)).eval()
    losses = []
    with simulation.rounded_inputs(loaded):
        for done, window in enumerate(windows, start=1):
            losses.append(loss(logits(loaded, window, simulation.cache()), window))
            progress("measuring perplexity", "window", done, len(windows))
    scores = {}
    if lm_eval:
        scores = lm_eval.zero_shot(loaded, load_tokenizer(model), prepared, limit=limit, progress=progress)
    return {"perplexity": perplexity_of(losses) if losses else None, "tokens": windows[:, 1:].numel(), "tasks": scores}


def _lm_eval() -> Any:
    """Import `zero_shot_tasks`, which needs the extra `eval`."""
    try:
        return importlib.import_module("freebits.evaluation.zero_shot_tasks")
    except ImportError as error:
        raise UsageError(f"`tasks` need lm-eval ({error}): run pip install 'freebits[eval]'") from None


@torch.no_grad()
def logits(model: Any, window: Tensor, cache: Any = None) -> Tensor:
    """Return the logits for all tokens of a window but the first, (T - 1, V), float32.

    Args:
        model: model as returned by `load`.
        window: (T,), int64.
        cache: cache for the keys and values of this window; None to run the model without a cache.
    """
    options = {} if cache is None else {cache_parameter(model): cache}
    output = model(input_ids=window[None].to(model.device), use_cache=cache is not None, **options)
    result: Tensor = output.logits[0, :-1].float()
    return result


def loss(logits: Tensor, window: Tensor) -> float:
    """Return the mean negative log-likelihood of all tokens of a window, (T,), but the first, in nats per token."""
    return cross_entropy(logits, window[1:].to(logits.device)).item()
