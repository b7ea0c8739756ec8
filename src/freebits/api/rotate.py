"""Rotate a dense checkpoint into an equivalent one with fewer of the outliers that make quantization inaccurate."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from freebits.api.shared_steps import finish
from freebits.codecs.hadamard import hadamard
from freebits.errors import UnsupportedModelError, UsageError
from freebits.evaluation.folder_sizes import dense_bytes
from freebits.execution.progress import Progress, silent
from freebits.integrations.naming import TransformersView, config_object
from freebits.models.architecture import Architecture, Part
from freebits.models.families import dense_family
from freebits.models.free_bases import find_pairs
from freebits.models.layout import Layout
from freebits.options import FUNCTION_PRESERVING
from freebits.storage.auxiliary_files import copy_auxiliary_files, write_config
from freebits.storage.checkpoint import CONFIG, HISTORY, Checkpoint, Source, history_step
from freebits.storage.hub import local_folder
from freebits.storage.staging import new_directory
from freebits.storage.writer import CheckpointWriter
from freebits.transforms.folding import fold_embeddings, fold_head, fold_sublayers
from freebits.transforms.orthogonal import rotate
from freebits.transforms.pivoting import act


def rotate_model(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, seed: int = 0, progress: Progress = silent
) -> dict[str, Any]:
    """Rotate the residual stream and the values of each attention head. This preserves the function, up to rounding.

    Norms are folded into the matrices that read their outputs. Then one randomized Hadamard matrix rotates the stream,
    and another rotates the values of each head (QuaRot, sections 3.1 and 4, without its online transforms). Weights are
    rounded once, at the end. The result is an ordinary checkpoint for any quantizer. A tied head becomes a separate
    matrix, because the final norm is folded into the head.

    Args:
        model: folder of a dense checkpoint.
        out: folder to create; if the function fails, no such folder is left.
        seed: seed of both rotations, from 0 to 2^63 - 1.
        progress: callback, called after each part: the embeddings, each block, and the head.

    Returns:
        The result of `inspect(out)`.

    Raises:
        UsageError: the seed is out of range.
        CheckpointError: `model` is not a sound checkpoint, or `out` already exists.
        UnsupportedModelError: this model cannot be rotated, for example because its norms subtract a mean; the message
            says why.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"`seed` is {seed}: give an integer from 0 to 2^63 - 1")
    checkpoint = Checkpoint(local_folder(model))
    if dense_family(checkpoint.config).centred:
        raise UnsupportedModelError(
            f"the norms of {checkpoint.path} subtract a mean, which rotations do not preserve: slice the model instead"
        )
    dense = TransformersView(checkpoint, config_object(checkpoint, model))
    architecture = Architecture.of(dense.config, len(dense.specs))
    baselines = dense_bytes(checkpoint, architecture)
    untied = architecture.with_tie(False)
    default_dtype = dense.specs[architecture.embedding.weight].dtype
    shapes = {name: spec.shape for name, spec in dense.specs.items()}
    Layout().check(shapes, architecture)
    shapes |= {untied.head.weight: shapes[untied.embedding.weight]}
    with new_directory(out) as directory:
        copy_auxiliary_files(checkpoint.path, directory, (file.name for file in checkpoint.weight_files))
        with CheckpointWriter(directory, shapes, checkpoint.shard_bytes) as writer:
            for done, part in enumerate(untied.parts, start=1):
                for name, tensor in _rotated_part(dense, untied, part, seed).items():
                    writer.write(name, tensor.to(dense.specs[name].dtype if name in dense.specs else default_dtype))
                progress("rotating", "block", done, len(untied.parts))
        step = history_step("rotate", FUNCTION_PRESERVING, baselines, seed=seed)
        history = {"history": [*checkpoint.history, step]}
        write_config(directory / CONFIG, {**dense.config, "tie_word_embeddings": False, HISTORY: history})
        return finish(directory, checkpoint.path)


def _rotated_part(dense: Source, architecture: Architecture, part: Part, seed: int) -> dict[str, Tensor]:
    """Return the rotated tensors of a part (embeddings, block or head), float64. The stream's norms get scale 1."""
    tensors = {name: dense[name] for name in part.weights if name in dense.specs}
    norms = [norm.weight for sub in part.sublayers for norm in sub.norms]
    if part.sublayers:
        folded = _rotate_heads(
            fold_sublayers(tensors, replace(architecture, branch_scale=1.0), part.sublayers), architecture, part, seed
        )
    elif part is architecture.parts[0]:
        folded = fold_embeddings(tensors, architecture)
    else:
        norms = [architecture.final_norm.weight]
        tensors.setdefault(architecture.head.weight, dense[architecture.embedding.weight])
        folded = fold_head(tensors, architecture)
    Q = hadamard(torch.eye(architecture.hidden_size, dtype=torch.float64), seed)
    rotations = dict.fromkeys(range(architecture.n_sites), Q)
    shortcuts = {sub.shortcut.weight for sub in part.sublayers}
    rotated = {
        name: rotate(tensor, part.weights[name].axes, rotations)
        for name, tensor in folded.items()
        if name not in shortcuts
    }
    return rotated | {name: torch.ones(architecture.hidden_size, dtype=torch.float64) for name in norms}


def _rotate_heads(folded: Mapping[str, Tensor], architecture: Architecture, part: Part, seed: int) -> dict[str, Tensor]:
    """Rotate the values of each head, and rotate the inputs of the output matrix back."""
    rotated = dict(folded)
    shapes = {name: tuple(tensor.shape) for name, tensor in folded.items()}
    written = {write.weight for sub in part.sublayers for branch in sub.branches for write in branch.writes}
    for pair in find_pairs(architecture, part, shapes, dense=False):
        if written.issuperset(span.name for span in pair.reads):  # skips pairs of queries and keys
            Q = hadamard(torch.eye(pair.size, dtype=torch.float64), seed)
            rotated |= act(rotated, pair, Q.expand(pair.n_spaces, -1, -1))
    return rotated
