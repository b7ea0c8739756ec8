"""Train a sliced, low-rank or quantized model to predict what the original model predicts."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freebits.api.shared_steps import finish
from freebits.calibration.self_generated import generate_windows
from freebits.calibration.tokens import split_windows, token_windows
from freebits.errors import CheckpointError, UnsupportedModelError, UsageError
from freebits.evaluation.inspection import known_sizes
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.integrations.loading import load
from freebits.integrations.naming import TransformersView, config_object
from freebits.integrations.trainable_adapters import LoraAdapters, ScaleAdapters, Trainable
from freebits.models.derived_classes import OwnModel
from freebits.options import INTEGERS, LOSSY, PYRAMID
from freebits.packed.packing import publish
from freebits.packed.partial_copy import copy_with_changes
from freebits.packed.reader import PackedFolder, open_folder
from freebits.storage.auxiliary_files import copy_auxiliary_files, write_config, write_remote_code
from freebits.storage.checkpoint import CONFIG, HISTORY, Folder, history_step
from freebits.storage.hub import local_folder
from freebits.storage.signature import check_key
from freebits.storage.staging import new_directory
from freebits.storage.writer import CheckpointWriter

HELD_OUT = 8
"""Number of windows on which the KL divergence is measured."""
_WARM_UP = 10
"""Number of windows over which the learning rate is warmed up; see `train`."""
_BATCH = 32
"""Number of windows that a model generates at once."""
_QUANTIZED = (INTEGERS, PYRAMID)


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
    """Recover a part of the quality that slicing or quantizing lost. This is lossy.

    Training minimizes the KL divergence from the predictions of the original model. It uses Adam, and each window once.
    In a quantized folder, it changes norms, biases and the row scales of linear layers; the scales only take values
    that the folder can store. In a plain folder, it changes every linear layer except the head by LoRA, which is merged
    at the end. In a sliced model, this includes the matrices on the skip connections (the shortcuts).

    The size hardly changes. But after training, shortcuts can no longer be stored as small factors, so a sliced model
    becomes a few percent larger when it is packed.

    Memory holds both models in float32, and the activations of one window or, while the original model generates the
    text, the keys and values of 32 windows.

    Args:
        folder: folder of a plain checkpoint, such as a sliced or low-rank one, or of a quantized checkpoint.
        out: folder to create; if the function fails, no such folder is left.
        against: folder of the original model.
        calibration: text to train on; by default the original model generates the text.
        samples: number of windows to train on.
        seq_len: tokens per window.
        rank: rank of the LoRA updates.
        seed: seed for all random choices.
        device: device on which to train.
        force: whether to write the model even if training did not help.
        sign_with: file with a private key (PEM), which signs every file of the folder; see `verify`.
        progress: callback, called after each generated token, then after each window.

    Returns:
        The entries of `inspect(out)`, and `kl` {`before`, `after`}: the mean KL divergence from `against` before and
        after training, in nats per token, on windows that are not used for training.

    Raises:
        UsageError: an argument is out of range, training did not help, or the extra `recover`, which LoRA needs, is not
            installed.
        CheckpointError: a folder is not a sound checkpoint, is packed but not quantized, or gives predictions that are
            not finite; the vocabularies differ; or `out` already exists.
        UnsupportedModelError: nothing in the model can be trained, `folder` needs a base, or transformers has no class
            for a model.
    """
    if rank < 1:
        raise UsageError(f"`rank` is {rank}: give at least 1")
    check_key(sign_with)
    torch_device, folder, against = device_of(device), local_folder(folder), local_folder(against)
    source = open_folder(folder)
    if isinstance(source, PackedFolder) and not any(recipe.code in _QUANTIZED for recipe in source.manifest.recipes):
        raise CheckpointError(
            f"{folder} is packed but not quantized: unpack it, recover the unpacked folder, and pack the output"
        )
    if isinstance(source, PackedFolder) and source.manifest.base:
        raise UnsupportedModelError(f"{folder} needs a base, which `recover` does not support: unpack it first")
    with new_directory(out) as directory:
        student = _trainable(source, load(folder, dtype=torch.float32).to(torch_device).eval(), rank, seed)
        teacher = load(against, dtype=torch.float32).to(torch_device).eval().requires_grad_(False)
        _mean_divergence(teacher, student.model, torch.zeros(1, 2, dtype=torch.int64))  # checks the vocabularies early
        if calibration is None:
            windows = _generated(teacher, samples + HELD_OUT, seq_len, seed, progress)
        else:
            windows = token_windows(against, calibration, seq_len)
        tokens, held_out = split_windows(windows, samples, HELD_OUT, seed)
        if not len(held_out):
            raise UsageError(f"the text has only one window of {seq_len} tokens: give more text or a smaller `seq_len`")
        before = _mean_divergence(teacher, student.model, held_out)
        train(student, teacher, tokens, progress)
        student.finish(source.specs)
        after = _mean_divergence(teacher, student.model, held_out)
        if not after < before and not force:
            raise UsageError(
                f"training did not help (mean KL {before:.4f} before and {after:.4f} after, on windows that were not "
                "used for training): raise `samples`, or set `force`"
            )
        kl = {"before": before, "after": after}
        facts: dict[str, Any] = {
            "text": "its own" if calibration is None else "given",
            "samples": len(tokens),
            "seq_len": seq_len,
        }
        facts |= {"trained": student.description, "seed": seed, "kl": kl}
        _write(directory, source, student, history_step("recover", LOSSY, known_sizes(folder), **facts))
        return finish(directory, source.path, sign_with) | {"kl": kl}


def _trainable(source: Folder, model: Any, rank: int, seed: int) -> Trainable:
    """Add trainable adapters to a model.

    Raises:
        UnsupportedModelError: nothing in the model can be trained.
    """
    named = TransformersView(source, config_object(source, source.path))
    names = {}
    for name, parameter in model.named_parameters():
        name_in_file = named.checkpoint_name(name)
        if name_in_file is not None and source.specs[name_in_file].shape == tuple(parameter.shape):
            names[name] = name_in_file
    if isinstance(source, PackedFolder):
        trainable: Trainable = ScaleAdapters(model, names, source)
    else:
        trainable = LoraAdapters(model, names, rank, seed)
    if not trainable.trained:
        raise UnsupportedModelError(f"{source.path} has no linear layer or norm that freebits can train")
    return trainable


def _generated(teacher: Any, samples: int, seq_len: int, seed: int, progress: Progress) -> Tensor:
    """Generate windows with a model, in batches, which limits the memory for keys and values."""
    sizes = [min(_BATCH, samples - start) for start in range(0, max(1, samples), _BATCH)]
    return torch.cat([generate_windows(teacher, n, seq_len, seed + batch, progress) for batch, n in enumerate(sizes)])


def train(student: Trainable, teacher: Any, windows: Tensor, progress: Progress = silent) -> None:
    """Train a student on each window once, with Adam.

    The learning rate is the student's `rate`, times a factor that falls from 1 to 0 along half a cosine, times a factor
    that rises linearly to 1 over the first windows.

    Args:
        student: the model with trainable adapters.
        teacher: the model whose predictions the student learns.
        windows: windows to train on, (n, T), int64.
        progress: callback, called after each window.

    Raises:
        CheckpointError: the loss is not finite.
    """
    n = len(windows)
    optimizer = torch.optim.Adam(student.trained, lr=student.rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / _WARM_UP) * (1 + math.cos(math.pi * done / n)) / 2
    )
    for done, window in enumerate(windows, start=1):
        loss = _divergence(teacher, student.model, window)
        if not loss.isfinite():
            raise CheckpointError(
                "the predictions of the trained or the original model are not finite, so weights overflow or are "
                "damaged: check both models with freebits eval"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(student.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress("training", "window", done, n)


def _divergence(teacher: Any, student: Any, window: Tensor) -> Tensor:
    """Return the KL divergence of the student from the teacher on a window, in nats per token."""
    tokens = window[None].to(teacher.device)
    with torch.no_grad():
        expected = teacher(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    logits = student(input_ids=tokens, use_cache=False).logits[0]
    if logits.shape != expected.shape:
        raise CheckpointError(
            f"`against` has a vocabulary of {expected.shape[1]} tokens, but the model to train has {logits.shape[1]} "
            "tokens: give the original model"
        )
    return nn.functional.kl_div(logits.log_softmax(-1), expected, reduction="sum", log_target=True) / len(window)


@torch.no_grad()
def _mean_divergence(teacher: Any, student: Any, windows: Tensor) -> float:
    return sum(_divergence(teacher, student, window).item() for window in windows) / max(1, len(windows))


def _write(directory: Path, source: Folder, student: Trainable, step: dict[str, Any]) -> None:
    """Write the source folder with the trained tensors in place of the original tensors."""
    tensors = student.tensors
    if isinstance(source, PackedFolder):
        manifest = source.manifest
        contents = copy_with_changes(
            directory, source, student.exponent_changes() if isinstance(student, ScaleAdapters) else {}, tensors
        )
        coded_with = manifest.codec, manifest.entropy
        publish(directory, source, contents, source.config, coded_with, [*source.history, step])
        return
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    with CheckpointWriter(directory, shapes, source.shard_bytes) as writer:
        for name, spec in source.specs.items():
            writer.write(name, tensors[name].detach().to("cpu", spec.dtype) if name in tensors else source[name])
    copy_auxiliary_files(source.path, directory, (file.name for file in source.weight_files))
    write_config(directory / CONFIG, {**source.config, HISTORY: {"history": [*source.history, step]}})
    model = student.model
    if isinstance(model, OwnModel):
        write_remote_code(directory, type(model).__module__, model.classes)
