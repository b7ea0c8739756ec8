"""Pack checkpoints, and unpack them again."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from freebits.api.pipelines import for_each, is_pipeline
from freebits.api.shared_steps import finish
from freebits.errors import CheckpointError, one_line
from freebits.evaluation.inspection import inspect, known_sizes
from freebits.execution.executor import Parallel
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.models.architecture import Architecture
from freebits.models.free_bases import unproven_settings
from freebits.options import CANONICAL, NONE
from freebits.packed.encoded_piece import stage
from freebits.packed.manifest import is_packed
from freebits.packed.packing import pack_into
from freebits.packed.presets import Preset, chosen
from freebits.packed.reader import PackedFolder
from freebits.packed.unpacking import unpack_into
from freebits.storage.checkpoint import Checkpoint, is_adapter
from freebits.storage.gguf import gguf_folder, is_gguf
from freebits.storage.hub import local_folder
from freebits.storage.resumption import Task
from freebits.storage.signature import check_key
from freebits.storage.staging import new_directory

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
    """Pack a checkpoint without the bits that its rotations and the bases of its heads take, or bit for bit.

    Codecs `canonical` and `bits-back` preserve the function: the weights are those of a rotated model, rounded once to
    their dtypes. Codec `none` and the entropy stage are bit-exact. Codec `canonical` packs an adapter as codec `none`
    does, with a warning, unless its config proves that every layer adds the product of two matrices.

    Args:
        model: folder of a sliced or dense checkpoint, or of an adapter; `bits-back` requires a sliced one. A GGUF file
            or a pipeline of several models is packed bit for bit.
        out: folder to create; it appears complete or not at all.
        codec: `canonical` chooses rotations that need no storage and no decoding; `bits-back` is the paper's code;
            `none` keeps the files: `unpack` restores them byte for byte.
        entropy: `auto` entropy-codes the tensors that become smaller by it, bit for bit; `none` codes nothing.
        threshold: for `bits-back`, the largest error of a decoded 16-bit value that needs no correction, by default
            0.01. The paper uses 0.01 for OPT and 0.005 for Llama 2.
        device: where linear algebra runs, always in float64. Results of other devices may differ in the last bits.
        parallel: where the blocks are packed, and how many at once. Memory holds as many blocks, in float64.
        resume: use the blocks that a stopped run with the same arguments finished.
        sign_with: file of a private key (PEM), with which every file of the folder is signed; see `verify`.
        progress: called after each block, with codec `none` after each tensor.

    Returns:
        The result of `inspect(out)`.

    Raises:
        UsageError: the codec or device does not exist, or the codec has no threshold.
        CheckpointError: `model` is not a sound checkpoint, or the codec does not support it; or `out` exists.
    """
    check_key(sign_with)
    preset, entropy_code = chosen(codec, threshold, device_of(device, float64=True)), stage(entropy)
    model = local_folder(model)
    if is_gguf(model) or is_pipeline(model):
        return _pack_exact(model, out, entropy=entropy, parallel=parallel, progress=progress, sign_with=sign_with)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: unpack it first")
    source, sizes = Checkpoint(model), known_sizes(model)
    preset = _safe_preset(preset, source)
    arguments = {"codec": codec, "entropy": entropy, "threshold": threshold, "device": device}
    task = Task("pack", source.path, arguments, resume) if preset else None  # codec `none` is not worth resuming
    largest = _largest_part(source) if preset and not is_adapter(source.config) else 0
    with new_directory(out, task) as directory, parallel.executor(largest) as executor:
        work = Work(executor, task.store(directory) if task else None)
        pack_into(directory, source, preset, (entropy, entropy_code), sizes, work, progress)
        return finish(directory, source.path, sign_with, auto_class=_loader(source))


def _pack_exact(model: Path, out: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """Pack a GGUF file or each model of a pipeline, which only codec `none` supports."""
    if is_gguf(model):
        with gguf_folder(model) as folder:
            return pack(folder, out, codec=NONE, **options)
    _log.warning("freebits: %s is a pipeline: each of its models is packed with codec none, bit for bit", model)
    return for_each(model, out, partial(pack, codec=NONE, **options))


def _safe_preset(preset: Preset | None, source: Checkpoint) -> Preset | None:
    """The preset, or None (codec `none`) for an adapter whose function codec `canonical` could change."""
    if preset is None or preset.name != CANONICAL or not is_adapter(source.config):
        return preset
    unproven = unproven_settings(source.config)
    if unproven:
        settings = one_line(", ".join(unproven), 120)
        _log.warning(
            "freebits: the adapter is packed bit for bit: its update may not be a plain product (%s)", settings
        )
    return None if unproven else preset


def _loader(source: Checkpoint) -> str | None:
    """The Auto class that loads the packed model."""
    from freebits.integrations.packed_models import auto_class  # imports transformers, which takes seconds

    return auto_class(source.config)


def _largest_part(source: Checkpoint) -> int:
    """Size of a model's largest part, in bytes."""
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
    """Write the plain checkpoint that a packed one encodes, for `transformers` and any other tool.

    A sliced model has dense shortcuts, as in SliceGPT. Files packed with codec `none` are restored byte for byte.

    Args:
        packed: a packed folder.
        out: folder to create; it appears complete or not at all.
        parallel: where sites and tensors are decoded, and how many at once. Memory holds as many, in float64, and one
            embedding.
        progress: called after each site or plain tensor.

    Returns:
        The result of `inspect(out)`.

    Raises:
        CheckpointError: the folder is not packed or is damaged, or `out` exists.
    """
    path = local_folder(packed)
    if is_pipeline(path):
        return for_each(path, out, partial(unpack, parallel=parallel, progress=progress))
    source = PackedFolder(path)
    with new_directory(out) as directory:
        unpack_into(directory, source, parallel, progress)
        return inspect(directory)
