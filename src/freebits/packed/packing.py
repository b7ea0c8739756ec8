"""Write a packed folder: first the tensors, then the auxiliary files, last the manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freebits.execution.progress import Progress
from freebits.execution.work_store import Work
from freebits.options import BIT_EXACT, FUNCTION_PRESERVING, NONE
from freebits.packed.contents import STEM, Contents
from freebits.packed.manifest import FORMAT, Manifest, digest_of_file
from freebits.packed.pack_files import pack_files
from freebits.packed.pack_parts import pack_parts
from freebits.packed.presets import Preset
from freebits.packed.reader import MODEL, PackedFolder
from freebits.packed.recipe import check_recipes
from freebits.storage.auxiliary_files import auto_map, copy_auxiliary_files, write_remote_code
from freebits.storage.folder import CONFIG, Checkpoint, write_json
from freebits.transforms.expanded import DenseShortcutView
from freebits.version import __version__

HISTORY = "freebits"
"""Key of the history in `config.json`."""
MODEL_TYPE = "freebits"
CLASSES = {
    "AutoConfig": "PackedConfig",
    "AutoModel": "PackedModel",
    "AutoModelForCausalLM": "PackedForCausalLM",
}
CLASSES_MODULE = "freebits.integrations.packed_models"


def pack_into(
    directory: Path,
    source: Checkpoint,
    preset: Preset | None,
    stage: tuple[str, str | None],
    sizes: Mapping[str, int],
    work: Work,
    progress: Progress,
) -> None:
    """Write the packed form of a checkpoint into a new folder.

    Args:
        directory: an existing, empty folder.
        source: the checkpoint to pack.
        preset: the codec; None stores the files unchanged.
        stage: name and code of the entropy stage.
        sizes: sizes of the source in bytes, for the history.
        work: runs the pieces.
        progress: called after each part; without a preset, after each tensor.

    Raises:
        CheckpointError: the source is damaged, or the codec does not encode it.
    """
    entropy, code = stage
    model: Mapping[str, Any] = source.config
    if preset is None:
        contents = pack_files(source, directory, code, work, progress)
    else:
        contents, layout = pack_parts(source, directory, preset, code, work, progress)
        model = {**DenseShortcutView.plain_config(source.config), **layout.to_config()}
    transform = {
        "transform": preset.name if preset else NONE,
        "fidelity": FUNCTION_PRESERVING if preset else BIT_EXACT,
        **(preset.facts if preset else {}),
        "bytes": dict(sizes),
        "producer": f"freebits {__version__}",
    }
    history = [*history_of(source.config), transform]
    publish(directory, source, contents, model, (transform["transform"], entropy), history)


def publish(
    directory: Path,
    source: Checkpoint | PackedFolder,
    contents: Contents,
    model: Mapping[str, Any],
    packed_with: tuple[str, str],
    history: list[dict[str, Any]],
) -> None:
    """Complete a packed folder: write the auxiliary files, `config.json` and the manifest.

    Args:
        directory: the folder, which already has the weights files.
        source: the checkpoint that was packed.
        contents: what packing wrote.
        model: the `config.json` of the packed model.
        packed_with: names of the codec and of the entropy stage.
        history: the transforms that made the model.
    """
    check_recipes(contents.stored, contents.recipes)  # raises an error if no reader could follow the recipes
    codec, entropy = packed_with
    handled = {*contents.originals, *(file.name for file in source.weight_files)}
    copy_auxiliary_files(source.path, directory, handled, exact=bool(contents.originals))
    write_json(directory / CONFIG, _config(codec, {**model, HISTORY: {"history": history}}))
    write_remote_code(directory, CLASSES_MODULE, CLASSES)
    Manifest(
        codec=codec,
        entropy=entropy,
        history=history,
        notes=sorted(contents.notes, key=lambda note: int(note["site"])),
        recipes=contents.recipes,
        digests=contents.digests,
        files=sorted(file.name for file in directory.glob(f"{STEM}*.safetensors")),
        config=digest_of_file(directory / CONFIG),
        originals=contents.originals,
        auxiliary=contents.auxiliary,
    ).write(directory)


def history_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The transforms that made a model, from its `config.json`; invalid entries are skipped."""
    entry = config.get(HISTORY)
    history = entry.get("history") if isinstance(entry, dict) else None
    return [transform for transform in history if isinstance(transform, dict)] if isinstance(history, list) else []


def _config(codec: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The packed folder's `config.json`, with the model type that freebits registers in transformers."""
    common = {key: model[key] for key in ("architectures", "dtype") if key in model}
    summary = {"format": FORMAT, "codec": codec}
    config = {"model_type": MODEL_TYPE, **common, "auto_map": auto_map(CLASSES), HISTORY: summary}
    return config if codec == NONE else config | {MODEL: dict(model)}
