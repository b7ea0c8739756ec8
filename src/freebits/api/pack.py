"""The functions `pack` and `unpack`: check the arguments, write a folder, describe it."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from freebits.api.pipelines import for_each, is_pipeline
from freebits.errors import CheckpointError, one_line
from freebits.evaluation.card import write_card
from freebits.evaluation.inspection import inspect, known_sizes
from freebits.execution.executor import Parallel
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.models.pairs import unproven_settings
from freebits.models.table import Architecture
from freebits.options import CANONICAL, NONE
from freebits.packed.manifest import is_packed
from freebits.packed.packing import pack_into
from freebits.packed.piece import stage
from freebits.packed.presets import Preset, chosen
from freebits.packed.reader import PackedFolder
from freebits.packed.unpacking import unpack_into
from freebits.storage.folder import Checkpoint, is_adapter
from freebits.storage.gguf import gguf_folder, is_gguf
from freebits.storage.hub import located
from freebits.storage.signature import check_key, sign
from freebits.storage.staging import new_directory
from freebits.storage.task import Task

_log = logging.getLogger(__name__)


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    codec: str = CANONICAL,
    entropy: str = "auto",
    threshold: float | None = None,
    device: str = "cpu",
    parallel: Parallel = Parallel(),
    resume: bool = True,
    sign_with: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Pack a checkpoint without the bits of its rotations and of the bases of its heads, or bit for bit.

    The other codecs are function-preserving: the weights are those of a rotated model, rounded once to their
    dtypes. Codec `none` and the entropy stage are bit-exact. Codec `canonical` packs an adapter as codec `none` does,
    with a warning, unless its config proves that every layer adds the product of two matrices.

    Args:
        model: folder of a checkpoint, sliced or dense, or of an adapter; bits-back takes sliced ones alone. A GGUF file
            or a pipeline of several models is kept bit for bit.
        out: folder to create; it appears complete or not at all.
        codec: `canonical` fixes the rotations, so that nothing is left to decode; `bits-back` is the paper's code;
            `none` keeps the files, which `unpack` gives back byte for byte.
        entropy: `auto` entropy-codes what gains by it, bit for bit; `none` leaves it.
        threshold: of bits-back, the largest error of a decoded word that is left without a correction, by default
            0.01. The paper uses 0.01 for OPT and 0.005 for Llama 2.
        device: where linear algebra runs, in float64 there, too; the result is as close to the model, to its last bits.
        parallel: where the blocks are packed, and how many at once. Memory holds as many, in float64.
        resume: if a run with the same arguments was stopped, use the blocks that it finished.
        sign_with: file of a private key (PEM), with which every file of the folder is signed; see `verify`.
        progress: called after each block, with codec `none` after each tensor.

    Returns:
        What `inspect(out)` returns.

    Raises:
        UsageError: there is no such codec or device, or the threshold is not the codec's.
        CheckpointError: the model is no sound checkpoint, not sliced, or in no dtype of the codec's; or `out` exists.
    """
    check_key(sign_with)
    preset, code = chosen(codec, threshold, device_of(device, float64=True)), stage(entropy)
    model = located(model)
    if is_gguf(model) or is_pipeline(model):
        return _pack_exact(model, out, entropy=entropy, parallel=parallel, progress=progress, sign_with=sign_with)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: unpack it first")
    source, sizes = Checkpoint(model), known_sizes(model)
    preset = _proven(preset, source)
    told = {"codec": codec, "entropy": entropy, "threshold": threshold, "device": device}
    task = Task("pack", source.path, told, resume) if preset else None  # codec `none` is not worth resuming
    piece = _largest_part(source) if preset and not is_adapter(source.config) else 0
    with new_directory(out, task) as directory, parallel.executor(piece) as executor:
        work = Work(executor, task.store(directory) if task else None)
        pack_into(directory, source, preset, (entropy, code), sizes, work, progress)
        write_card(directory, source.path, auto_class=_loader(source))
        if sign_with is not None:
            sign(directory, sign_with)
        return inspect(directory)


def _pack_exact(model: Path, out: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """What no other codec takes, bit for bit: a GGUF file, or each model of a pipeline."""
    if is_gguf(model):
        with gguf_folder(model) as folder:
            return pack(folder, out, codec=NONE, **options)
    _log.warning("freebits: a pipeline: each of its models is packed with codec none, bit for bit")
    return for_each(model, out, partial(pack, codec=NONE, **options))


def _proven(preset: Preset | None, source: Checkpoint) -> Preset | None:
    """The preset, or None for an adapter that codec `canonical` could change."""
    if preset is None or preset.name != CANONICAL or not is_adapter(source.config):
        return preset
    unproven = unproven_settings(source.config)
    if unproven:
        settings = one_line(", ".join(unproven), 120)
        _log.warning("freebits: the adapter is kept bit for bit: its update may be no plain product (%s)", settings)
    return None if unproven else preset


def _loader(source: Checkpoint) -> str | None:
    """The Auto class that loads the packed model; transformers takes seconds to import."""
    from freebits.integrations.packed_models import auto_class

    return auto_class(source.config)


def _largest_part(source: Checkpoint) -> int:
    """Bytes of the part of a model that has most."""
    specs = source.specs
    parts = Architecture.of(source.config, len(specs)).parts
    return max(sum(specs[name].n_bytes for name in part.weights if name in specs) for part in parts)


def unpack(
    packed: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    parallel: Parallel = Parallel(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the plain checkpoint that a packed one holds, for `transformers` and any other tool.

    A sliced model comes back as SliceGPT's, with dense shortcuts; files packed with codec `none` byte for byte.

    Args:
        packed: a packed folder.
        out: folder to create; it appears complete or not at all.
        parallel: where sites and tensors are decoded, and how many at once. Memory holds as many, in float64, and one
            embedding.
        progress: called after each site or plain tensor.

    Returns:
        What `inspect(out)` returns.

    Raises:
        CheckpointError: the folder is not packed or is damaged, or `out` exists.
    """
    path = located(packed)
    if is_pipeline(path):
        return for_each(path, out, partial(unpack, parallel=parallel, progress=progress))
    source = PackedFolder(path)
    with new_directory(out) as directory:
        unpack_into(directory, source, parallel, progress)
        return inspect(directory)
