"""A matrix rotated on both sides, so that its numbers look normal (QuIP, QuaRot): back where it was."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from freebits.codes.code import Coded, Params
from freebits.kind import FLOATS, Kind
from freebits.symmetry import hadamard, hadamard_inverse

ROTATED = "rotated"


class Hadamard:
    """One matrix `(n, m)`; `seed` is of the rotations of its rows' and its columns' spaces."""

    exact = False

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[Kind]) -> Coded:  # noqa: ARG002
        """The matrix, rotated."""
        [matrix] = tensors
        return Coded({ROTATED: rotated(matrix, self._seed)}, {"seed": self._seed})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[Kind], params: Params) -> list[Tensor]:
        """The matrix, in float64 and then rounded."""
        [kind], seed = makes, params["seed"]
        columns = hadamard_inverse(parts[ROTATED].double(), seed)
        return [hadamard_inverse(columns.T, seed).T.to(kind.dtype).contiguous()]

    def parts(self, makes: Sequence[Kind], params: Params) -> dict[str, Kind]:
        """A matrix of that shape in float32."""
        [kind], seed = makes, params["seed"]
        if kind.code not in FLOATS or len(kind.shape) != 2 or type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"a rotation {seed!r} of {kind}")
        return {ROTATED: Kind("F32", kind.shape)}


def rotated(matrix: Tensor, seed: int) -> Tensor:
    """Rotated on both sides, (n, m), float32."""
    return hadamard(hadamard(matrix.double(), seed).T, seed).T.float().contiguous()
