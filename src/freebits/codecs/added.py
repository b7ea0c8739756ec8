"""A tensor as the sum of a tensor of the base and a difference, which another recipe makes."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from freebits.codecs.base import Check, Coded, Params
from freebits.types import FLOATS, TensorSpec

BASE, DIFFERENCE = "base", "difference"


class Added:
    """A tensor of floats. The sum is computed in float32 and rounded to the dtype of the tensor."""

    exact = False
    check = Check.DIGEST
    param_names: frozenset[str] = frozenset()

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Return the parts for a tensor and a tensor of the base. The sum need not be exactly the tensor."""
        tensor, base = tensors
        return Coded({BASE: base, DIFFERENCE: tensor.float() - base.float()})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:  # noqa: ARG002
        """Return the tensor."""
        [spec] = makes
        return [(parts[BASE].float() + parts[DIFFERENCE]).to(spec.dtype)]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Return the spec of the base's tensor, equal to that of the made tensor, and the spec of the difference."""
        [spec] = makes
        if spec.dtype_name not in FLOATS[:3]:
            raise ValueError(f"the `added` code makes tensors of 16-bit or 32-bit floats, not {spec}")
        return {BASE: spec, DIFFERENCE: TensorSpec("F32", spec.shape)}
