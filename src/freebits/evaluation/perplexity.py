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
    """Measure perplexity and zero-shot accuracy of a dense, sliced or packed model, run in float32.

    Args:
        model: folder of the checkpoint.
        text: the text to predict; by default the embedded held-out text.
        seq_len: tokens per window. Windows do not overlap, so each predicts `seq_len - 1` tokens.
        limit: the most windows of the text, and documents of each task, to use.
        tasks: names of lm-eval tasks; needs the extra `eval`.
        data_dir: folder with the tasks' documents (see `evaluation.tasks.LOCAL_TASKS`); by default they are downloaded.
        perplexity: whether to measure perplexity, or only the tasks.
        activations: bits of the simulated inputs of linear layers; None for floats. Perplexity only.
        kv: bits of the simulated keys and values, likewise.
        rotate: `hadamard` simulates both in a rotated basis, as in QuaRot.
        device: the device to run on.
        progress: called after each window, then after each batch of a task.

    Returns:
        `perplexity` (None if not measured), `tokens` (the number of predicted tokens), `tasks` {name: {`acc`, …}} as
        returned by `zero_shot`.

    Raises:
        UsageError: an argument is invalid, or the extra is not installed.
        CheckpointError: `model` is not a valid checkpoint. UnsupportedModelError: it does not predict text.
    """
    if data_dir is not None and not tasks:
        raise UsageError("`data_dir` is given without `tasks`: name the tasks to measure")
    lm_eval = _lm_eval() if tasks else None
    prepared = lm_eval.prepare(tasks, data_dir and Path(data_dir)) if lm_eval else []
    simulation = Simulation(activations, kv, rotate)
    if tasks and simulation != Simulation():
        raise UsageError("`activations` and `kv` apply to perplexity only: leave out `tasks`")
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
    """Import `evaluation.tasks`, which needs an extra."""
    try:
        return importlib.import_module("freebits.evaluation.zero_shot_tasks")
    except ImportError as error:
        raise UsageError(f"`tasks` need lm-eval ({error}): pip install 'freebits[eval]'") from None


@torch.no_grad()
def logits(model: Any, window: Tensor, cache: Any = None) -> Tensor:
    """Return the logits for the tokens after the first, (T - 1, V); a given cache takes keys and values."""
    options = {} if cache is None else {cache_parameter(model): cache}
    output = model(input_ids=window[None].to(model.device), use_cache=cache is not None, **options)
    result: Tensor = output.logits[0, :-1].float()
    return result


def loss(logits: Tensor, window: Tensor) -> float:
    """Mean negative log-likelihood of a window's tokens after the first, in nats."""
    return cross_entropy(logits, window[1:].to(logits.device)).item()
