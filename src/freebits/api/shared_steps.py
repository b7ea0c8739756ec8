"""Functions that several commands share: choose calibration windows, and write the model card and the signature."""

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
"""Number of windows of the calibration text that are not used for calibration, but to measure the result."""


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
    """Return windows to calibrate on, (samples, seq_len), and others to measure on, (at most `N_HELD_OUT`, seq_len).

    Args:
        path: folder of the model.
        text: calibration text; if None, the model generates the text.
        samples: number of windows to calibrate on; fewer are returned if the text is too short.
        seq_len: tokens per window.
        seed: seed for the choice of windows and for the generated text.
        device: device on which the model generates text.
        work: stores the generated text, so that a resumed run need not generate it again.
        progress: callback, called after each generated token.
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
    """Write the model card of a new folder, sign the folder, and return the result of `inspect`.

    Args:
        directory: the new folder, complete except for the model card and the signature.
        original: folder of the model that the new folder was made from.
        sign_with: file with a private key; if None, the folder is not signed.
        card: further arguments of `write_card`.
    """
    write_card(directory, original, **card)
    if sign_with is not None:
        sign(directory, sign_with)
    return inspect(directory)
