"""Train what a lossy step left, so that it answers as the model does that it was made from."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freebits.calibration.self_generated import write_windows
from freebits.calibration.tokens import drawn_windows, token_windows
from freebits.errors import CheckpointError, UnsupportedModelError, UsageError
from freebits.evaluation.card import write_card
from freebits.evaluation.inspection import inspect, known_sizes
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.integrations.loading import load
from freebits.integrations.naming import InMemory, known_config
from freebits.integrations.trainable_adapters import Adapted, Rescaled, Trainable
from freebits.models.registration import OwnModel
from freebits.options import INTEGERS, LOSSY, PYRAMID
from freebits.packed.packing import HISTORY, history_of, publish
from freebits.packed.reader import PackedFolder, opened
from freebits.packed.retouching import retouch
from freebits.storage.auxiliary_files import carry_over, write_config, write_remote_code
from freebits.storage.folder import CONFIG, Checkpoint
from freebits.storage.hub import located
from freebits.storage.signature import check_key, sign
from freebits.storage.staging import new_directory
from freebits.storage.writer import CheckpointWriter, shard_bytes
from freebits.version import __version__

HELD_OUT = 8
"""Windows on which is measured what was gained."""
_WARM_UP, _AT_ONCE = 10, 32
_QUANTIZED = (INTEGERS, PYRAMID, "grid")


def recover(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str],
    calibration: str | None = None,
    samples: int = 128,
    seq_len: int = 256,
    rank: int = 16,
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
    sign_with: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Make good a part of what slicing or quantizing cost: lossy, as they are, in a folder as large.

    What can be trained without growing is trained to predict what the model predicts that the folder was made from
    (KL divergence, Adam, each window once): of a quantized folder the steps of its linear layers' rows, in the grid
    that they are stored in, norms and biases; of a plain one every linear layer, by LoRA, merged in the end. (Shortcuts
    of a sliced one, too, which codec `canonical` then stores whole.)

    Both models are in memory, in float32, and what training one window takes.

    Args:
        folder: of a sliced, narrow or other plain checkpoint, or of one that was quantized to integers.
        out: folder to create; it appears complete or not at all.
        against: folder of the model that it was made from.
        calibration: text to train on; by default that model writes its own.
        samples: windows, each of which is trained on once.
        seq_len: tokens a window.
        rank: of LoRA.
        seed: of everything that is drawn.
        device: where to train.
        force: write the model even if training did not help.
        sign_with: file of a private key (PEM), with which every file of the folder is signed; see `verify`.
        progress: called after each token that is written, then after each window.

    Returns:
        What `inspect(out)` says, and `kl`, mean nats per token from `against` on windows that were not trained on:
        {`before`, `after`}.

    Raises:
        UsageError: an argument makes no sense, training did not help, or the extra is not installed.
        CheckpointError: a folder is no sound checkpoint, the models have other tokens, or `out` exists.
        UnsupportedModelError: there is nothing in it that could be trained.
    """
    if rank < 1:
        raise UsageError(f"rank {rank}: give at least 1")
    check_key(sign_with)
    where, folder, against = device_of(device), located(folder), located(against)
    source = opened(folder)
    if isinstance(source, PackedFolder) and not any(recipe.code in _QUANTIZED for recipe in source.manifest.recipes):
        raise CheckpointError(f"{folder} is packed and not quantized: unpack it, recover that, and pack it again")
    with new_directory(out) as directory:
        student = _student(source, load(folder, dtype=torch.float32).to(where).eval(), rank, seed)
        teacher = load(against, dtype=torch.float32).to(where).eval().requires_grad_(False)
        _mean_divergence(teacher, student.model, torch.zeros(1, 2, dtype=torch.int64))  # of the same tokens?
        if calibration is None:
            windows = _written(teacher, samples + HELD_OUT, seq_len, seed, progress)
        else:
            windows = token_windows(against, calibration, seq_len)
        tokens, held_out = drawn_windows(windows, samples, HELD_OUT, seed)
        if not len(held_out):
            raise UsageError(f"the text is one window of {seq_len} tokens: give more, or a lower --seq-len")
        before = _mean_divergence(teacher, student.model, held_out)
        train(student, teacher, tokens, progress)
        student.finish(source.specs)
        after = _mean_divergence(teacher, student.model, held_out)
        if not after < before and not force:
            raise UsageError(
                f"training did not help: mean KL {before:.4f} before and {after:.4f} after, on windows that were not "
                "trained on: give more --samples, or --force"
            )
        transform = {
            "transform": "recover",
            "fidelity": LOSSY,
            "trained": student.what,
            "text": "its own" if calibration is None else "given",
            "samples": len(tokens),
            "seq_len": seq_len,
            "seed": seed,
            "kl": {"before": before, "after": after},
            "bytes": known_sizes(folder),
            "producer": f"freebits {__version__}",
        }
        _write(directory, source, student, transform)
        write_card(directory, source.path)
        if sign_with is not None:
            sign(directory, sign_with)
        return inspect(directory) | {"kl": transform["kl"]}


