"""A matrix stored the other way round."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from freebits.codes.code import Coded, Params
from freebits.kind import Kind

TRANSPOSED = "transposed"


class Transposed:
    """One matrix `(n, m)`, as `(m, n)`."""

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[Kind]) -> Coded:  # noqa: ARG002
        """The matrix, transposed."""
        [matrix] = tensors
        return Coded({TRANSPOSED: matrix.T.contiguous()})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[Kind], params: Params) -> list[Tensor]:  # noqa: ARG002
        """The matrix."""
        return [parts[TRANSPOSED].T.contiguous()]

    def parts(self, makes: Sequence[Kind], params: Params) -> dict[str, Kind]:  # noqa: ARG002
        """The same numbers."""
        [kind] = makes
        if len(kind.shape) != 2:
            raise ValueError(f"a transposed {kind}")
        return {TRANSPOSED: Kind(kind.code, kind.shape[::-1])}
