"""Slice a dense model (SliceGPT, Ashkboos et al. 2024), one block in memory at a time.

Slicing is a rotation into principal axes that keeps the first `k` of them. Each block is calibrated on the
output of the part sliced before it: the dense sublayer runs on the stream projected onto the kept axes,
which is what the sliced sublayer computes, seen in the dense basis.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from freebits.architecture import Architecture, Layout, Part
from freebits.calibration import Runner, perplexity, principal_axes
from freebits.checkpoint import Source
from freebits.errors import CheckpointError, UsageError
from freebits.moves.move import Dtypes, Turn
from freebits.symmetry import fold_embeddings, fold_head, fold_sublayers, random_orthogonal

SIZE_STEP = 8


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


@dataclass(frozen=True)
class Stream:
    """How far calibration has come.

    Attributes:
        x: the sliced model's stream at the site reached, calibration windows and then held-out ones.
        dense: the dense model's, held-out windows alone.
        rotation: what the site is multiplied by, (D, width).
    """

    x: Tensor
    dense: Tensor
    rotation: Tensor


@dataclass(frozen=True)
class Slice:
    """The move, of a dense model.

    Attributes:
        source: the model.
        architecture: what is in it; `tied` if the sliced model is to keep the tie.
        runner: runs it.
        tokens: (windows, T), the calibration text.
        held_out: (windows, T), text on which to measure what slicing costs.
        size: `k`, the width to keep; see `sliced_size`.
        seed: where given, the kept subspace of each site is turned at random within itself.
    """

    source: Source
    architecture: Architecture
    runner: Runner
    tokens: Tensor
    held_out: Tensor
    size: int
    seed: int | None = None

    def begin(self) -> Stream:
        """The embedded text, and the rotation of site 0."""
        untied = self.architecture.with_tie(False)
        embedded = fold_embeddings(self._read(self.architecture.parts[0]), untied)
        x = self.runner.embed(embedded, torch.cat([self.tokens, self.held_out]))
        return self._stream(0, x, x[len(self.tokens) :])

    def look(self, part: Part) -> None:
        """Nothing: what a part needs depends on the parts before it."""

    def step(self, state: Stream, part: Part, seen: None, following: None) -> tuple[Stream, Turn]:  # noqa: ARG002
        """Fold a part, run the text through it, and find the axes of its sites."""
        folded = self._folded(part)
        rotations = {self._site_before(part): state.rotation}
        if part.sublayers:
            self.runner.load((part.sublayers[0].site - 1) // len(self.architecture.family.sublayers), folded)
        for index, sub in enumerate(part.sublayers):
            kept = state.rotation.to(state.x.dtype)
            x, dense = torch.empty_like(state.x), torch.empty_like(state.dense)
            for window, after in zip(state.x.split(1), x.split(1), strict=True):
                after.copy_(self.runner.run(index, (window @ kept) @ kept.T))
            for window, after in zip(state.dense.split(1), dense.split(1), strict=True):
                after.copy_(self.runner.run(index, window))
            state = self._stream(sub.site, x, dense)
            rotations[sub.site] = state.rotation
        gone: dict[str, Tensor | None] = dict.fromkeys(part.weights.keys() - folded.keys())
        facts = self._cost(state, part) if part is self.architecture.parts[-1] else {}
        return state, Turn(rotations, gone | folded, facts=facts)

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:  # noqa: ARG002
        """Whether everything fits.

        Raises:
            CheckpointError: a rotated weight does not fit its dtype.
        """
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"tensor {name} does not fit {tensor.dtype} after slicing: choose a wider --dtype, unless the "
                    "dense model itself has weights that are not finite"
                )

    def _folded(self, part: Part) -> dict[str, Tensor]:
        tensors = self._read(part)
        if part is self.architecture.parts[0]:
            return fold_embeddings(tensors, self.architecture)
        if part.sublayers:
            return fold_sublayers(tensors, self.architecture, part.sublayers)
        head, embedding = self.architecture.head.weight, self.architecture.embedding.weight
        if not self.architecture.tied and head not in tensors:
            tensors[embedding] = self.source[embedding].to(self.runner.device)
        return fold_head(tensors, self.architecture)

    def _read(self, part: Part) -> dict[str, Tensor]:
        return {n: self.source[n].to(self.runner.device) for n in part.weights if n in self.source.kinds}

    def _site_before(self, part: Part) -> int:
        if part.sublayers:
            return part.sublayers[0].site - 1
        return 0 if part is self.architecture.parts[0] else self.architecture.n_sites - 1

    def _cost(self, state: Stream, part: Part) -> dict[str, float]:
        """Perplexity of the dense and of the sliced model on the held-out windows."""
        if not len(self.held_out):
            return {}
        tensors = self._read(part) | self._read(self.architecture.parts[0])
        streams = {"dense": state.dense, "sliced": state.x[len(self.tokens) :]}
        return {name: perplexity(self.runner.losses(tensors, x, self.held_out)) for name, x in streams.items()}

    def _stream(self, site: int, x: Tensor, dense: Tensor) -> Stream:
        """The stream with the rotation of its site. An unsliced site has nothing to choose: it stays."""
        D = x.shape[-1]
        width = (Layout.sliced(self.architecture, self.size).widths or ())[site]
        if width == D:
            return Stream(x, dense, torch.eye(D, dtype=torch.float64, device=x.device))
        kept = principal_axes(x[: len(self.tokens)].flatten(0, 1), width)
        if self.seed is not None:
            turn = random_orthogonal(width, torch.Generator().manual_seed(self.seed * self.architecture.n_sites + site))
            kept = kept @ turn.to(kept.device)
        return Stream(x, dense, kept)
