"""Pack and unpack checkpoints."""

import logging
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from freebits.api.pipelines import for_each, is_pipeline
from freebits.api.shared_steps import finish
from freebits.errors import CheckpointError, UsageError, one_line
from freebits.evaluation.inspection import inspect, known_sizes
from freebits.execution.executor import Parallel
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.limits import BASES
from freebits.models.architecture import Architecture
from freebits.models.free_bases import unproven_settings
from freebits.options import CANONICAL, NONE
from freebits.packed.encoded_piece import stage
from freebits.packed.manifest import is_packed
from freebits.packed.open_base import OpenBase
from freebits.packed.packing import pack_into
from freebits.packed.presets import Preset, chosen
from freebits.packed.reader import PackedFolder
from freebits.packed.unpacking import unpack_into
from freebits.storage.checkpoint import Checkpoint, is_adapter
from freebits.storage.gguf import gguf_folder, is_gguf
from freebits.storage.hub import local_folder
from freebits.storage.remote import url_of
from freebits.storage.resumption import Task, file_states
from freebits.storage.signature import check_key
from freebits.storage.staging import new_directory

FIRST, PREVIOUS = "first", "previous"
"""Values of `base` for `pack_series`."""
_log = logging.getLogger(__name__)


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    codec: str = CANONICAL,
    base: str | os.PathLike[str] | None = None,
    entropy: str = "auto",
    threshold: float | None = None,
    device: str = "cpu",
    parallel: Parallel = Parallel(),
    resume: bool = True,
    sign_with: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Pack a checkpoint. Either omit bits that do not affect the function of the model, or keep every bit.

    The function of a sliced model does not change if its residual stream is rotated. The function of any model does not
    change if the basis inside an attention head changes. The codec `canonical` uses both to store fewer bits;
    `bits-back` uses only rotations. Both codecs round each weight once to its dtype. The codec `none` and the entropy
    stage are bit-exact. If the config of an adapter proves that each layer adds only a product of two matrices,
    `canonical` changes bases in the adapter, too. It packs any other adapter bit for bit, with a warning.

    Args:
        model: folder of a sliced or dense checkpoint, or of an adapter; `bits-back` requires a sliced one. A GGUF file
            or a pipeline of several models is packed bit for bit.
        out: folder to create; if the function fails, no such folder is left.
        codec: `canonical` chooses rotations and bases that make weights redundant, and stores only the other weights.
            `bits-back` is the code of arXiv 2410.01309. With `none`, `unpack` restores the files byte for byte.
        base: folder or hub id of the model from which `model` was trained. Only the differences from its tensors are
            stored, bit for bit, and loading needs the base. This implies the codec `none`. The base can itself be
            packed with a base. The value `none` packs without a base, even if `model` was packed with a base.
        entropy: `auto` entropy-codes, without loss, the tensors that become smaller. `none` entropy-codes no tensor.
        threshold: the codec `bits-back` corrects each 16-bit value whose error after decoding would exceed this; by
            default 0.01. arXiv 2410.01309 uses 0.01 for OPT and 0.005 for Llama 2.
        device: device for linear algebra, which always uses float64. Devices can differ in the last bits of results.
        parallel: where blocks are packed, and how many at once. Memory holds two blocks per job in float64, and one
            embedding.
        resume: whether to use the finished work of a stopped run with the same arguments. With the codec `none` and
            without a base, there is no such work, so packing starts again.
        sign_with: file with a private key (PEM), which signs every file of the folder; see `verify`. For a
            pipeline, it signs the folder of each model, but not the other files.
        progress: callback, called after each block, or after each tensor with the codec `none`.

    Returns:
        The result of `inspect(out)`; for a pipeline, `kind`, which is `pipeline`, and `components`: name of a model →
        result of `inspect`.

    Raises:
        UsageError: an argument is invalid, or arguments contradict each other.
        CheckpointError: `model` or `base` is not a sound checkpoint, the codec does not support `model`, or `out`
            already exists.
        UnsupportedModelError: freebits does not know the architecture, which all codecs but `none` need.
    """
    check_key(sign_with)
    if base is not None:
        if codec not in (CANONICAL, NONE):
            raise UsageError(f"codec {codec} takes no base: leave out `codec` or `base`")
        codec, base = NONE, None if base == NONE else base
        if base is None and is_packed(folder := local_folder(model)):
            return _pack_whole(folder, out, entropy=entropy, parallel=parallel, progress=progress, sign_with=sign_with)
    preset, entropy_code = chosen(codec, threshold, device_of(device, float64=True)), stage(entropy)
    model = local_folder(model)
    if is_gguf(model) or is_pipeline(model):
        if base is not None:
            raise UsageError(f"{model} is a GGUF file or a pipeline, which takes no base: leave out `base`")
        return _pack_exact(model, out, entropy=entropy, parallel=parallel, progress=progress, sign_with=sign_with)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: unpack it first")
    opened_base = None if base is None else OpenBase.open(base, Path(out))
    source, sizes = Checkpoint(model), known_sizes(model)
    preset = _safe_preset(preset, source)
    arguments: dict[str, Any] = {"codec": codec, "entropy": entropy, "threshold": threshold, "device": device}
    arguments["base"] = opened_base and [str(base), file_states(opened_base.folder.path)]
    # with codec `none` and no base, storing finished pieces would take nearly as long as packing
    task = Task("pack", source.path, arguments, resume) if preset or opened_base else None
    largest = _largest_part(source) if preset and not is_adapter(source.config) else 0
    with new_directory(out, task) as directory, parallel.executor(largest) as executor:
        work = Work(executor, task.store(directory) if task else None)
        pack_into(directory, source, preset, (entropy, entropy_code), sizes, work, progress, opened_base)
        return finish(directory, source.path, sign_with, auto_class=_loader(source))


def _pack_whole(model: Path, out: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """Pack a packed folder again, without a base."""
    parent = None if url_of(out) else Path(out).absolute().parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".") as scratch:
        unpack(model, Path(scratch) / model.name)
        return pack(Path(scratch) / model.name, out, codec=NONE, **options)


def pack_series(
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] = FIRST,
    **options: Any,
) -> dict[str, Any]:
    """Pack related models, such as the checkpoints of a training run, into one folder.

    If `out` already contains a packed model of the same name, a model is skipped with a warning. So a stopped run can
    be continued, and later checkpoints can be added.

    Args:
        models: folders or hub ids, with different names.
        out: folder that gets a packed folder for each model.
        base: `first`: the first model is the base of all others. `previous`: each model is the base of the next one,
            for at most 8 models. Any other value is the base of all models, as in `pack`.
        options: other arguments of `pack`.

    Returns:
        `kind`, which is `series`, and `models`: name of a model → result of `inspect` for its packed folder.

    Raises:
        UsageError: two models have the same name, there are too many models for `previous`, or see `pack`.
        CheckpointError: see `pack`.
        UnsupportedModelError: see `pack`.
    """
    names = [Path(model).name for model in models]
    if len({*names}) < len(names):
        raise UsageError("two models have the same name: rename a folder")
    if base == PREVIOUS and len(models) > BASES:
        raise UsageError(f"`base` is {PREVIOUS}, but there are more than {BASES} models: use {FIRST}")
    results: dict[str, Any] = {}
    for number, (model, name) in enumerate(zip(models, names, strict=True)):
        target, chosen_base = Path(out) / name, base
        if base in (FIRST, PREVIOUS):
            chosen_base = NONE if number == 0 else Path(out) / names[0 if base == FIRST else number - 1]
        if is_packed(target):
            _log.warning("freebits: %s is packed already, and is kept as it is", target)
        else:
            pack(model, target, base=chosen_base, **options)
        results[name] = inspect(target)
    return {"kind": "series", "models": results}


def _pack_exact(model: Path, out: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """Pack a GGUF file or each model of a pipeline bit for bit, because only the codec `none` supports these."""
    if is_gguf(model):
        with gguf_folder(model) as folder:
            return pack(folder, out, codec=NONE, **options)
    _log.warning("freebits: %s is a pipeline, so each of its models is packed bit for bit, with codec none", model)
    return for_each(model, out, partial(pack, codec=NONE, **options))


def _safe_preset(preset: Preset | None, source: Checkpoint) -> Preset | None:
    """Return the preset, or None (for the codec `none`) if the preset could change the output of an adapter."""
    if preset is None or preset.name != CANONICAL or not is_adapter(source.config):
        return preset
    unproven = unproven_settings(source.config)
    if unproven:
        settings = one_line(", ".join(unproven), 120)
        _log.warning(
            "freebits: the adapter is packed bit for bit, because its update may not be a product of two matrices (%s)",
            settings,
        )
    return None if unproven else preset


def _loader(source: Checkpoint) -> str | None:
    """Return the name of the Auto class that loads the packed model, or None if there is none."""
    from freebits.integrations.packed_models import auto_class  # here, because importing transformers takes seconds

    return auto_class(source.config)


def _largest_part(source: Checkpoint) -> int:
    """Return the size in bytes of the largest part of a model: the embeddings, a block, or the head."""
    specs = source.specs
    parts = Architecture.of(source.config, len(specs)).parts
    return max(sum(specs[name].n_bytes for name in part.weights if name in specs) for part in parts)


def unpack(
    packed: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    parallel: Parallel = Parallel(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the plain checkpoint that a packed folder encodes, for `transformers` and any other tool.

    A sliced model gets whole matrices on its skip connections, as in SliceGPT. With the codec `none`, the config and
    the weights files are restored byte for byte.

    Args:
        packed: a packed folder, or a pipeline of packed folders.
        out: folder to create; if the function fails, no such folder is left.
        base: folder or hub id of the model's base, if the base has moved since the folder was packed.
        parallel: where tensors are decoded, and how many groups of tensors at once. The tensors of a group are decoded
            together, from the same stored tensors. Memory holds one group per job in float64, and one embedding.
        progress: callback, called after each group.

    Returns:
        The result of `inspect(out)`; for a pipeline, a dict in the same form as from `pack`.

    Raises:
        CheckpointError: the folder is not packed, is damaged or lacks its base, or `out` already exists.
    """
    path = local_folder(packed)
    if is_pipeline(path):
        return for_each(path, out, partial(unpack, parallel=parallel, progress=progress))
    source = PackedFolder(path, base=base)
    with new_directory(out) as directory:
        unpack_into(directory, source, parallel, progress)
        return inspect(directory)
