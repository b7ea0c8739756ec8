"""Shortcuts, whether dense or in their canonical form: `config.json` says which, as a list of ranks."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint
from freebits.errors import CheckpointError
from freebits.packed.format import SiteRecord
from freebits.symmetry import shortcut_from_factor

RANKS = "shortcut_ranks"
"""Key in `config.json`: for each site from 1 the rank of its shortcut's factor, null where the shortcut is dense."""

Shapes = Mapping[str, tuple[int, ...]]


class Shortcuts:
    """The shortcuts of a sliced model that are stored as factors.

    Attributes:
        widths: name of a factor `M: (k, r)` → (k, k', r) of the shortcut `[I - M Mᵀ, 0]`.

    Raises:
        CheckpointError: `config.json` gives ranks that cannot be.
    """

    def __init__(self, config: Mapping[str, Any], architecture: Architecture) -> None:
        sublayers = [sublayer for block in architecture.blocks for sublayer in block]
        sizes, ranks = config.get("site_sizes"), config.get(RANKS)
        ranks = [None] * len(sublayers) if ranks is None else ranks
        counts = [rank for rank in ranks if rank is not None] if isinstance(ranks, list) else ["no list"]
        if not all(type(rank) is int and rank >= 0 for rank in counts) or len(ranks) != len(sublayers):
            raise CheckpointError(f"config.json: {RANKS} is no list of the ranks of {len(sublayers)} shortcuts")
        sizes = architecture.checked_sizes(sizes)
        self.widths = {
            f"{sub.shortcut}.factor": (sizes[sub.site - 1], sizes[sub.site], rank)
            for sub, rank in zip(sublayers, ranks, strict=True)
            if rank is not None
        }

    def dense_name(self, name: str) -> str:
        """Name of the dense shortcut for that of a factor; other names as they are."""
        return f"{name.removesuffix('.factor')}.weight" if name in self.widths else name

    def dense(self, name: str, tensor: Tensor) -> Tensor:
        """The dense shortcut for a factor, float64; other tensors as they are."""
        return shortcut_from_factor(tensor, self.widths[name][1]) if name in self.widths else tensor

    def dense_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes once every shortcut is dense.

        Raises:
            CheckpointError: a factor has another shape than `config.json` says.
        """
        found = dict(shapes)
        for name, (before, after, rank) in self.widths.items():
            shape = found.pop(name, (before, 0))  # one of rank 0 need not be there
            if shape != (before, rank):
                raise CheckpointError(f"tensor {name} is missing or not of the shape {[before, rank]}")
            found[self.dense_name(name)] = (after, before)
        return found


class SlicedModel:
    """A sliced checkpoint with every shortcut dense, also where it is stored as a factor.

    Raises:
        CheckpointError: it is not what its `config.json` says.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self.path = checkpoint.path
        self._checkpoint = checkpoint
        self._shortcuts = Shortcuts(checkpoint.config, architecture)
        self._factors = {self._shortcuts.dense_name(name): name for name in self._shortcuts.widths}
        self.shapes = self._shortcuts.dense_shapes(checkpoint.shapes)
        architecture.check(self.shapes, checkpoint.config.get("site_sizes", ()))
        read = {*architecture.axes, *self._factors.values()}
        self.dtypes = {dtype for name, dtype in checkpoint.dtypes.items() if name in read}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`."""
        factor = self._factors.get(name)
        if factor is None:
            return self._checkpoint[name]
        before, _, rank = self._shortcuts.widths[factor]
        return self._shortcuts.dense(factor, self._checkpoint[factor] if rank else torch.empty(before, 0))


def shortcut_ranks(architecture: Architecture, sites: Iterable[SiteRecord]) -> dict[str, list[int | None]]:
    """What `config.json` has to say of the shortcuts that site records store as factors; nothing if there are none."""
    shapes = {name: shape for site in sites for name, shape in site.tensors}
    factors = [f"{sublayer.shortcut}.factor" for block in architecture.blocks for sublayer in block]
    ranks = [shapes[name][1] if name in shapes else None for name in factors]
    return {RANKS: ranks} if any(name in shapes for name in factors) else {}
