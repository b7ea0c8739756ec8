"""A matrix stored the other way round."""

from collections.abc import Mapping, Sequence

from torch import Tensor, cat

from freebits.codecs.code import Coded, Params
from freebits.types import TensorSpec

TRANSPOSED = "transposed"


class Transposed:
    """One matrix `(n, m)`, as `(m, n)`."""

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """The matrix, transposed."""
        [matrix] = tensors
        return Coded({TRANSPOSED: matrix.T.contiguous()})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:  # noqa: ARG002
        """The matrix."""
        return [parts[TRANSPOSED].T.contiguous()]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:  # noqa: ARG002
        """The same numbers."""
        [spec] = makes
        if len(spec.shape) != 2:
            raise ValueError(f"a transposed {spec}")
        return {TRANSPOSED: TensorSpec(spec.code, spec.shape[::-1])}


class Joined:
    """One tensor, seen as a matrix, of parts that have some of its rows each, from the first on.

    Params: `rows`, how many each part has. Together they say how wide the matrix is.
    """

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """The parts, as they are."""
        parts = {str(number): tensor for number, tensor in enumerate(tensors)}
        return Coded(parts, {"rows": [len(tensor) for tensor in tensors]})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The tensor."""
        [spec] = makes
        return [cat([parts[str(number)] for number in range(len(params["rows"]))]).reshape(spec.shape)]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Matrices with as many rows as are told, which hold all of the tensor."""
        [spec] = makes
        rows = params["rows"]
        if len(spec.shape) < 2 or not rows or min(rows) < 1 or not spec.numel or spec.numel % sum(rows):
            raise ValueError(f"parts of {rows} rows of {spec}")
        return {str(number): TensorSpec(spec.code, (n, spec.numel // sum(rows))) for number, n in enumerate(rows)}
