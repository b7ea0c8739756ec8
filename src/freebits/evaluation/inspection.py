"""Describe what a checkpoint folder contains and how large it is."""

import os
from contextlib import suppress
from typing import Any

from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.evaluation.folder_sizes import bytes_on_disk, dense_bytes, groups, side_bytes
from freebits.models.architecture import Architecture
from freebits.packed.manifest import recorded_sizes
from freebits.packed.reader import PackedFolder, open_folder
from freebits.storage.checkpoint import Folder, is_adapter
from freebits.storage.hub import local_folder


def known_sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Return those sizes of `inspect(path)["bytes"]` that are not None."""
    return {key: n for key, n in inspect(path)["bytes"].items() if n is not None}


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a folder that contains a model (dense, sliced or packed) or an adapter.

    Args:
        path: folder of a checkpoint.

    Returns:
        `kind`: `dense`, `sliced`, `packed` or `adapter`. A low-rank model counts as `dense`, or as `sliced` if it is
        also sliced. `codec` and `entropy`: for a packed folder, the codec or the method of quantization, and the
        entropy stage; otherwise None. `bytes`: sizes in bytes on disk of weights, index, manifest and config; unknown
        sizes are None. `dense` is the size of the original model; `dense_untied` is this size with an untied head, as
        in arXiv 2410.01309; `sliced` is the size of the sliced model; `packed` is the size of the packed folder;
        `corrections` is the part of `packed` that corrects wrongly decoded values. `groups`: purpose, such as
        `embeddings` → bytes on disk; the sum is the size of the folder. `parameters`: number of weights of the loaded
        model. `history`: list of the steps that made the model, oldest first.

        `sites`: list with an entry for each rotation of the residual stream that a codec handled. Such an entry has
        `site`, the index of the site; `name`, a module at the site; and `code`, the code that encodes the rotation, or
        `reason`, why no code does. With `code`, `corrections` is the number of corrected values, if there are any.

        `base` exists only if the folder was packed with a base. `tensors` is the number of tensors of the base that the
        folder needs. `chain` lists the names of the base, of the base of the base, and so on.

    Raises:
        CheckpointError: the checkpoint is missing or damaged. Only headers are checked; `verify` also checks tensors.
    """
    folder = open_folder(local_folder(path))
    sizes: dict[str, int | None] = dict.fromkeys(("dense", "dense_untied", "sliced", "packed", "corrections"))
    facts: dict[str, Any] = {"kind": "dense", "codec": None, "entropy": None, "bytes": sizes, "sites": []}
    facts["groups"] = groups(folder)
    facts["history"] = folder.history
    specs = folder.specs
    if isinstance(folder, PackedFolder):
        manifest, specs = folder.manifest, folder.model_specs
        facts |= {"kind": "packed", "codec": manifest.codec, "entropy": manifest.entropy}
        facts["sites"] = manifest.notes
        if manifest.base:
            facts["base"] = {"tensors": len(manifest.base.tensors), "chain": _chain(folder)}
        before = recorded_sizes(manifest.history)
        sizes |= {key: before.get(key) for key in ("dense", "dense_untied", "sliced")}
        sizes |= {"packed": bytes_on_disk(folder), "corrections": side_bytes(folder, "corrections")}
    elif "site_sizes" in folder.config:
        before = recorded_sizes(facts["history"])
        sizes |= {key: before.get(key) for key in ("dense", "dense_untied")}
        sizes["sliced"] = bytes_on_disk(folder)
        facts["kind"] = "sliced"
    elif is_adapter(folder.config):
        facts["kind"] = "adapter"
        sizes["dense"] = bytes_on_disk(folder)
    else:
        try:
            sizes |= dense_bytes(folder, Architecture.of(folder.config, len(specs)))
        except (UnsupportedModelError, CheckpointError):  # not a known model: report only its size
            sizes["dense"] = bytes_on_disk(folder)
    facts["parameters"] = sum(spec.numel for spec in specs.values())
    return facts


def _chain(folder: PackedFolder) -> list[str]:
    """Return the name of a folder's base, of the base of the base, and so on, as far as the bases can be found."""
    names = []
    with suppress(CheckpointError):
        current: Folder = folder
        while isinstance(current, PackedFolder) and current.manifest.base is not None:
            names.append(current.manifest.base.model)
            current = current.base
    return names
