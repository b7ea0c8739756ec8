"""Make layers of a checkpoint narrow, one after another, each fed by those that are narrow already."""

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from freebits.api.low_rank_statistics import PAPERS_BLOCKS, Layers, ranks_of, reduce_layers
from freebits.calibration.self_generated import self_generated_windows
from freebits.calibration.streamed import window_logits
from freebits.calibration.tokens import drawn_windows, token_windows
from freebits.errors import CheckpointError, UsageError
from freebits.evaluation.card import write_card
from freebits.evaluation.inspection import inspect, known_sizes
from freebits.execution.executor import Parallel
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.models.families import LOW_RANKS, SLICED_PREFIX, Family
from freebits.options import ALLOCATIONS, LOSSY, PAPER, SLOPE
from freebits.packed.manifest import is_packed
from freebits.packed.packing import HISTORY, history_of
from freebits.packed.unpacking import LOW_RANK_IN, SLICED_IN
from freebits.storage.auxiliary_files import auto_map, carry_over, write_remote_code
from freebits.storage.folder import CONFIG, Checkpoint, write_json
from freebits.storage.hub import located
from freebits.storage.signature import check_key, sign
from freebits.storage.staging import new_directory
from freebits.storage.task import Task, text_digest
from freebits.storage.writer import CheckpointWriter, shard_bytes
from freebits.transforms.slicing import perplexity
from freebits.version import __version__

HELD_OUT = 4
"""Windows on which the cost is measured."""


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
    """Put two thin layers in the place of linear ones (reduced-order modelling): lossy. One block is in memory.

    Args:
        model: folder of a dense or sliced checkpoint.
        out: folder to create; it appears complete or not at all.
        budget: part of the numbers of the matrices in all blocks that is left, in canonical form, in (0, 1); by default
            0.8. Of 0.9, 0.8 and 0.5 `allocate` may be `paper`.
        target_size: instead, bytes of the weights that are written, at most.
        blocks: `all`, or `last:N`.
        allocate: `slope` cuts all layers where the last direction kept is worth the same for each number it takes, and
            leaves whole what is not worth it; `uniform` leaves the same part of each matrix; `paper` does as the paper:
            the same part of each matrix in the last blocks, without counting on the canonical form.
        calibration: text; by default the model writes its own.
        samples: windows of calibration text.
        seq_len: tokens a window.
        seed: of everything that is drawn.
        device: where to run the model.
        parallel: who does what can be done apart from running the model.
        resume: go on with what a stopped run of the same arguments left, block by block.
        sign_with: file of a private key (PEM), with which every file of the folder is signed; see `verify`.
        progress: called after each block.

    Returns:
        What `inspect(out)` says, and `perplexity` {`dense`, `reduced`} on
        other windows of the calibration text, None where it has no other.

    Raises:
        UsageError: an argument makes no sense.
        CheckpointError: `model` is no sound checkpoint, or `out` exists.
        UnsupportedModelError: the architecture table does not know the model.
    """
    check_key(sign_with)
    if budget is not None and target_size is not None:
        raise UsageError("--budget and --target-size are each a target: give one")
    budget = 0.8 if budget is None else budget
    if not 0 < budget < 1:
        raise UsageError(f"--budget {budget}: give a part of the numbers, such as 0.8")
    if allocate not in ALLOCATIONS or (allocate == PAPER and budget not in PAPERS_BLOCKS):
        raise UsageError(f"--allocate {allocate} with a budget of {budget}: see freebits lowrank --help")
    model = located(model)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed: reduce the model it was made from, or unpack it first")
    checkpoint = Checkpoint(model)
    layers = Layers.of(checkpoint, model, device_of(device), blocks)
    said = {"budget": budget, "size": target_size, "blocks": blocks, "allocate": allocate, "samples": samples}
    said |= {"seq_len": seq_len, "seed": seed, "device": device, "text": text_digest(calibration)}
    task = Task("lowrank", checkpoint.path, said, resume)
    with new_directory(out, task) as directory, parallel.executor() as executor:
        work = Work(executor, task.store(directory))
        if calibration is None:
            where = device_of(device)
            written = partial(
                self_generated_windows, checkpoint.path, samples + HELD_OUT, seq_len, seed, where, progress
            )
            windows = work.once("text", written)
        else:
            windows = token_windows(checkpoint.path, calibration, seq_len)
        tokens, held_out = drawn_windows(windows, samples, HELD_OUT, seed)
        ranks = ranks_of(layers, tokens, work, (budget, target_size, allocate), seed, progress)
        reduce_layers(layers, ranks, tokens, work, progress)
        ranks = _write(directory, checkpoint, layers, ranks, work)
        transform = {
            "transform": "lowrank",
            "fidelity": LOSSY,
            "budget": budget,
            "allocate": allocate,
            "blocks": blocks,
            "text": "its own" if calibration is None else "given",
            "samples": len(tokens),
            "seq_len": seq_len,
            "seed": seed,
            "bytes": known_sizes(checkpoint.path),
            "producer": f"freebits {__version__}",
        }
        _write_config(directory, checkpoint, layers.architecture.family, ranks, transform)
        cost = _cost(checkpoint.path, directory, held_out)
        write_card(directory, checkpoint.path)
        if sign_with is not None:
            sign(directory, sign_with)
        return inspect(directory) | {"perplexity": cost}


