"""How well a model predicts a text, and, if asked, how well it answers."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from freebits.calibration.self_generated import cache_name
from freebits.calibration.tokens import embedded_text, token_windows
from freebits.errors import UsageError
from freebits.evaluation.simulation import Simulation
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
    """Perplexity and zero-shot accuracy of a dense, sliced or packed model, run in float32.

    Args:
        model: folder of the checkpoint.
        text: what to predict; by default the embedded held-out text.
        seq_len: tokens a window; windows do not overlap, so each predicts `seq_len - 1` tokens.
        limit: use the first so many windows of the text, and documents of each task, only.
        tasks: names that lm-eval knows; needs the extra `eval`.
        data_dir: folder with the tasks' documents (see `evaluation.tasks.LOCAL_TASKS`); by default the hub's are taken.
        perplexity: measure it; without it only the tasks.
        activations: bits at which the inputs of linear layers are simulated; None for floats. Perplexity only.
        kv: bits at which keys and values are simulated, likewise.
        rotate: `hadamard` simulates both in a rotated basis, as QuaRot.
        device: where to run.
        progress: called after each window, then after each batch of a task.

    Returns:
        `perplexity` (None if not asked for), `tokens` (how many were predicted), `tasks` {name: {`acc`, …}} as of
        `zero_shot`.

    Raises:
        UsageError: an argument makes no sense, or the extra is not installed.
        CheckpointError: `model` is no sound checkpoint. UnsupportedModelError: it predicts no text.
    """
    if data_dir is not None and not tasks:
        raise UsageError("--data-dir holds the documents of tasks: name them with --tasks")
    lm_eval = _lm_eval() if tasks else None
    prepared = lm_eval.prepare(tasks, data_dir and Path(data_dir)) if lm_eval else []
    simulated = Simulation(activations, kv, rotate)
    if tasks and simulated != Simulation():
        raise UsageError("activations and cache are simulated for perplexity alone: leave --tasks out")
    if not (perplexity or tasks):
        raise UsageError("there is nothing to measure: name --tasks, or leave --no-perplexity")
    text = embedded_text()[1] if text is None else text
    windows = token_windows(model, text, seq_len, limit) if perplexity else torch.empty(0, 1, dtype=torch.int64)
    running = load(model, dtype=torch.float32).to(device_of(device)).eval()
    losses = []
    with simulated.activations_of(running):
        for done, window in enumerate(windows, start=1):
            losses.append(loss(logits(running, window, simulated.cache()), window))
            progress("measuring perplexity", "window", done, len(windows))
    answers = {}
    if lm_eval:
        answers = lm_eval.zero_shot(running, load_tokenizer(model), prepared, limit=limit, progress=progress)
    return {"perplexity": perplexity_of(losses) if losses else None, "tokens": windows[:, 1:].numel(), "tasks": answers}


def _lm_eval() -> Any:
    try:
        return importlib.import_module("freebits.evaluation.tasks")
    except ImportError as error:
        raise UsageError(f"tasks need lm-eval ({error}): pip install 'freebits[eval]'") from None


@torch.no_grad()
def logits(model: Any, window: Tensor, cache: Any = None) -> Tensor:
    """The model's logits for the tokens after the first, (T - 1, V); keys and values pass through a cache, if given."""
    through = {} if cache is None else {cache_name(model): cache}
    output = model(input_ids=window[None].to(model.device), use_cache=cache is not None, **through)
    result: Tensor = output.logits[0, :-1].float()
    return result


def loss(logits: Tensor, window: Tensor) -> float:
    """Mean negative log-likelihood of a window's tokens after the first, in nats."""
    return cross_entropy(logits, window[1:].to(logits.device)).item()
