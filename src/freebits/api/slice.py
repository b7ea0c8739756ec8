"""Slice a checkpoint folder into another."""

import logging
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.api.estimate import dense_shapes
from freebits.calibration.self_generated import self_generated_windows
from freebits.calibration.sliced_runner import FoldedRunner
from freebits.calibration.tokens import drawn_windows, token_windows
from freebits.errors import CheckpointError, UsageError
from freebits.evaluation.card import write_card
from freebits.evaluation.inspection import inspect
from freebits.evaluation.sizes import dense_bytes
from freebits.execution.executor import Parallel
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.integrations.naming import InMemory, known_config
from freebits.models.families import dense_family
from freebits.models.layout import WIDTHS, Layout
from freebits.models.table import Architecture, Part
from freebits.options import DTYPES, LOSSY
from freebits.packed.manifest import is_packed
from freebits.packed.packing import HISTORY, history_of
from freebits.packed.unpacking import SLICED_IN
from freebits.storage.auxiliary_files import auto_map, carry_over, write_remote_code
from freebits.storage.folder import CONFIG, Checkpoint, Source, write_json
from freebits.storage.hub import located
from freebits.storage.staging import new_directory
from freebits.storage.task import Task, text_digest
from freebits.storage.writer import CheckpointWriter, shard_bytes
from freebits.transforms.slicing import Slice, sliced_size
from freebits.transforms.transform import Turn, transform_parts
from freebits.types import FLOATS
from freebits.version import __version__

HELD_OUT = 4
"""Windows on which the cost of slicing is measured."""
WARN, REFUSE = 1.5, 5.0
"""Growth of perplexity above which slicing warns, and above which it gives nothing without `force`."""
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
    """Slice a dense checkpoint (SliceGPT): lossy. Memory holds one block, one embedding and the activations.

    Args:
        model: folder of a dense checkpoint.
        out: folder to create; it appears complete or not at all.
        sparsity: the part of the hidden size to remove, in [0, 1).
        untie: give a head that is tied to the token embedding a matrix of its own, as SliceGPT does. By default
            that matrix is kept once, bit for bit (unless `dtype` is another), with a factor between it and the
            sliced stream.
        calibration: text to calibrate on; by default the model writes its own, see `self_generated_windows`.
        samples: windows of calibration text, drawn without replacement; all but a few where the text has fewer.
        seq_len: tokens a window.
        seed: of that draw, and of the random orientation.
        random_orientation: turn each kept subspace at random within itself.
        device: where to calibrate, in float32.
        dtype: of the sliced weights; by default each keeps its own, and a shortcut has that of the embedding.
        force: write the model even if its perplexity is more than 5 times that of the dense one.
        parallel: accepted as by the other commands; slicing runs in this process alone.
        resume: go on with what a stopped run of the same arguments left, block by block.
        progress: called after each block.

    Returns:
        What `inspect(out)` says, and `perplexity` {`dense`, `sliced`} on
        other windows of the calibration text: how much worse the model is on other text, only `evaluate` can tell.
        None where the text has no other window.

    Raises:
        UsageError: an argument makes no sense, or slicing ruins the model.
        CheckpointError: `model` is no sound checkpoint, or `out` exists.
        UnsupportedModelError: no rotation of this model's stream is free; the message says why.
    """
    model = located(model)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: slice the dense model it was made from")
    checkpoint = Checkpoint(model)
    dense_family(checkpoint.config)
    config = known_config(checkpoint, model)
    dense = InMemory(checkpoint, config)
    architecture = _checked_architecture(dense, checkpoint.path)
    baselines = dense_bytes(checkpoint, architecture)
    architecture = architecture.with_tie(architecture.tied and not untie)
    dtypes = _dtypes(dense, architecture, dtype)
    size = sliced_size(architecture.hidden_size, sparsity)
    where = device_of(device, float64=True)
    said = {"sparsity": sparsity, "samples": samples, "seq_len": seq_len, "seed": seed, "untie": untie, "dtype": dtype}
    arguments = said | {"turned": random_orientation, "text": text_digest(calibration), "device": device}
    task = Task("slice", checkpoint.path, arguments, resume)
    with new_directory(out, task) as directory, parallel.executor() as executor:
        work = Work(executor, task.store(directory))
        if calibration is None:
            written = partial(
                self_generated_windows, checkpoint.path, samples + HELD_OUT, seq_len, seed, where, progress
            )
            windows = work.once("text", written)
        else:
            windows = token_windows(checkpoint.path, calibration, seq_len)
        tokens, held_out = drawn_windows(windows, samples, HELD_OUT, seed)
        runner = FoldedRunner(dense, config, architecture, where)
        orientation = seed if random_orientation else None
        slicing = Slice(dense, architecture, runner, work, tokens, held_out, size, orientation, progress)
        measured = _write_parts(directory, checkpoint, slicing, dtypes, progress)
        carry_over(checkpoint.path, directory, (file.name for file in checkpoint.weight_files))
        write_remote_code(directory, SLICED_IN, architecture.family.sliced_classes)
        perplexity = _judge(measured, sparsity, force)
        transform = {
            "transform": "slice",
            "fidelity": LOSSY,
            "sparsity": sparsity,
            "text": "its own" if calibration is None else "given",
            "samples": len(tokens),
            "seq_len": seq_len,
            "seed": seed,
            "random_orientation": random_orientation,
            "bytes": baselines,
            "producer": f"freebits {__version__}",
            "perplexity": perplexity,
        }
        dtype = dtypes[architecture.sublayers[0].shortcut.weight]
        layout, history = Layout.sliced(architecture, size), [*history_of(dense.config), transform]
        write_sliced_config(directory, checkpoint.config, architecture, layout, dtype, history)
        write_card(directory, checkpoint.path)
        return inspect(directory) | {"perplexity": perplexity}