def _student(source: Checkpoint | PackedFolder, model: Any, rank: int, seed: int) -> Trainable:
    """What is trained of a model.

    Raises:
        UnsupportedModelError: nothing can be.
    """
    named = InMemory(source, known_config(source, source.path))
    names = {}
    for name, parameter in model.named_parameters():
        theirs = named.in_file(name)
        if theirs is not None and source.specs[theirs].shape == tuple(parameter.shape):
            names[name] = theirs
    if isinstance(source, PackedFolder):
        student: Trainable = Rescaled(model, names, source)
    else:
        student = Adapted(model, names, rank, seed)
    if not student.trained:
        raise UnsupportedModelError(f"{source.path} has no linear layer or norm of its own that freebits could train")
    return student


def _written(teacher: Any, samples: int, seq_len: int, seed: int, progress: Progress) -> Tensor:
    """Windows that a model writes, a few at a time, as each has its keys and values in memory."""
    parts = [min(_AT_ONCE, samples - start) for start in range(0, max(1, samples), _AT_ONCE)]
    return torch.cat([write_windows(teacher, n, seq_len, seed + part, progress) for part, n in enumerate(parts)])


def train(student: Trainable, teacher: Any, windows: Tensor, progress: Progress = silent) -> None:
    """Train a student on each window once, with Adam at a rate that rises, then falls to nothing.

    Args:
        student: what is trained.
        teacher: whose predictions it learns.
        windows: (n, T), int64.
        progress: called after each window.

    Raises:
        CheckpointError: predictions are not finite.
    """
    n = len(windows)
    optimizer = torch.optim.Adam(student.trained, lr=student.rate, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / _WARM_UP) * (1 + math.cos(math.pi * done / n)) / 2
    )
    for done, window in enumerate(windows, start=1):
        loss = _divergence(teacher, student.model, window)
        if not loss.isfinite():
            raise CheckpointError("the models' predictions are not finite: their weights overflow, or are damaged")
        loss.backward()
        nn.utils.clip_grad_norm_(student.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        progress("training", "window", done, n)


def _divergence(teacher: Any, student: Any, window: Tensor) -> Tensor:
    """Mean KL divergence of a window's predictions, nats per token."""
    tokens = window[None].to(teacher.device)
    with torch.no_grad():
        expected = teacher(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    found = student(input_ids=tokens, use_cache=False).logits[0]
    if found.shape != expected.shape:
        raise CheckpointError(
            f"one model has {expected.shape[1]} tokens, the other {found.shape[1]}: give the model it was made from"
        )
    return nn.functional.kl_div(found.log_softmax(-1), expected, reduction="sum", log_target=True) / len(window)


@torch.no_grad()
def _mean_divergence(teacher: Any, student: Any, windows: Tensor) -> float:
    return sum(_divergence(teacher, student, window).item() for window in windows) / max(1, len(windows))


def _write(directory: Path, source: Checkpoint | PackedFolder, student: Trainable, transform: dict[str, Any]) -> None:
    """The same folder, what was trained in the place of what was."""
    tensors = student.tensors
    if isinstance(source, PackedFolder):
        manifest = source.manifest
        contents = retouch(directory, source, student.steps() if isinstance(student, Rescaled) else {}, tensors)
        packed_with = manifest.codec, manifest.entropy
        publish(directory, source, contents, source.config, packed_with, [*manifest.history, transform])
        return
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    with CheckpointWriter(directory, shapes, shard_bytes(source)) as writer:
        for name, spec in source.specs.items():
            writer.write(name, tensors[name].detach().to("cpu", spec.dtype) if name in tensors else source[name])
    carry_over(source.path, directory, (file.name for file in source.weight_files))
    write_config(directory / CONFIG, source.config | {HISTORY: {"history": [*history_of(source.config), transform]}})
    model = student.model
    if isinstance(model, OwnModel):
        write_remote_code(directory, type(model).__module__, model.classes)
