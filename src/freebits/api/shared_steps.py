"""Steps that several commands share: calibration windows at the start; model card and signature at the end."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.calibration.self_generated import self_generated_windows
from freebits.calibration.tokens import split_windows, token_windows
from freebits.evaluation.inspection import inspect
from freebits.evaluation.model_card import write_card
from freebits.execution.progress import Progress
from freebits.execution.work_store import Work
from freebits.storage.signature import sign

N_HELD_OUT = 4
"""Windows of the calibration text on which a command measures its result."""


def calibration_windows(
    path: Path,
    text: str | None,
    samples: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    work: Work,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Windows of tokens to calibrate on, (samples, seq_len), and to measure on, (at most `N_HELD_OUT`, seq_len).

    Args:
        path: folder of the model.
        text: the text; None lets the model generate it, once for each work store.
        samples: number of windows to calibrate on; fewer are returned if the text is too short.
        seq_len: tokens per window.
        seed: of the random choice of windows, or of the generated text.
        device: where the model generates text.
        work: stores the generated text.
        progress: called after each generated token.
    """
    if text is None:
        generate = partial(self_generated_windows, path, samples + N_HELD_OUT, seq_len, seed, device, progress)
        windows = work.once("text", generate)
    else:
        windows = token_windows(path, text, seq_len)
    return split_windows(windows, samples, N_HELD_OUT, seed)


def finish(
    directory: Path, original: Path, sign_with: str | os.PathLike[str] | None = None, **card: Any
) -> dict[str, Any]:
    """Write the model card of a new folder and sign it; returns the result of `inspect`.

    Args:
        directory: the folder.
        original: folder of the model it was made from.
        sign_with: file of a private key.
        card: further arguments of `write_card`.
    """
    write_card(directory, original, **card)
    if sign_with is not None:
        sign(directory, sign_with)
    return inspect(directory)