def _write(
    directory: Path, checkpoint: Checkpoint, layers: Layers, ranks: Mapping[str, int], work: Work
) -> dict[str, int]:
    """The weights; the ranks of layers that have low rank now."""
    source, specs, reduced = layers.source, layers.source.specs, dict[str, int]()
    announced = {f"{name}.down.up": (*spec.shape, *spec.shape) for name, spec in specs.items()} | {
        f"{name}.up.down": spec.shape for name, spec in specs.items()
    }
    found = {name: work.result(f"factors-{name}") for name in ranks if work.has(f"factors-{name}")}
    with CheckpointWriter(directory, announced, shard_bytes(checkpoint)) as writer:
        for name in specs:
            layer, _, what = name.rpartition(".")
            if f"{layer}.weight" not in found:
                writer.write(name, source[name])
            elif what == "weight":
                down, up = found[name]
                writer.write(f"{layer}.down.weight", down)
                writer.write(f"{layer}.up.weight", up)
                reduced[layer] = len(down)
            else:
                writer.write(f"{layer}.up.{what}", source[name])
    return reduced


def _write_config(
    directory: Path, checkpoint: Checkpoint, family: Family, ranks: Mapping[str, int], transform: Mapping[str, Any]
) -> None:
    config = checkpoint.config
    sliced = str(config["model_type"]).startswith(SLICED_PREFIX)
    classes = family.sliced_classes if sliced else family.low_rank_classes
    ours = {
        "model_type": family.sliced_model_type if sliced else family.low_rank_model_type,
        "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": auto_map(classes),
        LOW_RANKS: dict(ranks),
        HISTORY: {"history": [*history_of(config), transform]},
    }
    write_json(directory / CONFIG, config | ours)
    carry_over(checkpoint.path, directory, (file.name for file in checkpoint.weight_files))
    write_remote_code(directory, SLICED_IN if sliced else LOW_RANK_IN, classes)


def _cost(before: Path, after: Path, held_out: Tensor) -> dict[str, float | None]:
    """Perplexities on windows that were not calibrated on."""
    if not len(held_out):
        return {"dense": None, "reduced": None}
    found: dict[str, float | None] = {}
    for name, path in (("dense", before), ("reduced", after)):
        losses = [
            cross_entropy(logits, window[1:]).item()
            for logits, window in zip(window_logits(path, held_out), held_out, strict=True)
        ]
        value = perplexity(losses)
        found[name] = value if math.isfinite(value) else None
    return found
