"""Unpack a packed folder to a plain checkpoint."""

from pathlib import Path
from typing import Any

from freebits.execution.executor import Parallel
from freebits.execution.progress import Progress
from freebits.models.architecture import Architecture
from freebits.models.families import MODEL_TYPES, SLICED_PREFIX, transformers_type
from freebits.packed.reader import PackedFolder
from freebits.storage.auxiliary_files import (
    auto_map,
    copy_auxiliary_files,
    restore_card,
    write_config,
    write_remote_code,
)
from freebits.storage.checkpoint import ADAPTER, CONFIG, GGUF, HISTORY, is_adapter, stem_of
from freebits.storage.safetensors_files import LENGTH
from freebits.storage.writer import CheckpointWriter
from freebits.transforms.dense_shortcuts import DenseShortcutView
from freebits.types import bytes_of

SLICED_IN = "freebits.models.sliced"
LOW_RANK_IN = "freebits.models.low_rank"
"""`SLICED_IN`: module with the classes of sliced models. `LOW_RANK_IN`: module with those of low-rank models."""


def unpack_into(directory: Path, packed: PackedFolder, parallel: Parallel, progress: Progress) -> None:
    """Write a plain checkpoint into a new folder.

    If the folder was packed with the codec `none`, the original files are restored byte for byte. Otherwise, shortcuts
    that are stored as factors become whole matrices.

    Raises:
        CheckpointError: a tensor is damaged.
    """
    copy_auxiliary_files(
        packed.path, directory, (file.name for file in packed.weight_files), exact=packed.manifest.exact
    )
    restore_card(directory)
    if packed.manifest.exact:
        _write_files(directory, packed, parallel, progress)
    elif str(packed.config.get("model_type", "")).startswith(SLICED_PREFIX):
        _write_sliced(directory, packed, parallel, progress)
    elif is_adapter(packed.config):  # no history, because PEFT rejects unknown keys
        config = {key: value for key, value in packed.config.items() if key != HISTORY}
        _write_tensors(directory, packed, packed, config, parallel, progress)
    else:
        config = {**packed.config, HISTORY: {"history": packed.manifest.history}}
        _write_tensors(directory, packed, packed, config, parallel, progress)
    family = MODEL_TYPES.get(transformers_type(packed.config))
    if family and packed.config["model_type"] == family.sliced_model_type:
        write_remote_code(directory, SLICED_IN, family.sliced_classes)
    elif family and packed.config["model_type"] == family.low_rank_model_type:
        write_remote_code(directory, LOW_RANK_IN, family.low_rank_classes)


def _write_sliced(directory: Path, packed: PackedFolder, parallel: Parallel, progress: Progress) -> None:
    architecture = Architecture.of(packed.config, len(packed.specs))
    model = DenseShortcutView(packed, architecture)
    additions = {
        "auto_map": auto_map(architecture.family.sliced_classes),
        HISTORY: {"history": packed.manifest.history},
    }
    _write_tensors(directory, packed, model, {**model.config, **additions}, parallel, progress)


def _write_tensors(
    directory: Path,
    packed: PackedFolder,
    model: DenseShortcutView | PackedFolder,
    config: dict[str, Any],
    parallel: Parallel,
    progress: Progress,
) -> None:
    write_config(directory / (ADAPTER if is_adapter(config) else CONFIG), config)
    total = len(packed.groups(packed.specs))
    announced = {name: spec.shape for name, spec in model.specs.items()}
    with CheckpointWriter(directory, announced, packed.shard_bytes, stem_of(config)) as writer:
        for done, tensors in enumerate(packed.decoded(packed.specs, parallel), start=1):
            for name, tensor in tensors.items():
                if isinstance(model, DenseShortcutView):
                    writer.write(model.name(name), model.expand(name, tensor))
                else:
                    writer.write(name, tensor)
            progress("unpacking", "group of tensors", done, total)


def _write_files(directory: Path, packed: PackedFolder, parallel: Parallel, progress: Progress) -> None:
    for file, text in packed.manifest.originals.items():
        if file not in packed.originals:
            (directory / file).write_bytes(text.encode())
    total, done = len(packed.specs), 0
    for file, entries in packed.originals.items():
        header = packed.manifest.originals[file].encode()
        with (directory / file).open("wb") as target:
            # only safetensors files need a header here, because the header of a GGUF file is among its tensors
            if not file.endswith(f".{GGUF}"):
                target.write(len(header).to_bytes(LENGTH, "little") + header)
            for tensors in packed.decoded(entries, parallel):
                for tensor in tensors.values():
                    target.write(bytes_of(tensor).data)
                progress("unpacking", "tensor", done := done + 1, total)
