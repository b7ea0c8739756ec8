"""A matrix that is stored rotated on both sides, so that its values are roughly normal (QuIP, QuaRot)."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.base import Coded, Params
from freebits.types import FLOATS, TensorSpec

_MAX_ORDER = 512
"""The largest order of a Paley matrix. Larger ones are slow, because they are applied by matrix multiplication."""


def hadamard(x: Tensor, seed: int) -> Tensor:
    """Return `x Q` in the dtype of `x`. The seed determines the rotation `Q` of the last dimension."""
    n = x.shape[-1]
    core = _core(n)
    return _times_core_and_sylvester((x * _signs(n, seed).to(x)).unflatten(-1, (len(core), -1)), core.to(x))


def hadamard_inverse(x: Tensor, seed: int) -> Tensor:
    """Return `x Qᵀ`, the inverse of `hadamard`."""
    n = x.shape[-1]
    core = _core(n)
    return _times_core_and_sylvester(x.unflatten(-1, (len(core), -1)), core.T.to(x)) * _signs(n, seed).to(x)


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
    """Return the core, (m, m), float64. The rotation is the Kronecker product of the core and Sylvester's matrix.

    The core is a Paley matrix, or a random rotation if no Paley matrix has a suitable order.
    """
    odd = n // (n & -n)
    m = odd
    while m <= min(n, _MAX_ORDER):
        H = _paley(m)
        if H is not None:
            return H / m**0.5
        if n % (2 * m):
            break
        m *= 2
    generator = torch.Generator().manual_seed(odd)
    return torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q


def _paley(order: int) -> Tensor | None:
    """Return a Hadamard matrix of this order (Paley 1933), or None if there is no such construction.

    The order must be 1, `q + 1` for a prime `q = 4k + 3`, or `2 (q + 1)` for a prime `q = 4k + 1`.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    if _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1)
    q = order // 2 - 1
    if order % 8 == 4 and _is_prime(q) and q % 4 == 1:
        off_diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_conference(q), off_diagonal) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    return None


def _conference(q: int) -> Tensor:
    """Return Paley's conference matrix `C` of order `q + 1`. Its diagonal is zero, and `C Cᵀ = q I`."""
    squares = {index * index % q for index in range(1, q)}
    row = torch.tensor([0.0] + [1.0 if index in squares else -1.0 for index in range(1, q)], dtype=torch.float64)
    indices = torch.arange(q)
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    C[0, 1:] = 1
    C[1:, 0] = 1 if q % 4 == 1 else -1
    C[1:, 1:] = row[(indices[None] - indices[:, None]) % q]
    return C


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


ROTATED = "rotated"


class Hadamard:
    """One matrix `(n, m)`, rotated on both sides. The same `seed` determines both rotations."""

    exact = False

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Rotate the matrix."""
        [matrix] = tensors
        return Coded({ROTATED: rotated(matrix, self._seed)}, {"seed": self._seed})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the matrix, computed in float64 and then rounded."""
        [spec], seed = makes, params["seed"]
        columns = hadamard_inverse(parts[ROTATED].double(), seed)
        return [hadamard_inverse(columns.T, seed).T.to(spec.dtype).contiguous()]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the spec of the rotated matrix, which is float32."""
        [spec], seed = makes, params["seed"]
        if spec.dtype_name not in FLOATS or len(spec.shape) != 2 or type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"code hadamard cannot make {spec} with seed {seed!r}")
        return {ROTATED: TensorSpec("F32", spec.shape)}


def rotated(matrix: Tensor, seed: int) -> Tensor:
    """Return the matrix rotated on both sides, (n, m), float32."""
    return hadamard(hadamard(matrix.double(), seed).T, seed).T.float().contiguous()
