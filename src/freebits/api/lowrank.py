"""Replace linear layers of a checkpoint by low-rank layers."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from freebits.api.lowrank_layers import PAPER_SETTINGS, Layers, choose_ranks, reduce_layers
from freebits.api.shared_steps import calibration_windows, finish
from freebits.calibration.streamed import window_logits
from freebits.errors import CheckpointError, UsageError
from freebits.evaluation.inspection import known_sizes
from freebits.execution.executor import Parallel
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.models.families import LOW_RANKS, SLICED_PREFIX, Family
from freebits.options import ALLOCATIONS, LOSSY, PAPER, SLOPE
from freebits.packed.manifest import is_packed
from freebits.packed.unpacking import LOW_RANK_IN, SLICED_IN
from freebits.storage.auxiliary_files import auto_map, copy_auxiliary_files, write_remote_code
from freebits.storage.checkpoint import CONFIG, HISTORY, Checkpoint, history_step, write_json
from freebits.storage.hub import local_folder
from freebits.storage.resumption import Task, text_digest
from freebits.storage.signature import check_key
from freebits.storage.staging import new_directory
from freebits.storage.writer import CheckpointWriter
from freebits.transforms.slicing import perplexity


def lowrank(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    budget: float | None = None,
    target_size: int | None = None,
    blocks: str = "all",
    allocate: str = SLOPE,
    calibration: str | None = None,
    samples: int = 64,
    seq_len: int = 256,
    seed: int = 0,
    device: str = "cpu",
    parallel: Parallel = Parallel(jobs=1),
    resume: bool = True,
    sign_with: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Replace linear layers by low-rank layers (reduced-order modeling). This is lossy.

    Memory holds a few blocks in float32 and the activations of the calibration text; then it holds the matrices of all
    low-rank layers. It holds the whole model while the model generates calibration text, or if the model takes at most
    1 GiB in float32.

    Args:
        model: folder of a dense or sliced checkpoint.
        out: folder to create; if the function fails, no such folder is left.
        budget: fraction of the weights in the blocks' matrices to keep, in (0, 1); by default 0.8. For a low-rank
            layer, only the weights that `pack` stores are counted.
        target_size: largest size of the written weights in bytes; replaces `budget`.
        blocks: blocks to reduce, `all` or `last:N` for the last N blocks.
        allocate: method that chooses the ranks. `slope` keeps each direction of a layer's outputs that reduces the
            expected loss by at least a certain amount per weight, the same amount for all layers; a layer that would
            get its full rank stays unchanged. `uniform` keeps the same fraction of each matrix. `paper` works as in
            arXiv 2312.07046: it keeps the same fraction of each matrix in the last blocks, leaves the other blocks
            unchanged, and counts all weights of both factors. It requires a `budget` of 0.9, 0.8 or 0.5.
        calibration: text to calibrate on; by default the model generates the text.
        samples: number of windows of calibration text; fewer if the text is too short.
        seq_len: tokens per window.
        seed: seed for all random choices.
        device: device on which to run the model.
        parallel: options for parallel execution of all work except running the model.
        resume: whether to use the finished work of a stopped run with the same arguments.
        sign_with: file with a private key (PEM), which signs every file of the folder; see `verify`.
        progress: callback, called after each generated token, then after each block.

    Returns:
        The entries of `inspect(out)`, and `perplexity` {`dense`, `reduced`}: the perplexities of `model` and of the
        low-rank model on windows of the calibration text that are not used for calibration. A perplexity is None if
        there are no such windows, or if the perplexity is not finite.

    Raises:
        UsageError: an argument is invalid, or the weights cannot be as small as `target_size`.
        CheckpointError: `model` is not a sound checkpoint, or `out` already exists.
        UnsupportedModelError: the type of the model is unknown, or the model already has low-rank layers.
    """
    check_key(sign_with)
    if budget is not None and target_size is not None:
        raise UsageError("`budget` and `target_size` cannot be combined: give only one")
    budget = 0.8 if budget is None else budget
    if not 0 < budget < 1:
        raise UsageError(f"`budget` is {budget}: give a fraction of the weights between 0 and 1, such as 0.8")
    if allocate not in ALLOCATIONS:
        raise UsageError(f"`allocate` is {allocate!r}: choose {' or '.join(ALLOCATIONS)}")
    if allocate == PAPER and budget not in PAPER_SETTINGS:
        budgets = " or ".join(map(str, PAPER_SETTINGS))
        raise UsageError(f"`allocate` is {PAPER!r}, but `budget` is {budget}: give a budget of {budgets}")
    model = local_folder(model)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed: unpack it first")
    checkpoint = Checkpoint(model)
    torch_device = device_of(device)
    layers = Layers.of(checkpoint, model, torch_device, blocks)
    arguments = {"budget": budget, "size": target_size, "blocks": blocks, "allocate": allocate, "samples": samples}
    arguments |= {"seq_len": seq_len, "seed": seed, "device": device, "text": text_digest(calibration)}
    task = Task("lowrank", checkpoint.path, arguments, resume)
    with new_directory(out, task) as directory, parallel.executor() as executor:
        work = Work(executor, task.store(directory))
        tokens, held_out = calibration_windows(
            checkpoint.path, calibration, samples, seq_len, seed, torch_device, work, progress
        )
        ranks = choose_ranks(layers, tokens, work, (budget, target_size, allocate), seed, progress)
        reduce_layers(layers, ranks, tokens, work, progress)
        ranks = _write(directory, checkpoint, layers, ranks, work)
        facts: dict[str, Any] = {
            "text": "its own" if calibration is None else "given",
            "samples": len(tokens),
            "seq_len": seq_len,
        }
        facts |= {"budget": budget, "allocate": allocate, "blocks": blocks, "seed": seed}
        step = history_step("lowrank", LOSSY, known_sizes(checkpoint.path), **facts)
        _write_config(directory, checkpoint, layers.architecture.family, ranks, step)
        perplexities = _perplexities(checkpoint.path, directory, held_out)
        return finish(directory, checkpoint.path, sign_with) | {"perplexity": perplexities}


