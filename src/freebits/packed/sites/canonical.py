"""Codec `canonical`: choose the rotations so that shortcuts need few words; nothing is left to decode.

See `freebits.symmetry.canonical` for the chain of rotations. The last one free, of site 0, makes the first matrix that
reads the stream lower trapezoidal.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from freebits.architecture import Sublayer
from freebits.coding import lower_matrix, lower_words, n_lower_words, symmetric_matrix
from freebits.packed.format import SiteRecord
from freebits.packed.parallel import ordered_map
from freebits.packed.sites.plan import Block, Factors, Plan, Rotations
from freebits.symmetry import Shortcut, carried_rotation, decompose, trapezoid, triangular_rotation

LOWER, SYMMETRIC = "lower", "symmetric"
FINEST = 1e-10
"""No spectrum is told from that of a corner more finely than this, whatever the dtype."""


class Canonical:
    """The codec."""

    name = "canonical"
    threshold = None

    def rotations(self, plan: Plan, executor: ThreadPoolExecutor) -> Iterator[tuple[Rotations, Factors]]:
        """Walk the chain: the decompositions are independent, only their products follow one another."""
        tolerance = max(torch.finfo(plan.dtype).eps, FINEST)

        def decomposed(block: Block) -> dict[int, Shortcut]:
            shortcuts = {sub.site: plan.sliced[_weight(sub)].double().T for sub in block if not _obstacle(plan, sub)}
            return {site: decompose(A, tolerance) for site, A in shortcuts.items()}

        blocks = plan.architecture.blocks
        reader = f"{blocks[0][0].reads[0]}.weight"
        G = torch.eye(plan.sliced.shapes[reader][1], dtype=torch.float64)
        if 0 not in plan.fixed:
            G = triangular_rotation(plan.sliced[reader].double())
        yield ({} if 0 in plan.fixed else {0: G}), {}
        for block, found in zip(blocks, ordered_map(executor, decomposed, blocks), strict=True):
            rotations: Rotations = {}
            for sub in block:
                if sub.site in found:
                    G = rotations[sub.site] = carried_rotation(G, found[sub.site].rotation)
                else:  # a new chain begins
                    G = torch.eye(plan.sliced.shapes[_weight(sub)][0], dtype=torch.float64)
            factors = {_weight(sub): found[sub.site].factor for sub in block if sub.site in found}
            yield rotations, {name: N for name, N in factors.items() if N is not None}

    def wide(self, block: Block) -> set[str]:  # noqa: ARG002
        """None: what is stored differs from the rotated tensors in its layout only."""
        return set()

    def encode(self, plan: Plan, block: Block, tensors: dict[str, Tensor], factors: Factors) -> list[SiteRecord]:
        """Store each shortcut's factor instead of it, and a triangle less of the first matrix."""
        first = [self._encode_first(plan, sub, tensors) for sub in block if sub.site == 1]
        return first + [self._encode_shortcut(plan, sub, tensors, factors.get(_weight(sub))) for sub in block]

    def _encode_first(self, plan: Plan, sub: Sublayer, tensors: dict[str, Tensor]) -> SiteRecord:
        module = sub.reads[0]
        if 0 in plan.fixed:
            return SiteRecord.plain(0, module, plan.fixed[0])
        name = f"{module}.weight"
        shape = list(tensors[name].shape)
        tensors[name] = lower_words(tensors[name])
        return SiteRecord(0, module, LOWER, [(name, shape)])

    def _encode_shortcut(
        self, plan: Plan, sub: Sublayer, tensors: dict[str, Tensor], factor: Tensor | None
    ) -> SiteRecord:
        if obstacle := _obstacle(plan, sub):
            return SiteRecord.plain(sub.site, sub.prefix, obstacle)
        if factor is not None:
            name = f"{sub.shortcut}.factor"
            tensors[name] = lower_words(trapezoid(factor).to(plan.dtype))
            return SiteRecord(sub.site, sub.prefix, LOWER, [(name, list(factor.shape))])
        name = _weight(sub)
        after, before = tensors[name].shape
        if after > before:
            return SiteRecord.plain(sub.site, sub.prefix, "too few singular values of its shortcut are 1")
        tensors[name] = lower_words(tensors[name])
        return SiteRecord(sub.site, sub.prefix, SYMMETRIC, [(name, [after, before])])

    def part_names(self, sublayer: Sublayer) -> list[str]:
        """The factor."""
        return [f"{sublayer.shortcut}.factor"]


def _weight(sub: Sublayer) -> str:
    return f"{sub.shortcut}.weight"


def _obstacle(plan: Plan, sub: Sublayer) -> str:
    """Why a site's rotation cannot be chosen; empty if it can."""
    after, before = plan.sliced.shapes[_weight(sub)]
    return plan.fixed.get(sub.site, "the stream narrows here" if after < before else "")


class TriangleSite:
    """The reader's side of a matrix of which a triangle is stored: see `freebits.packed.sites.codecs.SiteCodec`."""

    optional = ()

    @staticmethod
    def parts(record: SiteRecord) -> dict[str, str]:
        """The words are stored under the matrix's own name."""
        return {"words": record.tensors[0][0]}

    @staticmethod
    def expected(record: SiteRecord, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], bool]]:  # noqa: ARG004
        """A row of words as long as the triangle is large."""
        [(_, (rows, columns))] = record.tensors
        if record.codec == SYMMETRIC and rows != columns:
            raise ValueError(f"a symmetric matrix of {rows} x {columns}")
        return {"words": ((n_lower_words(rows, columns),), True)}

    @staticmethod
    def decode(record: SiteRecord, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The matrix."""
        [(name, (rows, columns))] = record.tensors
        return {name: lower_matrix(parts["words"], rows, columns)}


class SymmetricSite(TriangleSite):
    """The same for a symmetric matrix."""

    @staticmethod
    def decode(record: SiteRecord, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The matrix."""
        [(name, (size, _))] = record.tensors
        return {name: symmetric_matrix(parts["words"], size)}
