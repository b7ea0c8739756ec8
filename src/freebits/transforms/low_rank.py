"""Low-rank linear layers by reduced-order modeling (Chavan, Lele and Gupta 2023, arXiv 2312.07046).

On a text, the outputs `y = W x` vary mostly in a few directions, the leading eigenvectors `V` of `Σ y yᵀ`. The layer is
replaced by `y' = V (Vᵀ W x)`, which minimizes `Σ ‖y' - y‖²` on the text among all layers of the same rank. If the
squared errors of the outputs have weights `f`, the method is applied to `√f y` instead of `y`.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def reduced(W: Tensor, gram: Tensor, rank: int, information: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the two matrices of the best low-rank layer of a given rank, float64.

    Args:
        W: (n, m), the matrix of the layer.
        gram: (m, m), `Σ x xᵀ` over the inputs of the layer.
        rank: rank of the low-rank layer, from 1 to min(n, m).
        information: (n,), Fisher information of each output, used as the weight of its squared error; None for equal
            weights.

    Returns:
        `down: (rank, m)` and `up: (n, rank)`, where `up @ down` approximates `W`.
    """
    scales = _scales(information, len(W))
    scaled = W.double() * scales[:, None]
    axes = torch.linalg.eigh(scaled @ gram.double() @ scaled.T).eigenvectors[:, -rank:].flip(1)
    return axes.T @ scaled, axes / scales[:, None]


def spectrum(W: Tensor, gram: Tensor, information: Tensor | None = None) -> Tensor:
    """Return the energy of the outputs in each direction, (min(n, m),), float64, descending.

    A low-rank layer of rank `r` loses the sum of all energies after the first `r`.
    """
    scaled = W.double() * _scales(information, len(W))[:, None]
    values = torch.linalg.eigvalsh(scaled @ gram.double() @ scaled.T).flip(0)
    return values[: min(W.shape)].clamp_min(0)


def n_low_rank_weights(n: int, m: int, rank: int) -> int:
    """Return the number of weights of a low-rank layer in canonical form; see `freebits.transforms.pivoting`."""
    return rank * (n + m - rank)


def rank_for(n: int, m: int, budget: float, *, paired: bool = True) -> int:
    """Return the largest rank at which a low-rank layer has at most a given fraction of the full layer's weights.

    The rank is at least 1, even if a layer of rank 1 has more weights.

    Args:
        n: number of outputs.
        m: number of inputs.
        budget: the fraction, in (0, 1).
        paired: whether to count the weights of the canonical form; if False, all weights of the two matrices count,
            as in arXiv 2312.07046.
    """
    max_weights = budget * n * m
    if not paired:
        return max(1, int(max_weights / (n + m)))
    half = (n + m) / 2
    rank = int(half - math.sqrt(max(0.0, half**2 - max_weights)))
    return min(max(1, rank), n, m)


def _scales(information: Tensor | None, n: int) -> Tensor:
    """Return the square root of the weight of each output's squared error, float64. Raise tiny weights above zero."""
    if information is None:
        return torch.ones(n, dtype=torch.float64)
    wide = information.double()
    return wide.clamp_min(1e-6 * wide.mean().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def allocated(spectra: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]], budget: float) -> dict[str, int]:
    """Return ranks that lose little energy while all layers together keep at most a given fraction of their weights.

    The function adds the direction with the most energy per weight until no more fits. Each layer gets at least rank 1.

    Args:
        spectra: layer → its `spectrum`, in the same unit for all layers.
        sizes: layer → number of outputs and number of inputs.
        budget: the fraction, in (0, 1); weights of low-rank layers are counted in canonical form.

    Returns:
        Layer → rank; 0 for a layer that stays a matrix because it would get its full rank.
    """
    names, gains, costs = [], [], []
    for name, values in spectra.items():
        n, m = sizes[name]
        layer_costs = np.diff([n_low_rank_weights(n, m, rank) for rank in range(len(values) + 1)])
        layer_gains = values.numpy() / np.maximum(layer_costs, 1)
        names += [name] * len(values)
        gains.append(np.minimum.accumulate(layer_gains))  # no direction is chosen before a stronger one of its layer
        costs.append(layer_costs)
    gain, cost = np.concatenate(gains), np.concatenate(costs)
    order = np.argsort(-gain, kind="stable")
    max_weights = budget * sum(n * m for n, m in sizes.values())
    chosen = order[np.cumsum(cost[order]) <= max_weights]
    counts = dict(zip(*np.unique(np.array(names)[chosen], return_counts=True), strict=True))
    ranks = {name: max(1, int(counts.get(name, 0))) for name in spectra}
    return {name: 0 if rank >= len(spectra[name]) else rank for name, rank in ranks.items()}