def _write(
    directory: Path, checkpoint: Checkpoint, layers: Layers, ranks: Mapping[str, int], work: Work
) -> dict[str, int]:
    """Write the weights, and return name of a low-rank layer → its rank."""
    source, specs, written_ranks = layers.source, layers.source.specs, dict[str, int]()
    shapes = {f"{name}.down.up": (*spec.shape, *spec.shape) for name, spec in specs.items()} | {
        f"{name}.up.down": spec.shape for name, spec in specs.items()
    }
    factors = {name: work.result(f"factors-{name}") for name in ranks if work.has(f"factors-{name}")}
    with CheckpointWriter(directory, shapes, checkpoint.shard_bytes) as writer:
        for name in specs:
            layer, _, parameter = name.rpartition(".")
            if f"{layer}.weight" not in factors:
                writer.write(name, source[name])
            elif parameter == "weight":
                down, up = factors[name]
                writer.write(f"{layer}.down.weight", down)
                writer.write(f"{layer}.up.weight", up)
                written_ranks[layer] = len(down)
            else:
                writer.write(f"{layer}.up.{parameter}", source[name])
    return written_ranks


def _write_config(
    directory: Path, checkpoint: Checkpoint, family: Family, ranks: Mapping[str, int], step: Mapping[str, Any]
) -> None:
    config = checkpoint.config
    sliced = str(config["model_type"]).startswith(SLICED_PREFIX)
    classes = family.sliced_classes if sliced else family.low_rank_classes
    changes = {
        "model_type": family.sliced_model_type if sliced else family.low_rank_model_type,
        "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": auto_map(classes),
        LOW_RANKS: dict(ranks),
        HISTORY: {"history": [*checkpoint.history, step]},
    }
    write_json(directory / CONFIG, config | changes)
    copy_auxiliary_files(checkpoint.path, directory, (file.name for file in checkpoint.weight_files))
    write_remote_code(directory, SLICED_IN if sliced else LOW_RANK_IN, classes)


def _perplexities(before: Path, after: Path, held_out: Tensor) -> dict[str, float | None]:
    """Measure the perplexities of both models on held-out windows. A perplexity that is not finite becomes None."""
    if not len(held_out):
        return {"dense": None, "reduced": None}
    perplexities: dict[str, float | None] = {}
    for name, path in (("dense", before), ("reduced", after)):
        losses = [
            cross_entropy(logits, window[1:]).item()
            for logits, window in zip(window_logits(path, held_out), held_out, strict=True)
        ]
        value = perplexity(losses)
        perplexities[name] = value if math.isfinite(value) else None
    return perplexities
