"""Principal axes of the residual stream (SliceGPT, section 3.4)."""

import torch
from torch import Tensor

_CHUNK = 4096


def principal_axes(x: Tensor, size: int) -> Tensor:
    """The `size` directions in which the signal has most energy, strongest first.

    Args:
        x: (tokens, D), the signal entering a norm, any float dtype; the covariance is summed in float64.
        size: how many axes to keep.

    Returns:
        (D, size), float64, orthonormal columns. SliceGPT adds 1 % of the mean variance to the covariance's
        diagonal; that moves no eigenvector, so it is left out.
    """
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for chunk in x.split(_CHUNK):
        covariance.addmm_(chunk.double().T, chunk.double())
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :size]
