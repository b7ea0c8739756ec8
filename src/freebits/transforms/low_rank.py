"""A linear layer through a narrow space: reduced-order modelling (Chavan, Lele and Gupta 2023, arXiv 2312.07046).

The outputs `y = W x` that a text gives vary mostly in few directions: the leading eigenvectors `V` of `Σ y yᵀ`. So the
layer becomes `y = V (Vᵀ W x)`, which of all layers of that rank has the least `Σ ‖y' - y‖²` on the text. Where rows
count differently, `f` each, the same holds of `√f y`.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def reduced(W: Tensor, gram: Tensor, rank: int, information: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two matrices of the best layer of a rank, float64.

    Args:
        W: (n, m), the layer's.
        gram: (m, m), `Σ x xᵀ` over its inputs.
        rank: 1 to min(n, m).
        information: (n,), what an error of each output counts; None for all alike.

    Returns:
        `down: (rank, m)` and `up: (n, rank)`, with `up @ down` for `W`.
    """
    scales = _scales(information, len(W))
    scaled = W.double() * scales[:, None]
    axes = torch.linalg.eigh(scaled @ gram.double() @ scaled.T).eigenvectors[:, -rank:].flip(1)
    return axes.T @ scaled, axes / scales[:, None]


def spectrum(W: Tensor, gram: Tensor, information: Tensor | None = None) -> Tensor:
    """What each direction of the outputs carries, (min(n, m),), float64, descending: what a rank leaves out is lost."""
    scaled = W.double() * _scales(information, len(W))[:, None]
    values = torch.linalg.eigvalsh(scaled @ gram.double() @ scaled.T).flip(0)
    return values[: min(W.shape)].clamp_min(0)


def n_weights_of(n: int, m: int, rank: int) -> int:
    """Numbers of a layer of a rank in canonical form: `rank²` of the two matrices say nothing (`symmetry.pivoting`)."""
    return rank * (n + m - rank)


def rank_for(n: int, m: int, budget: float, *, paired: bool = True) -> int:
    """The largest rank whose numbers are at most a part of the layer's.

    Args:
        n: outputs.
        m: inputs.
        budget: the part, in (0, 1).
        paired: whether numbers are counted in canonical form; else all of both matrices, as the paper does.
    """
    most = budget * n * m
    if not paired:
        return max(1, int(most / (n + m)))
    half = (n + m) / 2
    rank = int(half - math.sqrt(max(0.0, half**2 - most)))
    return min(max(1, rank), n, m)


def _scales(information: Tensor | None, n: int) -> Tensor:
    """Roots of what rows count, none of them zero."""
    if information is None:
        return torch.ones(n, dtype=torch.float64)
    wide = information.double()
    return wide.clamp_min(1e-6 * wide.mean().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def allocated(spectra: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]], budget: float) -> dict[str, int]:
    """Ranks by which layers together take at most a part of their numbers, in canonical form, and lose least.

    Args:
        spectra: of each layer what each direction of its outputs carries, descending, in one unit for all.
        sizes: outputs and inputs of each layer.
        budget: the part of all their numbers, in (0, 1).

    Returns:
        Layer → rank, 0 for one that is to stay as it is: where a layer wants more than it has, it does.
    """
    names, slopes, costs = [], [], []
    for name, values in spectra.items():
        n, m = sizes[name]
        cost = np.diff([n_weights_of(n, m, rank) for rank in range(len(values) + 1)])
        gain = values.numpy() / np.maximum(cost, 1)
        names += [name] * len(values)
        slopes.append(np.minimum.accumulate(gain))  # a rank has all directions before its last
        costs.append(cost)
    slope, cost = np.concatenate(slopes), np.concatenate(costs)
    order = np.argsort(-slope, kind="stable")
    most = budget * sum(n * m for n, m in sizes.values())
    chosen = order[np.cumsum(cost[order]) <= most]
    counts = dict(zip(*np.unique(np.array(names)[chosen], return_counts=True), strict=True))
    ranks = {name: max(1, int(counts.get(name, 0))) for name in spectra}
    return {name: 0 if rank >= len(spectra[name]) else rank for name, rank in ranks.items()}
