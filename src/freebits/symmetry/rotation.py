"""Rotate tensors along their residual axes (paper, Remark 3.1).

In the layout `(d_out, d_in)` of `nn.Linear`, a producer `W ← Qᵀ W` and a consumer `W ← W Q` are the same
operation: contract the residual axis with `Q`. So are slicing (`Q` with fewer columns) and the making of a
shortcut, which is an identity rotated at both of its ends.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from freebits.architecture import Axis


def rotate(tensor: Tensor, axes: tuple[Axis, ...], rotations: Mapping[int, Tensor]) -> Tensor:
    """`tensor` with each residual axis multiplied by the rotation of its site.

    Args:
        tensor: any shape.
        axes: its residual axes.
        rotations: site → `Q: (d, d')`; a site without entry is left alone.
    """
    for axis in axes:
        if axis.site in rotations:
            tensor = (tensor.movedim(axis.dim, -1) @ rotations[axis.site]).movedim(-1, axis.dim)
    return tensor


def rotate_all(
    tensors: Mapping[str, Tensor], axes: Mapping[str, tuple[Axis, ...]], rotations: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """`rotate` for each of the named tensors."""
    return {name: rotate(tensor, axes[name], rotations) for name, tensor in tensors.items()}


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix, `(size, size)`, float64 (Stewart 1980, by QR)."""
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()
