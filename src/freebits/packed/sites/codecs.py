"""How the sites of a packed checkpoint are read, by the codec that each is stored with."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from freebits.packed.format import SiteRecord
from freebits.packed.sites.bitsback import BitsBackSite
from freebits.packed.sites.canonical import LOWER, SYMMETRIC, SymmetricSite, TriangleSite


class SiteCodec(Protocol):
    """How the parts of an encoded site become its tensors again."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Parts that may be missing."""

    @staticmethod
    def parts(record: SiteRecord) -> dict[str, str]:
        """Part → name under which it is stored."""

    @staticmethod
    def expected(record: SiteRecord, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Shape of each part, and whether it consists of words (else bytes); `found` are the shapes of the parts.

        Raises:
            ValueError: the record cannot be.
        """

    @staticmethod
    def decode(record: SiteRecord, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The site's tensors.

        Raises:
            ValueError: the parts do not fit together.
        """


SITE_CODECS: Mapping[str, SiteCodec] = {
    "bits-back": BitsBackSite(),
    LOWER: TriangleSite(),
    SYMMETRIC: SymmetricSite(),
}
