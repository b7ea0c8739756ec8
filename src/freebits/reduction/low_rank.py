"""A linear layer through a narrow space: reduced-order modelling (Chavan, Lele and Gupta 2023, arXiv 2312.07046).

The outputs `y = W x` that a text gives vary mostly in few directions: the leading eigenvectors `V` of `Σ y yᵀ`. So the
layer becomes `y = V (Vᵀ W x)`, which of all layers of that rank has the least `Σ ‖y' - y‖²` on the text. Where rows
count differently, `f` each, the same holds of `√f y`.
"""

import math

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


def n_numbers(n: int, m: int, rank: int) -> int:
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
