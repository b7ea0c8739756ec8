"""Slice a dense model (SliceGPT, Ashkboos et al. 2024), one block in memory at a time.

Slicing is a rotation into principal axes that keeps the first `k` of them. Each block is calibrated on the
output of the part sliced before it: the dense sublayer runs on the stream projected onto the kept axes,
which is what the sliced sublayer computes, seen in the dense basis.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint
from freebits.errors import CheckpointError, UsageError
from freebits.slicing.axes import principal_axes
from freebits.symmetry import fold, fold_embeddings, fold_head, random_orthogonal, rotate

SIZE_STEP = 8


class Runner(Protocol):
    """What runs a dense model for the slicer: its embedding, and one block's sublayers at a time."""

    device: torch.device

    def embed(self, tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """The stream before the first block, (windows, T, D), for tokens (windows, T)."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a block's folded tensors."""

    def run(self, sublayer: int, x: Tensor) -> Tensor:
        """The stream after the loaded block's `sublayer`, for the stream before it; both (windows, T, D)."""


def sliced_size(hidden_size: int, sparsity: float) -> int:
    """`k`: the width left at a sliced site, `floor((1 - sparsity) D)` rounded down to a multiple of 8.

    Raises:
        UsageError: `sparsity` lies outside [0, 1), or leaves nothing.
    """
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {sparsity} lies outside [0, 1): 0.2 removes a fifth of the hidden size")
    exact = round((1 - sparsity) * hidden_size, 6)  # 0.2 * 320 is 64, not 63.99…
    size = math.floor(exact) // SIZE_STEP * SIZE_STEP if sparsity else hidden_size
    if size == 0:
        raise UsageError(f"sparsity {sparsity} leaves nothing of hidden size {hidden_size}: choose a smaller one")
    return size


def sliced_tensors(
    dense: Checkpoint,
    architecture: Architecture,
    runner: Runner,
    tokens: Tensor,
    size: int,
    *,
    dtype: torch.dtype,
    orientation: torch.Generator | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The sliced model's tensors: the embeddings, then each block's, then the head's.

    Args:
        dense: the model to slice.
        architecture: what is in it; `tied` if the sliced model is to keep the tie.
        runner: runs it.
        tokens: (windows, T), the calibration text.
        size: `k`, the width to keep; see `sliced_size`.
        dtype: what the tensors are rounded to, once, after float64 arithmetic.
        orientation: where given, the kept subspace of each site is turned at random within itself.

    Raises:
        CheckpointError: a rotated weight does not fit `dtype`.
    """
    sizes = architecture.site_sizes(size)

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        return {name: dense[name].to(runner.device) for name in names if name in dense.files}

    def rotated(tensors: dict[str, Tensor], rotations: dict[int, Tensor]) -> dict[str, Tensor]:
        rotated = {n: rotate(t, architecture.axes[n], rotations, dtype) for n, t in tensors.items()}
        for name, tensor in rotated.items():
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"tensor {name} does not fit {dtype} after slicing: choose a wider --dtype, unless the dense "
                    "model itself has weights that are not finite"
                )
        return rotated

    embeddings = read(architecture.embedding_axes)
    x = runner.embed(fold_embeddings(embeddings, replace(architecture, tied=False)), tokens)
    rotations = {0: _rotation(x, sizes[0], orientation)}
    yield rotated(fold_embeddings(embeddings, architecture), rotations)
    del embeddings
    for block in architecture.blocks:
        folded = fold(read(n for sub in block for n in (*sub.axes, *architecture.norm_tensors(sub.norm))), block)
        runner.load(folded)
        for index, sublayer in enumerate(block):
            kept = rotations[sublayer.site - 1].to(x.dtype)
            x = runner.run(index, x @ kept @ kept.T)
            rotations[sublayer.site] = _rotation(x, sizes[sublayer.site], orientation)
        yield rotated(folded, rotations)
        rotations = {block[-1].site: rotations[block[-1].site]}
    final_norm = architecture.norm_tensors(architecture.family.final_norm)
    source = architecture.head if architecture.head in dense.files else architecture.embedding
    tail = read(final_norm if architecture.tied else (*final_norm, source))
    yield rotated(fold_head(tail, architecture), rotations)


def _rotation(x: Tensor, size: int, orientation: torch.Generator | None) -> Tensor:
    """What a site's tensors are multiplied by, (D, size). An unsliced site has nothing to choose: it stays."""
    D = x.shape[-1]
    if size == D:
        return torch.eye(D, dtype=torch.float64, device=x.device)
    kept = principal_axes(x.flatten(0, 1), size)
    return kept if orientation is None else kept @ random_orthogonal(size, orientation).to(kept.device)
