"""Slice a dense model (SliceGPT, Ashkboos et al. 2024) with one block in memory at a time.

At each site (see `freebits.models.architecture`), slicing rotates the residual stream into its principal axes and
keeps the first `k` of them. Only the last site and, in some families, others keep the full width (`Layout.sliced`).
Each block is calibrated on the output of the sliced blocks before it. For this, each dense sublayer receives the stream
projected onto these `k` axes. The dense sublayer then computes what the sliced sublayer would compute, but in the dense
basis.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from freebits.errors import CheckpointError, UsageError
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.models.architecture import Architecture, Part
from freebits.models.layout import Layout
from freebits.storage.checkpoint import Source
from freebits.transforms.folding import fold_embeddings, fold_head, fold_sublayers
from freebits.transforms.orthogonal import random_orthogonal
from freebits.transforms.transform import Dtypes, PartChange

AtSite = Callable[[int, Tensor], Tensor]
"""Function that takes a site and the stream there, and returns the stream with which the model continues.

Both streams are (windows, T, D), float32.
"""


class Runner(Protocol):
    """An object that runs a dense model whose norms are folded.

    Attributes:
        device: device on which the model runs.
    """

    device: torch.device

    def losses(self, tokens: Tensor, at_site: AtSite, n_measured: int) -> list[float]:
        """Run windows of tokens through the model. All windows reach a site before any window continues past it.

        Args:
            tokens: (windows, T), int64.
            at_site: function that observes the stream at each site, in order, and may replace it.
            n_measured: number of windows at the end of `tokens` whose losses are returned.

        Returns:
            For each of these windows, the mean negative log-likelihood, in nats per token, of all tokens but the first.
        """


def perplexity(losses: Sequence[float]) -> float:
    """Return the perplexity over windows of equal length from their mean losses in nats per token.

    If a loss is NaN, the result is NaN.
    """
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if not mean >= math.log(sys.float_info.max) else math.inf


_CHUNK = 4096
"""Number of tokens that are converted to float64 at a time."""


def covariance(x: Tensor) -> Tensor:
    """Return `xᵀ x`, (D, D), float64. `x`, (tokens, D), is the input of a norm and has any float dtype."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for chunk in x.split(_CHUNK):
        total.addmm_(chunk.double().T, chunk.double())
    return total


def principal_axes(total: Tensor, size: int) -> Tensor:
    """Return the `size` directions in which a signal has the most energy, strongest first.

    SliceGPT adds 1 % of the mean variance to the diagonal of the covariance. This changes no eigenvector and is omitted
    here.

    Args:
        total: (D, D), covariance of the signal.
        size: number of axes to keep.

    Returns:
        (D, size), float64, orthonormal columns.
    """
    return torch.linalg.eigh(total).eigenvectors.flip(-1)[:, :size]


SIZE_STEP = 8
"""Sliced widths are multiples of this number, unless `sparsity` is 0."""


def sliced_size(hidden_size: int, sparsity: float) -> int:
    """Return `k`, the width of a sliced site: `(1 - sparsity) D`, rounded down to a multiple of 8.

    If `sparsity` is 0, `k` is `D`, even if `D` is not a multiple of 8.

    Raises:
        UsageError: `sparsity` is outside [0, 1), or `k` would be 0.
    """
    if not 0 <= sparsity < 1:
        raise UsageError(
            f"`sparsity` is {sparsity}: give at least 0 and less than 1, such as 0.2 to remove a fifth of the width"
        )
    exact = round((1 - sparsity) * hidden_size, 6)  # because (1 - 0.8) * 320 is 63.99…
    size = math.floor(exact) // SIZE_STEP * SIZE_STEP if sparsity else hidden_size
    if size == 0:
        raise UsageError(
            f"`sparsity` is {sparsity}, which removes the whole hidden size of {hidden_size}: give a smaller number"
        )
    return size


