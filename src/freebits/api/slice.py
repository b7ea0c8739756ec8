"""Slice a dense checkpoint with SliceGPT."""

import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.api.estimate import dense_shapes
from freebits.api.shared_steps import calibration_windows, finish
from freebits.calibration.sliced_runner import FoldedRunner
from freebits.errors import CheckpointError, UsageError
from freebits.evaluation.folder_sizes import dense_bytes
from freebits.execution.executor import Parallel
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.integrations.naming import TransformersView, config_object
from freebits.models.architecture import Architecture, Part
from freebits.models.families import dense_family
from freebits.models.layout import WIDTHS, Layout
from freebits.options import DTYPES, LOSSY
from freebits.packed.manifest import is_packed
from freebits.packed.unpacking import SLICED_IN
from freebits.storage.auxiliary_files import auto_map, copy_auxiliary_files, write_remote_code
from freebits.storage.checkpoint import CONFIG, HISTORY, Checkpoint, Source, history_step, write_json
from freebits.storage.hub import local_folder
from freebits.storage.resumption import Task, text_digest
from freebits.storage.staging import new_directory
from freebits.storage.writer import CheckpointWriter
from freebits.transforms.slicing import Slice, sliced_size
from freebits.transforms.transform import PartChange, transform_parts
from freebits.types import FLOATS

WARN, REFUSE = 1.5, 5.0
"""Slicing warns if perplexity grows by a factor above `WARN`, and fails above `REFUSE` unless `force` is set."""
_log = logging.getLogger(__name__)


