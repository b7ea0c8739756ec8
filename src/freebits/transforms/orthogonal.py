"""Rotate tensors along their residual axes (Remark 3.1 of arXiv 2410.01309).

In the layout `(d_out, d_in)` of `nn.Linear`, a tensor that writes the stream becomes `Qᵀ W`, and one that reads the
stream becomes `W Q`. In both cases the residual axis is contracted with `Q`. For slicing, `Q` has fewer columns than
rows. A shortcut is an identity matrix, rotated along both axes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from freebits.models.architecture import Axis

_ROWS = 8192
"""Number of vectors that are converted to float64 at a time."""


def rotate(
    tensor: Tensor,
    axes: tuple[Axis, ...],
    rotations: Mapping[int, Tensor],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Multiply each residual axis of a tensor by the rotation of its site, in float64.

    Args:
        tensor: tensor of any shape and any float dtype.
        axes: residual axes of the tensor.
        rotations: site → `Q: (d, d')`, float64; axes at sites without an entry are unchanged.
        dtype: dtype to which the result is rounded, once, at the end.
    """
    rotated = [axis for axis in axes if axis.site in rotations]
    for axis in rotated[:-1]:
        tensor = _contract(tensor, axis.dim, rotations[axis.site], torch.float64)
    for axis in rotated[-1:]:
        tensor = _contract(tensor, axis.dim, rotations[axis.site], dtype)
    return tensor.to(dtype)


def _contract(tensor: Tensor, dim: int, Q: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.ndim == 2 and dim == 0:  # avoids a transposed copy
        return torch.cat([(Q.T @ chunk.double()).to(dtype) for chunk in tensor.split(_ROWS, dim=1)], dim=1)
    rows = tensor.movedim(dim, -1).reshape(-1, len(Q))
    product = torch.cat([(chunk.double() @ Q).to(dtype) for chunk in rows.split(_ROWS)])
    other_sizes = [size for index, size in enumerate(tensor.shape) if index != dim]
    return product.reshape(*other_sizes, Q.shape[1]).movedim(-1, dim)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return a Haar-distributed orthogonal matrix, (size, size), float64 (Stewart 1980, by QR)."""
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()
