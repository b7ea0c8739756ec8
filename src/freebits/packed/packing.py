"""Pack a sliced checkpoint, one block in memory at a time."""

import json
import os
from typing import Any

from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint, CheckpointWriter, carry_over, new_directory
from freebits.errors import CheckpointError, UsageError
from freebits.packed.bitsback import BitsBack
from freebits.packed.canonical import Canonical
from freebits.packed.format import DTYPES, FORMAT, Manifest, SiteRecord, digest, digest_of_file, is_packed
from freebits.packed.inspection import inspect
from freebits.packed.plan import Codec, Plan
from freebits.packed.shortcuts import RANKS, SlicedModel, shortcut_ranks
from freebits.packed.size import bytes_on_disk, recorded_baselines
from freebits.progress import Progress, silent

CODECS = tuple(DTYPES)
DEFAULT = "canonical"


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    codec: str = DEFAULT,
    threshold: float | None = None,
    jobs: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Pack a sliced checkpoint: keep its function, take the bits of its rotations back.

    Function-preserving: the weights are those of a rotated model, rounded once to their dtype.

    Args:
        model: folder of a sliced checkpoint.
        out: folder to create; it appears complete or not at all.
        codec: `canonical` fixes the rotations, so that nothing is left to decode; `bits-back` is the paper's code.
        threshold: of bits-back, the largest error of a decoded word that is left without a correction, by default
            0.01. The paper uses 0.01 for OPT and 0.005 for Llama 2.
        jobs: blocks to work on at once, by default one a processor, at most four. Memory holds as many and one
            embedding.
        progress: called after each block.

    Returns:
        What `inspect(out)` says.

    Raises:
        UsageError: there is no such codec, the threshold is negative or not the codec's, or `jobs` is less than one.
        CheckpointError: the model is not a sound sliced checkpoint in a dtype that the codec knows, or `out` exists.
    """
    chosen = _codec(codec, threshold)
    sliced = Checkpoint(model)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: unpack it first")
    plan = _plan(sliced, DTYPES[codec])
    sublayers = [sublayer for block in plan.architecture.blocks for sublayer in block]
    names = [*plan.sliced.shapes, *(name for sublayer in sublayers for name in chosen.part_names(sublayer))]
    with new_directory(out) as directory:
        carry_over(sliced.path, directory)
        digests: dict[str, str] = {}
        sites: list[SiteRecord] = []
        with CheckpointWriter.like(sliced, directory, names) as writer:
            for records, tensors in plan.run(chosen, jobs, progress):
                sites += records
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                    digests[name] = digest(tensor)
        config = {key: value for key, value in sliced.config.items() if key != RANKS}
        config |= shortcut_ranks(plan.architecture, sites) | {"packed": {"format": FORMAT, "codec": codec}}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        Manifest(
            codec=codec,
            entropy="none",
            threshold=chosen.threshold,
            dtype=plan.dtype_name,
            bytes=recorded_baselines(sliced.config) | {"sliced": bytes_on_disk(sliced.path)},
            sites=sites,
            tensors=digests,
            config=digest_of_file(directory / "config.json"),
        ).write(directory)
    return inspect(out)


def _codec(name: str, threshold: float | None) -> Codec:
    if name not in CODECS:
        raise UsageError(f"there is no codec {name!r}: choose one of {', '.join(CODECS)}")
    if name == "bits-back":
        return BitsBack() if threshold is None else BitsBack(threshold)
    if threshold is not None:
        raise UsageError(f"a threshold is of codec bits-back: {name} has nothing to correct")
    return Canonical()


def _plan(sliced: Checkpoint, dtypes: tuple[str, ...]) -> Plan:
    architecture = Architecture.of(sliced.config)
    if sliced.config["model_type"] != architecture.family.sliced_model_type:
        raise CheckpointError(f"{sliced.path} is a dense model, whose shortcuts leave no rotation free: slice it first")
    model = SlicedModel(sliced, architecture)
    names = [str(dtype).removeprefix("torch.") for dtype in model.dtypes]
    if len(names) != 1 or names[0] not in dtypes:
        raise CheckpointError(
            f"{sliced.path}: weights are {' and '.join(sorted(names))}; this codec needs them all in one dtype of "
            f"{', '.join(dtypes)}: slice with --dtype"
        )
    return Plan.of(model, architecture, model.dtypes.pop())
