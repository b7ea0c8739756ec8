"""Slice a dense model (SliceGPT, Ashkboos et al. 2024), one block in memory at a time.

Slicing is a rotation into principal axes that keeps the first `k` of them. Each block is calibrated on the
output of the part sliced before it: the dense sublayer runs on the stream projected onto the kept axes,
which is what the sliced sublayer computes, seen in the dense basis.
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
from freebits.models.layout import Layout
from freebits.models.table import Architecture, Part
from freebits.storage.folder import Source
from freebits.transforms.folding import fold_embeddings, fold_head, fold_sublayers
from freebits.transforms.orthogonal import random_orthogonal
from freebits.transforms.transform import Dtypes, Turn

AtSite = Callable[[int, Tensor], Tensor]
"""Takes a site and the stream there, (windows, T, D), float32; returns the stream that the model continues with."""


class Runner(Protocol):
    """Runs a dense model whose norms are folded.

    Attributes:
        device: where it runs.
    """

    device: torch.device

    def losses(self, tokens: Tensor, at_site: AtSite, n_measured: int) -> list[float]:
        """Run windows of tokens through the model, all of them from site to site.

        Args:
            tokens: (windows, T), int64.
            at_site: sees the stream at each site, in order, and may replace it.
            n_measured: for how many windows, the last ones, losses are wanted.

        Returns:
            For each of these windows the mean negative log-likelihood of its tokens after the first, in nats.
        """


def perplexity(losses: Sequence[float]) -> float:
    """The perplexity over windows of equal length, from their mean losses in nats; NaN stays NaN."""
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if not mean >= math.log(sys.float_info.max) else math.inf


_CHUNK = 4096


def covariance(x: Tensor) -> Tensor:
    """`xᵀ x: (D, D)`, float64, of the signal entering a norm, (tokens, D), any float dtype."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for chunk in x.split(_CHUNK):
        total.addmm_(chunk.double().T, chunk.double())
    return total


def principal_axes(total: Tensor, size: int) -> Tensor:
    """The `size` directions in which a signal has most energy, strongest first.

    Args:
        total: (D, D), its covariance.
        size: how many axes to keep.

    Returns:
        (D, size), float64, orthonormal columns. SliceGPT adds 1 % of the mean variance to the covariance's
        diagonal; that moves no eigenvector, so it is left out.
    """
    return torch.linalg.eigh(total).eigenvectors.flip(-1)[:, :size]


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
class Slice:
    """The move, of a dense model.

    Attributes:
        source: the model.
        architecture: what is in it; `tied` if the sliced model is to keep the tie.
        runner: runs it.
        work: keeps the axes of each site.
        tokens: (windows, T), the calibration text.
        held_out: (windows, T), text on which to measure what slicing costs.
        size: `k`, the width to keep; see `sliced_size`.
        seed: where given, the kept subspace of each site is turned at random within itself.
        progress: called after each site at which axes were found.
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
        """Find the axes of all sites; the perplexities of the dense and of the sliced model on the held-out text."""
        return self.work.once("perplexities", self._calibrated)

    def look(self, part: Part) -> None:
        """Nothing: axes are found before."""

    def step(
        self,
        state: dict[str, float],
        part: Part,
        seen: None,  # noqa: ARG002
        following: None,  # noqa: ARG002
    ) -> tuple[dict[str, float], Turn]:
        """The rotations of a part's sites."""
        if part.sublayers:
            sites = [part.sublayers[0].site - 1, *(sub.site for sub in part.sublayers)]
        else:
            sites = [0 if part is self.architecture.parts[0] else self.architecture.n_sites - 1]
        rotations = {site: self._rotation(site) for site in sites}
        replaced = partial(_replaced, self.source, self.architecture, self.runner.device, part)
        return state, Turn(rotations, replaced, facts=state)

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

    def _calibrated(self) -> dict[str, float]:
        n_held_out = len(self.held_out)
        sliced = self.runner.losses(torch.cat([self.tokens, self.held_out]), self._projected, n_held_out)
        if not n_held_out:
            return {}
        dense = self.runner.losses(self.held_out, lambda _, x: x, n_held_out)
        return {"dense": perplexity(dense), "sliced": perplexity(sliced)}

    def _projected(self, site: int, x: Tensor) -> Tensor:
        """The stream of all windows on the axes of a site, which those of the calibration text determine."""
        axes = self._rotation(site, x[: len(self.tokens)]).to(x.device, x.dtype)
        self.progress("calibrating", "site", site + 1, self.architecture.n_sites)
        if axes.shape[1] == axes.shape[0]:
            return x
        return torch.cat([(window @ axes) @ axes.T for window in x.split(1)])

    def _rotation(self, site: int, x: Tensor | None = None) -> Tensor:
        """What the stream at a site is multiplied by, (D, width). An unsliced site has nothing to choose: it stays."""
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
        """The principal ones of the stream."""
        axes = principal_axes(covariance(x.flatten(0, 1)), width).cpu()
        if self.seed is None:
            return axes
        seed = self.seed * self.architecture.n_sites + site
        return axes @ random_orthogonal(width, torch.Generator().manual_seed(seed))


def _replaced(source: Source, architecture: Architecture, device: torch.device, part: Part) -> dict[str, Tensor | None]:
    """What stands in the place of a part's tensors: the folded ones."""
    folded = folded_part(source, architecture, device, part)
    return dict.fromkeys(part.weights.keys() - folded.keys()) | folded


def folded_part(source: Source, architecture: Architecture, device: torch.device, part: Part) -> dict[str, Tensor]:
    """A part's tensors, with the norms folded into them."""
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