def _write_parts(
    directory: Path, checkpoint: Checkpoint, slicing: Slice, dtypes: dict[str, torch.dtype], progress: Progress
) -> dict[str, float]:
    """Write the sliced tensors, part by part; what was measured on the way."""
    architecture, dense = slicing.architecture, slicing.source
    shapes = {name: spec.shape for name, spec in dense.specs.items()}
    announced = Layout.sliced(architecture, slicing.size).shapes(architecture, shapes)
    measured: dict[str, float] = {}
    moved = transform_parts(slicing, dense, architecture.parts, dtypes.__getitem__, slicing.work, slicing.runner.device)
    parts = map(_finished, moved)  # here: a move holds the model that ran
    with CheckpointWriter(directory, announced, shard_bytes(checkpoint)) as writer:
        for done, (tensors, facts) in enumerate(parts, start=1):
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            measured |= facts
            progress("slicing", "block", done, len(architecture.parts))
    return measured


def _finished(work: tuple[Part, Turn, Callable[[], dict[str, Tensor]]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A part's tensors, and what was measured by then."""
    _, turn, moved = work
    return moved(), dict(turn.facts)


def _checked_architecture(dense: Source, path: Path) -> Architecture:
    """What is in a dense checkpoint, once every tensor is what its config says."""
    architecture = Architecture.of(dense.config, len(dense.specs))
    shapes = {name: spec.shape for name, spec in dense.specs.items()}
    Layout().check(shapes, architecture)
    expected = dense_shapes(dict(dense.config), path)
    head, embedding = architecture.head.weight, architecture.embedding.weight
    for name in architecture.without_ignored(dense.specs):
        if shapes[name] != expected.get(name, expected[embedding] if name == head else None):
            raise CheckpointError(f"tensor {name} has shape {list(shapes[name])}, which config.json contradicts")
        if dense.specs[name].code not in FLOATS:
            raise CheckpointError(f"tensor {name} is {dense.specs[name].code}: slicing needs floating-point weights")
    for name in expected.keys() - dense.specs.keys() - {head}:
        raise CheckpointError(f"tensor {name} is missing: the checkpoint is incomplete")
    if architecture.tied and head in dense.specs and not torch.equal(dense[head], dense[embedding]):
        return architecture.with_tie(False)  # transformers, too, then takes the head that is there
    return architecture


def _dtypes(dense: Source, architecture: Architecture, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """What each tensor of the sliced model is rounded to."""
    if dtype is not None and str(dtype).removeprefix("torch.") not in (*DTYPES, "float64"):
        raise UsageError(f"dtype {dtype}: sliced weights are floats of 16 bits or more, {', '.join(DTYPES)}")
    dtypes = {name: dtype or spec.dtype for name, spec in dense.specs.items()}
    general = dtypes[architecture.embedding.weight]
    for part in architecture.parts:
        for sub in part.sublayers:  # a bias that folding makes is as precise as the matrix beside it
            reads = [read for read in sub.reads if read.weight in dtypes and read.bias not in dtypes]
            dtypes |= {read.bias: dtypes[read.weight] for read in reads}
    head = architecture.head
    dtypes.setdefault(head.weight, general)
    dtypes.setdefault(head.bias, dtypes[head.weight])
    return {name: dtypes.get(name, general) for name in architecture.weights}


def _judge(measured: dict[str, float], sparsity: float, force: bool) -> dict[str, float | None]:
    """Warn of a slice that costs much, and refuse one that ruins the model; the perplexities, None for no number.

    Raises:
        UsageError: perplexity grows more than `REFUSE` times, or is no number.
    """
    if not measured:
        return {"dense": None, "sliced": None}
    growth = measured["sliced"] / measured["dense"] if measured["dense"] else math.nan
    cost = (
        f"slicing by {sparsity} takes perplexity from {measured['dense']:.2f} to {measured['sliced']:.2f} on held-out "
        "windows of the calibration text"
    )
    if not growth <= REFUSE and not force and math.isfinite(measured["dense"]):
        raise UsageError(f"{cost}, which ruins the model: choose a smaller sparsity, or --force")
    if not growth <= WARN:
        _log.warning("freebits: %s: measure it on your own text with freebits eval", cost)
    return {name: value if math.isfinite(value) else None for name, value in measured.items()}


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
        directory: its folder.
        config: the dense model's.
        architecture: what is in the sliced one.
        layout: its widths.
        dtype: of its weights, most of them.
        history: the moves that made it.
    """
    family = architecture.family
    kept = {key: value for key, value in config.items() if key not in ("torch_dtype", WIDTHS)}
    sliced = {
        "model_type": family.sliced_model_type,
        "architectures": [family.sliced_causal_lm],
        "auto_map": auto_map(family.sliced_classes),
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": architecture.tied,
        **layout.to_config(),
        HISTORY: {"history": history},
    }
    write_json(directory / CONFIG, kept | sliced)