def slice_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sparsity: float,
    untie: bool = False,
    calibration: str | None = None,
    samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    random_orientation: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    force: bool = False,
    parallel: Parallel = Parallel(jobs=1),
    resume: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Slice a dense checkpoint with SliceGPT. This is lossy.

    Memory holds about two blocks, one embedding and the residual stream of all windows. It holds the whole model while
    the model generates calibration text, or if the model takes at most 1 GiB in float32.

    Args:
        model: folder of a dense checkpoint.
        out: folder to create; if the function fails, no such folder is left.
        sparsity: fraction of the hidden size to remove, in [0, 1).
        untie: whether a head that is tied to the token embedding gets its own matrix, as in SliceGPT. By default the
            tied matrix is stored once, unchanged except for `dtype`, together with a smaller matrix that maps the
            embeddings of the tokens to the sliced residual stream.
        calibration: text to calibrate on; by default the model generates the text, see `self_generated_windows`.
        samples: number of windows of calibration text, drawn without replacement; fewer if the text is too short.
        seq_len: tokens per window.
        seed: seed for all random choices.
        random_orientation: whether to rotate the kept axes of the residual stream at random within their span.
        device: device on which to calibrate, in float32.
        dtype: dtype of the sliced weights; by default each tensor keeps its dtype, and the new matrices on the skip
            connections get the dtype of the embedding.
        force: whether to write the model even if its perplexity is more than 5 times that of the dense model.
        parallel: accepted for consistency with other commands; slicing uses only this process.
        resume: whether to use the finished work of a stopped run with the same arguments.
        progress: callback, called after each generated token, then after each site of the residual stream, then after
            each block.

    Returns:
        The entries of `inspect(out)`, and `perplexity` {`dense`, `sliced`}: the perplexities of `model` and of the
        sliced model on windows of the calibration text that are not used for calibration. A perplexity is None if there
        are no such windows, or if the perplexity is not finite. Use `evaluate` to measure the loss of quality on
        another text.

    Raises:
        UsageError: an argument is out of range, or slicing ruins the model.
        CheckpointError: `model` is not a sound checkpoint, or `out` already exists.
        UnsupportedModelError: the residual stream of this model cannot be rotated; the message says why.
    """
    model = local_folder(model)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed: slice the dense model it was made from")
    checkpoint = Checkpoint(model)
    dense_family(checkpoint.config)
    config = config_object(checkpoint, model)
    dense = TransformersView(checkpoint, config)
    architecture = _checked_architecture(dense, checkpoint.path)
    baselines = dense_bytes(checkpoint, architecture)
    architecture = architecture.with_tie(architecture.tied and not untie)
    dtypes = _dtypes(dense, architecture, dtype)
    size = sliced_size(architecture.hidden_size, sparsity)
    torch_device = device_of(device, float64=True)
    arguments: dict[str, Any] = {"sparsity": sparsity, "untie": untie, "samples": samples, "seq_len": seq_len}
    arguments |= {
        "seed": seed,
        "dtype": dtype,
        "turned": random_orientation,
        "text": text_digest(calibration),
        "device": device,
    }
    task = Task("slice", checkpoint.path, arguments, resume)
    with new_directory(out, task) as directory, parallel.executor() as executor:
        work = Work(executor, task.store(directory))
        tokens, held_out = calibration_windows(
            checkpoint.path, calibration, samples, seq_len, seed, torch_device, work, progress
        )
        runner = FoldedRunner(dense, config, architecture, torch_device)
        orientation = seed if random_orientation else None
        slicing = Slice(dense, architecture, runner, work, tokens, held_out, size, orientation, progress)
        measured = _write_parts(directory, checkpoint, slicing, dtypes, progress)
        copy_auxiliary_files(checkpoint.path, directory, (file.name for file in checkpoint.weight_files))
        write_remote_code(directory, SLICED_IN, architecture.family.sliced_classes)
        perplexity = _checked_perplexities(measured, sparsity, force)
        facts: dict[str, Any] = {
            "text": "its own" if calibration is None else "given",
            "samples": len(tokens),
            "seq_len": seq_len,
        }
        facts |= {"sparsity": sparsity, "seed": seed, "random_orientation": random_orientation}
        step = history_step("slice", LOSSY, baselines, **facts, perplexity=perplexity)
        dtype = dtypes[architecture.sublayers[0].shortcut.weight]
        layout, history = Layout.sliced(architecture, size), [*checkpoint.history, step]
        write_sliced_config(directory, checkpoint.config, architecture, layout, dtype, history)
        return finish(directory, checkpoint.path) | {"perplexity": perplexity}


def _write_parts(
    directory: Path, checkpoint: Checkpoint, slicing: Slice, dtypes: dict[str, torch.dtype], progress: Progress
) -> dict[str, float]:
    """Write the sliced tensors part by part (embeddings, blocks, head), and return the measured perplexities."""
    architecture, dense = slicing.architecture, slicing.source
    shapes = {name: spec.shape for name, spec in dense.specs.items()}
    sliced_shapes = Layout.sliced(architecture, slicing.size).shapes(architecture, shapes)
    perplexities: dict[str, float] = {}
    device = slicing.runner.device
    transformed = transform_parts(slicing, dense, architecture.parts, dtypes.__getitem__, slicing.work, device)
    parts = map(_finished, transformed)  # not on workers, because the transform holds a running model
    with CheckpointWriter(directory, sliced_shapes, checkpoint.shard_bytes) as writer:
        for done, (tensors, facts) in enumerate(parts, start=1):
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            perplexities |= facts
            progress("slicing", "block", done, len(architecture.parts))
    return perplexities


def _finished(
    transformed: tuple[Part, PartChange, Callable[[], dict[str, Tensor]]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a transformed part, and the facts measured so far."""
    _, change, tensors_of_part = transformed
    return tensors_of_part(), dict(change.facts)


