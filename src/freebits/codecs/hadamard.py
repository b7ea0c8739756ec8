"""A matrix rotated on both sides, so that its numbers look normal (QuIP, QuaRot): back where it was."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.code import Coded, Params
from freebits.types import FLOATS, TensorSpec

_LARGEST = 512
"""Order of a matrix that is multiplied by as a whole."""


def hadamard(x: Tensor, seed: int) -> Tensor:
    """`x Q` for the rotation of a seed, along the last dimension, in the dtype of `x`."""
    n = x.shape[-1]
    core = _core(n)
    return _sylvester((x * _signs(n, seed).to(x)).unflatten(-1, (len(core), -1)), core.to(x))


def hadamard_inverse(x: Tensor, seed: int) -> Tensor:
    """`x Qᵀ`."""
    n = x.shape[-1]
    core = _core(n)
    return _sylvester(x.unflatten(-1, (len(core), -1)), core.T.to(x)) * _signs(n, seed).to(x)


def _sylvester(x: Tensor, core: Tensor) -> Tensor:
    """(…, m, 2^t) times `core` along one and Sylvester's matrix along the other dimension, flattened."""
    x = (x.transpose(-1, -2) @ core).transpose(-1, -2)
    half = 1
    while half < x.shape[-1]:
        pairs = x.unflatten(-1, (-1, 2, half))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        half *= 2
    return x.flatten(-2) / x.shape[-1] ** 0.5


def _signs(n: int, seed: int) -> Tensor:
    """The same on all machines, as NumPy promises of raw bits."""
    bits = np.random.PCG64([seed, n]).random_raw(n) & np.uint64(1)
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1)


@cache
def _core(n: int) -> Tensor:
    """What is left of the rotation besides Sylvester's part, (m, m), float64."""
    odd = n & -n
    m = n // odd
    while m <= min(n, _LARGEST):
        H = _paley(m)
        if H is not None:
            return H / m**0.5
        if n % (2 * m):
            break
        m *= 2
    m = n // odd
    generator = torch.Generator().manual_seed(m)
    return torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of an order `q + 1` or `2 (q + 1)`, `q` a prime of the form 4k + 3 or 4k + 1 (Paley 1933)."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    if _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1)
    q = order // 2 - 1
    if order % 8 == 4 and _is_prime(q) and q % 4 == 1:
        C, one = _conference(q), torch.eye(q + 1, dtype=torch.float64)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        return torch.kron(C, two) + torch.kron(one, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64))
    return None


def _conference(q: int) -> Tensor:
    """Paley's conference matrix of order `q + 1`: `C Cᵀ = q I`, zeros on its diagonal."""
    squares = {number * number % q for number in range(1, q)}
    row = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    C[0, 1:] = 1
    C[1:, 0] = 1 if q % 4 == 1 else -1
    C[1:, 1:] = row[(index[None] - index[:, None]) % q]
    return C


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


ROTATED = "rotated"


class Hadamard:
    """One matrix `(n, m)`; `seed` is of the rotations of its rows' and its columns' spaces."""

    exact = False

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """The matrix, rotated."""
        [matrix] = tensors
        return Coded({ROTATED: rotated(matrix, self._seed)}, {"seed": self._seed})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The matrix, in float64 and then rounded."""
        [spec], seed = makes, params["seed"]
        columns = hadamard_inverse(parts[ROTATED].double(), seed)
        return [hadamard_inverse(columns.T, seed).T.to(spec.dtype).contiguous()]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """A matrix of that shape in float32."""
        [spec], seed = makes, params["seed"]
        if spec.code not in FLOATS or len(spec.shape) != 2 or type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"a rotation {seed!r} of {spec}")
        return {ROTATED: TensorSpec("F32", spec.shape)}


def rotated(matrix: Tensor, seed: int) -> Tensor:
    """Rotated on both sides, (n, m), float32."""
    return hadamard(hadamard(matrix.double(), seed).T, seed).T.float().contiguous()
