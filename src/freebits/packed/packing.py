"""Write a packed folder. The tensors come first, then the auxiliary files, and the manifest comes last."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from freebits.execution.progress import Progress
from freebits.execution.work_store import Work
from freebits.options import BIT_EXACT, FUNCTION_PRESERVING, NONE
from freebits.packed.contents import STEM, Contents
from freebits.packed.manifest import FORMAT, Manifest, digest_of_file
from freebits.packed.open_base import OpenBase
from freebits.packed.pack_files import pack_files
from freebits.packed.pack_parts import pack_parts
from freebits.packed.presets import Preset
from freebits.packed.reader import MODEL
from freebits.packed.recipe import check_recipes
from freebits.storage.auxiliary_files import auto_map, copy_auxiliary_files, write_remote_code
from freebits.storage.checkpoint import CONFIG, HISTORY, Checkpoint, Folder, history_step, write_json
from freebits.transforms.dense_shortcuts import DenseShortcutView

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
    base: OpenBase | None = None,
) -> None:
    """Write the packed form of a checkpoint into a new folder.

    Args:
        directory: an existing, empty folder.
        source: the checkpoint to pack.
        preset: preset of the codec; None for the codec `none`, which stores the files unchanged.
        stage: value of the option `entropy`, and the code for it (see `encoded_piece.stage`).
        sizes: sizes of the source in bytes, to be recorded in the history.
        work: executor of the encoding, and store of its results.
        progress: function called after each part; with the codec `none`, after each tensor.
        base: base of the model, for the codec `none` only; None for no base.

    Raises:
        CheckpointError: the source is damaged, or the codec does not encode the model.
        UnsupportedModelError: see `family_of`.
    """
    entropy, code = stage
    model: Mapping[str, Any] = source.config
    if preset is None:
        contents = pack_files(source, directory, code, base, work, progress)
    else:
        contents, layout = pack_parts(source, directory, preset, code, work, progress)
        model = {**DenseShortcutView.plain_config(source.config), **layout.to_config()}
    codec, fidelity = (preset.name, FUNCTION_PRESERVING) if preset else (NONE, BIT_EXACT)
    step = history_step(codec, fidelity, sizes, **(preset.facts if preset else {}))
    publish(directory, source, contents, model, (codec, entropy), [*source.history, step], base)


def publish(
    directory: Path,
    source: Folder,
    contents: Contents,
    model: Mapping[str, Any],
    packed_with: tuple[str, str],
    history: list[dict[str, Any]],
    base: OpenBase | None = None,
) -> None:
    """Complete a packed folder with the auxiliary files, `config.json` and the manifest.

    Args:
        directory: the folder, which already has the weights files.
        source: the checkpoint that was packed.
        contents: data about the written tensors.
        model: config of the packed model.
        packed_with: names of the codec and of the entropy stage.
        history: steps that made the model, oldest first.
        base: base of the model; None if there is none.
    """
    base_specs = {name: tensor.spec for name, tensor in contents.base.items()}
    check_recipes(
        contents.stored, contents.recipes, base_specs
    )  # raises an error if readers could not follow the recipes
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
        base=replace(base.base, tensors=contents.base) if base and contents.base else None,
    ).write(directory)


def _config(codec: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the packed folder's `config.json`, with the model type that freebits registers in transformers."""
    common = {key: model[key] for key in ("architectures", "dtype") if key in model}
    summary = {"format": FORMAT, "codec": codec}
    config = {"model_type": MODEL_TYPE, **common, "auto_map": auto_map(CLASSES), HISTORY: summary}
    return config if codec == NONE else config | {MODEL: dict(model)}
