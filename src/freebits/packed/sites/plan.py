"""How a sliced model is packed, whatever the codec: find rotations, rotate, encode, one block in memory at a time."""

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Protocol

import torch
from torch import Tensor

from freebits.architecture import Architecture, Axis, Sublayer
from freebits.packed.format import SiteRecord
from freebits.packed.parallel import ordered_map, workers
from freebits.packed.sites.shortcuts import SlicedModel
from freebits.packed.storage import Stored, store
from freebits.progress import Progress
from freebits.symmetry import rotate

Rotations = dict[int, Tensor]
"""Site → rotation, float64; a site without entry stays."""
Factors = dict[str, Tensor]
"""Shortcut's tensor → factor that stands for it, float64, not yet rotated."""
Block = tuple[Sublayer, ...]
Axes = Mapping[str, tuple[Axis, ...]]


class Codec(Protocol):
    """What a codec decides."""

    @property
    def name(self) -> str:
        """By which users choose it."""

    @property
    def threshold(self) -> float | None:
        """Largest error of a decoded word left without correction; None where nothing is corrected."""

    def rotations(self, plan: "Plan", executor: ThreadPoolExecutor) -> Iterator[tuple[Rotations, Factors]]:
        """The rotation of site 0, then those of each block's sites, in order, with its shortcuts' factors."""

    def wide(self, block: Block) -> set[str]:
        """The tensors that `encode` wants rotated in float64, not rounded."""

    def encode(self, plan: "Plan", block: Block, tensors: dict[str, Tensor], factors: Factors) -> list[SiteRecord]:
        """Replace a block's rotated tensors by what is stored, in place; shortcuts with a factor are not among them."""

    def part_names(self, sublayer: Sublayer) -> list[str]:
        """Tensors that may be stored for a sublayer beside those of the sliced model."""


@dataclass(frozen=True)
class Plan:
    """A sliced model about to be packed."""

    sliced: SlicedModel
    architecture: Architecture
    dtype: torch.dtype
    """Of the words."""
    fixed: Mapping[int, str]
    """Sites at which nothing can be rotated, with the reason."""

    @classmethod
    def of(cls, sliced: SlicedModel, architecture: Architecture, dtype: torch.dtype) -> "Plan":
        """The plan for a sliced checkpoint that has been checked."""
        pinned = dict.fromkeys(range(architecture.n_sites)[architecture.free_sites.stop :], "the tied head pins it")
        return cls(sliced, architecture, dtype, pinned | _unsound_sites(sliced, architecture))

    def run(
        self, codec: Codec, entropy: bool, jobs: int | None, progress: Progress
    ) -> Iterator[tuple[list[SiteRecord], dict[str, Stored]]]:
        """Site records and what to write: the embeddings, then each block's, then the head's."""
        parts = [self.architecture.embedding_axes, *map(_axes, self.architecture.blocks), self.architecture.head_axes]
        blocks: list[Block] = [(), *self.architecture.blocks, ()]

        def encoded(work: tuple[Axes, Block, Rotations, Factors]) -> tuple[list[SiteRecord], dict[str, Stored]]:
            axes, block, rotations, factors = work
            wide = codec.wide(block)
            tensors = {
                name: rotate(tensor, axes[name], rotations, torch.float64 if name in wide else self.dtype)
                for name, tensor in self.read(name for name in axes if name not in factors).items()
            }
            rotated = {name: rotate(N, (Axis(0, axes[name][0].site),), rotations) for name, N in factors.items()}
            records = codec.encode(self, block, tensors, rotated)
            return records, {name: store(tensor, entropy) for name, tensor in tensors.items()}

        with workers(jobs) as executor:
            nothing: tuple[Rotations, Factors] = ({}, {})
            found = chain([nothing], codec.rotations(self, executor), [nothing])
            work = (
                (axes, block, before | after, factors)
                for axes, block, ((before, _), (after, factors)) in zip(parts, blocks, pairwise(found), strict=True)
            )
            for done, result in enumerate(ordered_map(executor, encoded, islice(work, len(parts) - 1)), start=1):
                yield result
                progress(done, len(parts))
        for head in work:  # when nothing else is left to do, it gets every processor
            yield encoded(head)
            progress(len(parts), len(parts))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the named tensors that the sliced model has."""
        return {name: self.sliced[name] for name in names if name in self.sliced.shapes}


def _axes(block: Block) -> Axes:
    return {name: axes for sublayer in block for name, axes in sublayer.axes.items()}


def _unsound_sites(sliced: SlicedModel, architecture: Architecture) -> dict[int, str]:
    """Sites with a tensor that some rotation would take beyond its dtype, or that is not finite already."""
    unsound: dict[int, str] = {}
    for name in filter(architecture.axes.get, sliced.shapes):
        tensor, axes = sliced[name], architecture.axes[name]
        most, dims = torch.finfo(tensor.dtype).max, [axis.dim for axis in axes]
        least, largest = torch.aminmax(tensor)  # a bound on every length, and seldom the whole story
        if max(-least.item(), largest.item()) * math.sqrt(tensor.numel()) < most:
            continue
        if not (torch.linalg.vector_norm(tensor, dim=dims, dtype=torch.float64) < most).all():
            unsound |= {axis.site: f"{name} is not finite or could overflow when rotated" for axis in axes}
    return unsound
