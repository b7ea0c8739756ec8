"""Pack a checkpoint: choose the codec, write the files, and last the manifest."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from freebits.checkpoint import Checkpoint, new_directory
from freebits.errors import CheckpointError, UsageError
from freebits.packed.exact import pack_exactly
from freebits.packed.format import DTYPES, ENTROPIES, Manifest, digest_of_file, is_packed
from freebits.packed.inspection import inspect
from freebits.packed.sites import THRESHOLD, BitsBack, Canonical, pack_sites
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
    write = _writer(codec, threshold)
    source = Checkpoint(model)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: unpack it first")
    sizes = inspect(model)["bytes"]
    with new_directory(out) as directory:
        contents = write(source, directory, entropy == "auto", jobs, progress)
        Manifest(
            codec=codec,
            entropy=entropy,
            bytes={key: sizes[key] for key in ("dense", "dense_untied", "sliced")},
            config=digest_of_file(directory / "config.json"),
            **contents,
        ).write(directory)
    return inspect(out)


def _writer(codec: str, threshold: float | None) -> Callable[..., dict[str, Any]]:
    """What writes a checkpoint's files with a codec, and returns what the manifest says of them."""
    if threshold is not None and codec != "bits-back":
        raise UsageError(f"a threshold is of codec bits-back: {codec} has nothing to correct")
    if codec == "none":
        return pack_exactly
    chosen = BitsBack(THRESHOLD if threshold is None else threshold) if codec == "bits-back" else Canonical()
    return partial(pack_sites, chosen)
