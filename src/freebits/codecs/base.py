"""The interface of a code, which turns tensors into stored parts and back. Codes know no models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from freebits.types import TensorSpec

Params = Mapping[str, Any]


class Declined(Exception):  # noqa: N818
    """The code cannot encode these tensors, or saves nothing by it; the message gives the reason."""


@dataclass(frozen=True)
class Coded:
    """The result of encoding.

    Attributes:
        parts: the tensors to store, by the code's part names.
        params: the other values that decoding needs, as JSON.
        corrected: the number of corrected values, for reports; 0 for a code without corrections.
    """

    parts: dict[str, Tensor]
    params: dict[str, Any] = field(default_factory=dict)
    corrected: int = 0


class Code(Protocol):
    """One code. To add one, write a class like this and a line in `freebits.codecs.registry.CODES`."""

    @property
    def exact(self) -> bool:
        """Whether the code stores any single tensor bit-exactly. Such a code can follow any other code."""

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:
        """Encode tensors; `makes` has the specs of the tensors that `decode` returns.

        Raises:
            Declined: the tensors are better stored as they are.
        """

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the tensors with the specs `makes`. The caller has checked the parts against the specs of `parts()`.

        Raises:
            ValueError: the parts are damaged.
        """

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the specs of the parts for tensors with the specs `makes`; reads and allocates nothing.

        Raises:
            ValueError: the code has no parts for these specs and params.
        """
