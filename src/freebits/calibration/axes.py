"""Principal axes of the residual stream (SliceGPT, section 3.4)."""

import torch
from torch import Tensor

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