def _checked_architecture(dense: Source, path: Path) -> Architecture:
    """Return the architecture of a dense checkpoint, after checking that the tensors agree with the config.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the config requires, or is not floating-point.
    """
    architecture = Architecture.of(dense.config, len(dense.specs))
    shapes = {name: spec.shape for name, spec in dense.specs.items()}
    Layout().check(shapes, architecture)
    expected = dense_shapes(dict(dense.config), path)
    head, embedding = architecture.head.weight, architecture.embedding.weight
    for name in architecture.without_ignored(dense.specs):
        if shapes[name] != expected.get(name, expected[embedding] if name == head else None):
            raise CheckpointError(
                f"tensor {name} has shape {list(shapes[name])}, which contradicts config.json: download the checkpoint "
                "again"
            )
        if dense.specs[name].dtype_name not in FLOATS:
            raise CheckpointError(
                f"tensor {name} has dtype {dense.specs[name].dtype_name}: give a checkpoint with floating-point weights"
            )
    for name in expected.keys() - dense.specs.keys() - {head}:
        raise CheckpointError(f"tensor {name} is missing: download the checkpoint again")
    if architecture.tied and head in dense.specs and not torch.equal(dense[head], dense[embedding]):
        return architecture.with_tie(False)  # transformers, too, uses a stored head that differs from the embedding
    return architecture


def _dtypes(dense: Source, architecture: Architecture, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return name → dtype of each tensor of the sliced model.

    Raises:
        UsageError: `dtype` is not one of the supported dtypes.
    """
    if dtype is not None and str(dtype).removeprefix("torch.") not in (*DTYPES, "float64"):
        raise UsageError(f"`dtype` is {dtype}: choose {' or '.join(DTYPES)} for the sliced weights")
    dtypes = {name: dtype or spec.dtype for name, spec in dense.specs.items()}
    default = dtypes[architecture.embedding.weight]
    for part in architecture.parts:
        for sub in part.sublayers:  # a bias that folding adds gets the dtype of its matrix
            reads = [read for read in sub.reads if read.weight in dtypes and read.bias not in dtypes]
            dtypes |= {read.bias: dtypes[read.weight] for read in reads}
    head = architecture.head
    dtypes.setdefault(head.weight, default)
    dtypes.setdefault(head.bias, dtypes[head.weight])
    return {name: dtypes.get(name, default) for name in architecture.weights}


def _checked_perplexities(perplexities: dict[str, float], sparsity: float, force: bool) -> dict[str, float | None]:
    """Warn if slicing loses much quality. Return the perplexities, with None for those that are not finite.

    Raises:
        UsageError: perplexity grows by more than the factor `REFUSE`, or becomes infinite, and `force` is not set.
    """
    if not perplexities:
        return {"dense": None, "sliced": None}
    before, after = perplexities["dense"], perplexities["sliced"]
    growth = after / before if before else math.nan
    finding = (
        f"a sparsity of {sparsity} raises perplexity from {before:.2f} to {after:.2f} on held-out windows of the "
        "calibration text"
    )
    if not growth <= REFUSE and not force and math.isfinite(before):
        raise UsageError(f"{finding}, which ruins the model: choose a smaller `sparsity`, or set `force`")
    if not growth <= WARN:
        _log.warning("freebits: %s: measure the model on your own text with freebits eval", finding)
    return {name: value if math.isfinite(value) else None for name, value in perplexities.items()}


def write_sliced_config(
    directory: Path,
    config: Mapping[str, Any],
    architecture: Architecture,
    layout: Layout,
    dtype: torch.dtype,
    history: list[dict[str, Any]],
) -> None:
    """Write the `config.json` of a sliced model.

    Args:
        directory: folder of the sliced model.
        config: config of the dense model.
        architecture: table of the sliced model's tensors.
        layout: widths of the sliced model.
        dtype: dtype of most weights.
        history: steps that made the sliced model.
    """
    family = architecture.family
    common = {key: value for key, value in config.items() if key not in ("torch_dtype", WIDTHS)}
    sliced = {
        "model_type": family.sliced_model_type,
        "architectures": [family.sliced_causal_lm],
        "auto_map": auto_map(family.sliced_classes),
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": architecture.tied,
        **layout.to_config(),
        HISTORY: {"history": history},
    }
    write_json(directory / CONFIG, common | sliced)
