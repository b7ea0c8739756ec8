"""The interface of a code, which turns tensors into stored parts and back. Codes do not depend on models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from freebits.types import TensorSpec

Params = Mapping[str, Any]


class Declined(Exception):  # noqa: N818
    """The code cannot encode these tensors, or encoding them saves nothing. The message gives the reason."""


@dataclass(frozen=True)
class Coded:
    """The result of encoding.

    Attributes:
        parts: name of a part → tensor to store.
        params: parameters of the code, which decoding also needs, as JSON values.
        corrected: the number of corrected values, for reports; 0 if the code makes no corrections.
    """

    parts: dict[str, Tensor]
    params: dict[str, Any] = field(default_factory=dict)
    corrected: int = 0


class Check(Enum):
    """How readers of a packed folder check the tensors that a code decodes.

    A *recipe* is an entry of the folder's manifest that tells a reader how to decode some tensors.
    """

    DIGEST = "digest"
    """All machines decode the same values bit for bit, so the recipe has a digest of the values."""
    SUMS = "sums"
    """Machines may round a few values differently, so the recipe has sums of the values."""
    NONE = "none"
    """The code checks the values itself."""


class Code(Protocol):
    """One code. `freebits.codecs.registry.CODES` lists all codes."""

    @property
    def exact(self) -> bool:
        """Whether the code can store one tensor of any spec bit-exactly, and so can encode the parts of other codes."""

    @property
    def check(self) -> Check:
        """How the decoded tensors are checked."""

    @property
    def param_names(self) -> frozenset[str]:
        """The names of all parameters that `Coded.params` can have."""

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:
        """Encode tensors. `makes` lists the specs of the tensors that `decode` returns.

        Raises:
            Declined: the code cannot encode the tensors, or encoding them saves nothing.
        """

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the tensors, which have the specs `makes`. The caller has checked the parts against `parts()`.

        Raises:
            ValueError: the parts are damaged.
        """

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the specs of the parts for tensors with the specs `makes`, without reading or allocating anything.

        Raises:
            ValueError: the code does not accept these specs and params.
        """
