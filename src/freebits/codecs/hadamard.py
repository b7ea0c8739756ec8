"""A matrix that is stored rotated on both sides, so that its values are distributed almost normally (QuIP, QuaRot)."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.base import Check, Coded, Params
from freebits.codecs.bits import pack_bits, unpack_bits
from freebits.types import FLOATS, TensorSpec


def hadamard(x: Tensor, seed: int) -> Tensor:
    """Return `x Q`, (…, n), in the dtype of `x`, (…, n). The seed determines the rotation `Q`, (n, n)."""
    n = x.shape[-1]
    core = _core(n)
    return _times_core_and_sylvester((x * _signs(n, seed).to(x)).unflatten(-1, (len(core), -1)), core.to(x))


def hadamard_inverse(x: Tensor, seed: int) -> Tensor:
    """Return `x Qᵀ`, (…, n); the inverse of `hadamard`."""
    return _unrotated(x, _signs(x.shape[-1], seed))


def _unrotated(x: Tensor, signs: Tensor) -> Tensor:
    core = _core(x.shape[-1])
    return _times_core_and_sylvester(x.unflatten(-1, (len(core), -1)), core.T.to(x)) * signs.to(x)


def _times_core_and_sylvester(x: Tensor, core: Tensor) -> Tensor:
    """Multiply `x`, (…, m, 2^t), by `core` along `m` and by Sylvester's matrix along `2^t`; flatten both axes."""
    x = (x.transpose(-1, -2) @ core).transpose(-1, -2)
    half = 1
    while half < x.shape[-1]:
        pairs = x.unflatten(-1, (-1, 2, half))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        half *= 2
    return x.flatten(-2) / x.shape[-1] ** 0.5


def _signs(n: int, seed: int) -> Tensor:
    """Return the random signs of a seed, (n,). NumPy guarantees the same raw bits on all machines."""
    bits = np.random.PCG64([seed, n]).random_raw(n) & np.uint64(1)
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1)


@cache
def _core(n: int) -> Tensor:
    """Return the core, (o, o), float64, for the odd part `o` of `n`: the orthonormal discrete cosine transform.

    The rotation is a diagonal matrix of signs times the Kronecker product of the core and Sylvester's matrix.
    """
    odd = n // (n & -n)
    rows, columns = torch.arange(odd, dtype=torch.float64)[:, None], torch.arange(odd, dtype=torch.float64)
    core = torch.cos(torch.pi / odd * (columns + 0.5) * rows) * (2 / odd) ** 0.5
    core[0] /= 2**0.5
    return core


ROTATED = "rotated"
_SIDES = "rows", "columns"


class Hadamard:
    """One matrix `(n, m)`, rotated on both sides.

    The parameters `rows` and `columns` are the random signs of the two rotations as bits (1 for -1) in hexadecimal.

    Args:
        seed: seed of the signs with which `encode` rotates. `decode` reads the signs from the parameters.
    """

    exact = False
    check = Check.SUMS
    param_names = frozenset({"rows", "columns"})

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:
        """Rotate the matrix."""
        return Coded({ROTATED: rotated(tensors[0], self._seed)}, hadamard_params(makes[0], self._seed))

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the matrix, computed in float64 and then rounded."""
        [spec] = makes
        rows, columns = (_signs_from(params[key], n) for key, n in zip(_SIDES, spec.shape, strict=True))
        matrix = _unrotated(_unrotated(parts[ROTATED].double(), columns).T, rows).T
        return [matrix.to(spec.dtype).contiguous()]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the spec of the rotated matrix, which is float32."""
        [spec] = makes
        if spec.dtype_name not in FLOATS or len(spec.shape) != 2:
            raise ValueError(f"the `hadamard` code makes matrices of floats, not {spec}")
        if any(len(bytes.fromhex(params[key])) != -(-n // 8) for key, n in zip(_SIDES, spec.shape, strict=True)):
            raise ValueError(f"the number of signs does not fit {spec}")
        return {ROTATED: TensorSpec("F32", spec.shape)}


def hadamard_params(spec: TensorSpec, seed: int) -> dict[str, str]:
    """Return the parameters of the code for a matrix that `rotated` rotates with this seed."""
    bits = [pack_bits((_signs(n, seed) < 0).numpy().astype(np.int64), 1) for n in spec.shape]
    return {key: packed.hex() for key, packed in zip(_SIDES, bits, strict=True)}


def _signs_from(text: str, n: int) -> Tensor:
    """Return the signs, (n,), float64, that a parameter contains."""
    return torch.from_numpy(1 - 2 * unpack_bits(bytes.fromhex(text), n, 1).astype(np.float64))


def rotated(matrix: Tensor, seed: int) -> Tensor:
    """Return a matrix rotated on both sides, (n, m), computed in float64 and rounded to float32."""
    return hadamard(hadamard(matrix.double(), seed).T, seed).T.float().contiguous()
