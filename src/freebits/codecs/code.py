"""What a code is: tensors in, parts out, the same tensors back. Codes know kinds and numbers, and no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from freebits.types import TensorSpec

Params = Mapping[str, Any]


class Declined(Exception):  # noqa: N818
    """These tensors cannot be encoded, or not at a gain; the message says why."""


@dataclass(frozen=True)
class Coded:
    """What encoding gives.

    Attributes:
        parts: what is stored, by the names that the code has for it.
        params: what decoding needs besides, as JSON.
        corrected: how many words are corrected, where a code corrects; for reports.
    """

    parts: dict[str, Tensor]
    params: dict[str, Any] = field(default_factory=dict)
    corrected: int = 0


class Code(Protocol):
    """One code. A new one is a class like this and a line in `freebits.codecs.registry.CODES`."""

    @property
    def exact(self) -> bool:
        """Whether it takes any tensor alone and gives it back bit for bit, so that it can follow any other code."""

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:
        """Encode tensors; `makes` is what decoding is to make of them.

        Raises:
            Declined: they are better stored as they are.
        """

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The tensors, of the kinds `makes`; `parts` have been found to be of the kinds that `parts` tells.

        Raises:
            ValueError: the parts are damaged.
        """

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """The kinds of the parts for tensors of these kinds; nothing is read or allocated.

        Raises:
            ValueError: there are no such parts.
        """
