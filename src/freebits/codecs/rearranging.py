"""Tensors that are stored transposed or in several parts."""

from collections.abc import Mapping, Sequence

from torch import Tensor, cat

from freebits.codecs.base import Check, Coded, Params
from freebits.types import TensorSpec

TRANSPOSED = "transposed"


class Transposed:
    """One matrix `(n, m)`, stored as `(m, n)`."""

    exact = False
    check = Check.DIGEST
    param_names: frozenset[str] = frozenset()

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Transpose the matrix."""
        [matrix] = tensors
        return Coded({TRANSPOSED: matrix.T.contiguous()})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:  # noqa: ARG002
        """Return the matrix."""
        return [parts[TRANSPOSED].T.contiguous()]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Return the spec of the transposed matrix."""
        [spec] = makes
        if len(spec.shape) != 2:
            raise ValueError(f"the `transposed` code makes matrices, not {spec}")
        return {TRANSPOSED: TensorSpec(spec.dtype_name, spec.shape[::-1])}


class Joined:
    """One tensor, reshaped to a matrix and stored in parts of consecutive rows.

    Params: `rows`, the number of rows of each part. The width of the matrix follows from the sum of `rows`.
    """

    exact = False
    check = Check.DIGEST
    param_names = frozenset({"rows"})

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Store the tensors unchanged as parts."""
        parts = {str(index): tensor for index, tensor in enumerate(tensors)}
        return Coded(parts, {"rows": [len(tensor) for tensor in tensors]})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the tensor."""
        [spec] = makes
        return [cat([parts[str(index)] for index in range(len(params["rows"]))]).reshape(spec.shape)]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the specs of the parts, which together must hold the tensor."""
        [spec] = makes
        rows = params["rows"]
        if len(spec.shape) < 2 or not rows or min(rows) < 1 or not spec.numel or spec.numel % sum(rows):
            raise ValueError(f"the `joined` code cannot make {spec} from parts of {rows} rows")
        return {str(index): TensorSpec(spec.dtype_name, (n, spec.numel // sum(rows))) for index, n in enumerate(rows)}
