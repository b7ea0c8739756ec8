"""Pack a checkpoint: choose the codec, write the files, and last the manifest."""

import json
import os
from pathlib import Path
from typing import Any

from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint, CheckpointWriter, carry_over, new_directory
from freebits.errors import CheckpointError, UsageError
from freebits.packed.bitsback import THRESHOLD, BitsBack
from freebits.packed.canonical import Canonical
from freebits.packed.exact import pack_exactly
from freebits.packed.format import DTYPES, ENTROPIES, FORMAT, Manifest, SiteRecord, digest_of_file, is_packed
from freebits.packed.inspection import inspect
from freebits.packed.plan import Codec, Plan
from freebits.packed.shortcuts import RANKS, SlicedModel, shortcut_ranks
from freebits.progress import Progress, silent

CODECS = tuple(DTYPES)
DEFAULT = "canonical"


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    codec: str = DEFAULT,
    entropy: str = "auto",
    threshold: float | None = None,
    jobs: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Pack a checkpoint: a sliced one without the bits of its rotations, any other bit for bit.

    The codecs of sliced models are function-preserving: the weights are those of a rotated model, rounded once to their
    dtype. Codec `none` and the entropy stage are bit-exact.

    Args:
        model: folder of a sliced checkpoint; with codec `none` of any.
        out: folder to create; it appears complete or not at all.
        codec: `canonical` fixes the rotations, so that nothing is left to decode; `bits-back` is the paper's code;
            `none` keeps the files, which `unpack` gives back byte for byte.
        entropy: `auto` entropy-codes what gains by it, bit for bit; `none` leaves it.
        threshold: of bits-back, the largest error of a decoded word that is left without a correction, by default
            0.01. The paper uses 0.01 for OPT and 0.005 for Llama 2.
        jobs: blocks to work on at once, by default one a processor, at most four. Memory holds twice as many and one
            embedding.
        progress: called after each block, with codec `none` after each tensor.

    Returns:
        What `inspect(out)` says.

    Raises:
        UsageError: there is no such codec, the threshold is negative or not the codec's, or `jobs` is less than one.
        CheckpointError: the model is not a sound checkpoint, or not sliced, or not in a dtype that the codec knows; or
            `out` exists.
    """
    for kind, value, known in (("codec", codec, CODECS), ("entropy stage", entropy, ENTROPIES)):
        if value not in known:
            raise UsageError(f"there is no {kind} {value!r}: choose one of {', '.join(known)}")
    if threshold is not None and codec != "bits-back":
        raise UsageError(f"a threshold is of codec bits-back: {codec} has nothing to correct")
    chosen = BitsBack(THRESHOLD if threshold is None else threshold) if codec == "bits-back" else Canonical()
    source = Checkpoint(model)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: unpack it first")
    sizes = inspect(model)["bytes"]
    with new_directory(out) as directory:
        if codec == "none":
            contents = pack_exactly(source, directory, entropy == "auto", jobs, progress)
        else:
            contents = _pack_sites(source, directory, chosen, codec, entropy == "auto", jobs, progress)
        Manifest(
            codec=codec,
            entropy=entropy,
            bytes={key: sizes[key] for key in ("dense", "dense_untied", "sliced")},
            config=digest_of_file(directory / "config.json"),
            **contents,
        ).write(directory)
    return inspect(out)


def _pack_sites(
    source: Checkpoint,
    directory: Path,
    chosen: Codec,
    codec: str,
    entropy: bool,
    jobs: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write a sliced model with its sites encoded; returns what the manifest says of the contents."""
    plan = _plan(source, DTYPES[codec])
    sublayers = [sublayer for block in plan.architecture.blocks for sublayer in block]
    names = [*plan.sliced.shapes, *(name for sublayer in sublayers for name in chosen.part_names(sublayer))]
    carry_over(source.path, directory)
    digests: dict[str, str] = {}
    coded: dict[str, str] = {}
    sites: list[SiteRecord] = []
    with CheckpointWriter.like(source, directory, names) as writer:
        for records, tensors in plan.run(chosen, entropy, jobs, progress):
            sites += records
            for name, stored in tensors.items():
                writer.write(name, stored.tensor)
                digests[name] = stored.digest
                coded |= {name: str(stored.kind)} if stored.kind else {}
    config = {key: value for key, value in source.config.items() if key != RANKS}
    config |= shortcut_ranks(plan.architecture, sites) | {"packed": {"format": FORMAT, "codec": codec}}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    dtype = str(plan.dtype).removeprefix("torch.")
    return {"dtype": dtype, "threshold": chosen.threshold, "sites": sites, "tensors": digests, "coded": coded}


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
