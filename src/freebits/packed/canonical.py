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
from freebits.packed.plan import Block, Plan, Rotations
from freebits.symmetry import carried_rotation, polar_rotation, projection_factor, triangular_rotation

LOWER, SYMMETRIC = "lower", "symmetric"
FINEST = 1e-10
"""No spectrum is told from that of a corner more finely than this, whatever the dtype."""


class Canonical:
    """The codec."""

    threshold = None

    def rotations(self, plan: Plan, executor: ThreadPoolExecutor) -> Iterator[Rotations]:
        """Walk the chain: the decompositions are independent, only their products follow one another."""
        first = plan.architecture.blocks[0][0]

        def polar(block: Block) -> Rotations:
            shortcuts = {sub.site: plan.sliced[f"{sub.shortcut}.weight"].T for sub in block if not _obstacle(plan, sub)}
            return {site: polar_rotation(A.double()) for site, A in shortcuts.items()}

        reader = f"{first.reads[0]}.weight"
        found = {} if 0 in plan.fixed else {0: triangular_rotation(plan.sliced[reader].double())}
        yield dict(found)
        for block, factors in zip(
            plan.architecture.blocks, ordered_map(executor, polar, plan.architecture.blocks), strict=True
        ):
            for sub in block:
                if sub.site in factors:
                    before = plan.sliced.shapes[f"{sub.shortcut}.weight"][1]
                    G = found.get(sub.site - 1, torch.eye(before, dtype=torch.float64))
                    found[sub.site] = carried_rotation(G, factors[sub.site])
            yield {sub.site: found[sub.site] for sub in block if sub.site in found}
            found = {site: G for site, G in found.items() if site == block[-1].site}

    def wide(self, block: Block) -> set[str]:
        """The shortcuts: they are factored before they are rounded."""
        return {f"{sublayer.shortcut}.weight" for sublayer in block}

    def encode(self, plan: Plan, block: Block, tensors: dict[str, Tensor]) -> list[SiteRecord]:
        """Store each shortcut's factor instead of it, and a triangle less of the first matrix."""
        first = [self._encode_first(plan, sub, tensors) for sub in block if sub.site == 1]
        return first + [self._encode_shortcut(plan, sub, tensors) for sub in block]

    def _encode_first(self, plan: Plan, sub: Sublayer, tensors: dict[str, Tensor]) -> SiteRecord:
        module = sub.reads[0]
        if 0 in plan.fixed:
            return SiteRecord.plain(0, module, plan.fixed[0])
        name = f"{module}.weight"
        shape = list(tensors[name].shape)
        tensors[name] = lower_words(tensors[name])
        return SiteRecord(0, module, LOWER, [(name, shape)])

    def _encode_shortcut(self, plan: Plan, sub: Sublayer, tensors: dict[str, Tensor]) -> SiteRecord:
        name = f"{sub.shortcut}.weight"
        dense = tensors.pop(name)
        tensors[name] = dense.to(plan.dtype)
        if obstacle := _obstacle(plan, sub):
            return SiteRecord.plain(sub.site, sub.prefix, obstacle)
        after, before = dense.shape
        M = projection_factor(dense[:before], max(torch.finfo(plan.dtype).eps, FINEST))
        if M is not None:
            del tensors[name]
            factor = f"{sub.shortcut}.factor"
            tensors[factor] = lower_words(M.to(plan.dtype))
            return SiteRecord(sub.site, sub.prefix, LOWER, [(factor, list(M.shape))])
        if after == before:
            tensors[name] = lower_words(tensors[name])
            return SiteRecord(sub.site, sub.prefix, SYMMETRIC, [(name, [after, before])])
        return SiteRecord.plain(sub.site, sub.prefix, "too few singular values of its shortcut are 1")

    def part_names(self, sublayer: Sublayer) -> list[str]:
        """The factor."""
        return [f"{sublayer.shortcut}.factor"]


def _obstacle(plan: Plan, sub: Sublayer) -> str:
    """Why a site's rotation cannot be chosen; empty if it can."""
    after, before = plan.sliced.shapes[f"{sub.shortcut}.weight"]
    return plan.fixed.get(sub.site, "the stream narrows here" if after < before else "")


class TriangleSite:
    """The reader's side of a matrix of which a triangle is stored: see `freebits.packed.codecs.SiteCodec`."""

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
