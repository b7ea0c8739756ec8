"""Codec `bits-back`: each site's matrices pay for the rotation in which they are stored (paper, Algorithms 5 and 6)."""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from freebits.architecture import Sublayer
from freebits.coding import Coded, Declined, canonical_direction, decode, encode, message_length, n_words_taken
from freebits.errors import UsageError
from freebits.packed.format import SiteRecord
from freebits.packed.parallel import ordered_map
from freebits.packed.sites.plan import Block, Factors, Plan, Rotations

THRESHOLD = 0.01
CODEC = "bits-back"
_PARTS = ("message", "signs", "corrections")


@dataclass(frozen=True)
class BitsBack:
    """The codec, with the largest error of a decoded word that is left without a correction."""

    threshold: float = THRESHOLD
    name: ClassVar[str] = CODEC

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise UsageError(f"threshold {self.threshold}: give a number of 0 or more")

    def rotations(self, plan: Plan, executor: ThreadPoolExecutor) -> Iterator[tuple[Rotations, Factors]]:
        """The rotations that take each block's output matrices to their canonical direction (Algorithm 1)."""

        def directions(block: Block) -> tuple[Rotations, Factors]:
            sound = (sublayer for sublayer in block if sublayer.site not in plan.fixed)
            return {sub.site: canonical_direction(plan.sliced[f"{sub.write}.weight"].double().T) for sub in sound}, {}

        yield {}, {}
        yield from ordered_map(executor, directions, plan.architecture.blocks)

    def wide(self, block: Block) -> set[str]:
        """The output matrices: they are rotated once more before they are rounded."""
        return {f"{sublayer.write}.weight" for sublayer in block}

    def encode(
        self,
        plan: Plan,
        block: Block,
        tensors: dict[str, Tensor],
        factors: Factors,  # noqa: ARG002  (this codec has none)
    ) -> list[SiteRecord]:
        """Replace each site's tensors by its code, or leave them as they are."""
        return [self._encode_site(plan, sublayer, tensors) for sublayer in block]

    def _encode_site(self, plan: Plan, sub: Sublayer, tensors: dict[str, Tensor]) -> SiteRecord:
        names = [f"{module}.weight" for module in (sub.shortcut, *sub.reads)]
        output = f"{sub.write}.weight"
        W = tensors[output].T
        tensors[output] = tensors[output].to(plan.dtype)
        if sub.site in plan.fixed:
            return SiteRecord.plain(sub.site, sub.prefix, plan.fixed[sub.site])
        try:
            coded = encode(torch.cat([tensors[name].flatten() for name in names]), W, self.threshold)
        except Declined as reason:
            return SiteRecord.plain(sub.site, sub.prefix, str(reason))
        shapes = [(name, list(tensors[name].shape)) for name in (*names, output)]
        record = SiteRecord(sub.site, sub.prefix, CODEC, shapes, coded.n_corrections)
        for name in names:
            del tensors[name]
        tensors[output] = coded.matrix.T
        parts = {"message": coded.message, "signs": coded.signs, "corrections": coded.corrections}
        stored = BitsBackSite.parts(record)
        tensors |= {stored[part]: tensor for part, tensor in parts.items() if len(tensor)}
        return record

    def part_names(self, sublayer: Sublayer) -> list[str]:
        """Message, signs and corrections."""
        return [f"{sublayer.prefix}.{part}" for part in _PARTS]


class BitsBackSite:
    """The reader's side: see `freebits.packed.sites.codecs.SiteCodec`."""

    optional = ("corrections",)

    @staticmethod
    def parts(record: SiteRecord) -> dict[str, str]:
        """Part → name under which it is stored."""
        return {part: f"{record.name}.{part}" for part in _PARTS} | {"matrix": record.tensors[-1][0]}

    @staticmethod
    def expected(record: SiteRecord, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Shape of each part, and whether it consists of words; the rank is that of the matrix found."""
        *message, (_, (n_columns, n_rows)) = record.tensors
        n_words = sum(prod(shape) for _, shape in message)
        rank = found["matrix"][0] if found["matrix"] else 0
        if not (0 < rank <= n_columns and n_words >= n_words_taken(rank)):
            raise ValueError(f"a rotation of size {rank}")
        n_bytes = found.get("corrections", (0,))[0] // 8 * 8
        return {
            "message": ((message_length(n_words, rank),), True),
            "matrix": ((rank, n_rows), True),
            "signs": ((-(-rank // 64) * 8,), False),
            "corrections": ((n_bytes,), False),
        }

    @staticmethod
    def decode(record: SiteRecord, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The site's tensors, from its own parts alone."""
        *taken, (output, (n_columns, _)) = record.tensors
        corrections = parts.get("corrections", torch.empty(0, dtype=torch.uint8))
        coded = Coded(parts["message"], parts["matrix"].T, parts["signs"], corrections)
        message, matrix = decode(coded, n_columns)
        words = zip(taken, message.split([prod(shape) for _, shape in taken]), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in words} | {output: matrix.T.contiguous()}