@dataclass(frozen=True)
class Slice:
    """The transform of a dense model to a sliced one.

    Attributes:
        source: the dense model.
        architecture: architecture of the model. Its `tied` says whether the head stays tied in the sliced model.
        runner: object that runs the dense model.
        work: store for the axes of each site and the perplexities.
        tokens: (windows, T), the calibration text.
        held_out: (windows, T), the text on which the loss of quality is measured.
        size: `k`, the width to keep; see `sliced_size`.
        seed: seed of the random rotations. At each site, a random orthonormal basis of the same subspace replaces the
            kept axes. None keeps the principal axes.
        progress: function that is called after each site.
    """

    source: Source
    architecture: Architecture
    runner: Runner
    work: Work
    tokens: Tensor
    held_out: Tensor
    size: int
    seed: int | None = None
    progress: Progress = silent

    def begin(self) -> dict[str, float]:
        """Find the axes of all sites, and return the held-out perplexities of the dense and the sliced model."""
        return self.work.once("perplexities", self._perplexities)

    def look(self, part: Part) -> None:
        """Do nothing, because `begin` finds the axes."""

    def step(
        self,
        state: dict[str, float],
        part: Part,
        analysis: None,  # noqa: ARG002
        following: None,  # noqa: ARG002
    ) -> tuple[dict[str, float], PartChange]:
        """Return the same state, and the change of a part: rotations, folded tensors, and the perplexities as facts."""
        if part.sublayers:
            sites = [part.sublayers[0].site - 1, *(sub.site for sub in part.sublayers)]
        else:
            sites = [0 if part is self.architecture.parts[0] else self.architecture.n_sites - 1]
        rotations = {site: self._rotation(site) for site in sites}
        replaced = partial(_replaced, self.source, self.architecture, self.runner.device, part)
        return state, PartChange(rotations, replaced, facts=state)

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:  # noqa: ARG002
        """Check that all weights are finite.

        Raises:
            CheckpointError: a rotated weight is not finite, usually because it overflows its dtype.
        """
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"tensor {name} is not finite in {tensor.dtype} after slicing: give a wider `dtype`, or download "
                    "the dense model again if it has infinite or NaN weights"
                )

    def _perplexities(self) -> dict[str, float]:
        n_held_out = len(self.held_out)
        sliced = self.runner.losses(torch.cat([self.tokens, self.held_out]), self._projected, n_held_out)
        if not n_held_out:
            return {}
        dense = self.runner.losses(self.held_out, lambda _, x: x, n_held_out)
        return {"dense": perplexity(dense), "sliced": perplexity(sliced)}

    def _projected(self, site: int, x: Tensor) -> Tensor:
        """Compute the axes of a site from the calibration windows, and project the stream of all windows onto them."""
        axes = self._rotation(site, x[: len(self.tokens)]).to(x.device, x.dtype)
        self.progress("calibrating", "site", site + 1, self.architecture.n_sites)
        if axes.shape[1] == axes.shape[0]:
            return x
        return torch.cat([(window @ axes) @ axes.T for window in x.split(1)])

    def _rotation(self, site: int, x: Tensor | None = None) -> Tensor:
        """Return the matrix that multiplies the stream at a site, (D, width); an identity if the site is not sliced."""
        D = self.architecture.hidden_size
        width = (Layout.sliced(self.architecture, self.size).widths or ())[site]
        if width == D:
            return torch.eye(D, dtype=torch.float64)
        stage = f"axes-{site}"
        if x is None:
            axes: Tensor = self.work.result(stage)
            return axes
        return self.work.once(stage, lambda: self._axes(site, width, x))

    def _axes(self, site: int, width: int, x: Tensor) -> Tensor:
        """Return the principal axes of the stream, rotated randomly if there is a seed."""
        axes = principal_axes(covariance(x.flatten(0, 1)), width).cpu()
        if self.seed is None:
            return axes
        seed = self.seed * self.architecture.n_sites + site
        return axes @ random_orthogonal(width, torch.Generator().manual_seed(seed))


def _replaced(source: Source, architecture: Architecture, device: torch.device, part: Part) -> dict[str, Tensor | None]:
    """Return the folded tensors of a part, and None for each tensor that folding removes."""
    folded = folded_part(source, architecture, device, part)
    return dict.fromkeys(part.weights.keys() - folded.keys()) | folded


def folded_part(source: Source, architecture: Architecture, device: torch.device, part: Part) -> dict[str, Tensor]:
    """Return the tensors of a part with the norms folded in."""
    tensors = _tensors(source, part, device)
    if part == architecture.parts[0]:
        return fold_embeddings(tensors, architecture)
    if part.sublayers:
        return fold_sublayers(tensors, architecture, part.sublayers)
    head, embedding = architecture.head.weight, architecture.embedding.weight
    if not architecture.tied and head not in tensors:
        tensors[embedding] = source[embedding].to(device)
    return fold_head(tensors, architecture)


def _tensors(source: Source, part: Part, device: torch.device) -> dict[str, Tensor]:
    return {name: source[name].to(device) for name in part.weights if name in source.specs}
