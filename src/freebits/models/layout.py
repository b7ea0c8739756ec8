"""What `config.json` says of a model as it runs: how wide the stream is at each site, and the form of each shortcut."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from freebits.errors import CheckpointError
from freebits.limits import WIDTH
from freebits.models.families import SLICED_PREFIX
from freebits.models.table import Architecture, Role, Sublayer, Weight

WIDTHS, RANKS = "site_sizes", "shortcut_ranks"
"""Keys in `config.json`; a dense model has neither."""
_SLICED = (Role.SHORTCUT, Role.FACTOR)


@dataclass(frozen=True)
class Layout:
    """The widths of the sites, and for each shortcut the rank of its factor.

    Attributes:
        widths: one for each site; None for a dense model, which has no shortcuts.
        ranks: one for each site from 1: `r` where the shortcut is `[I - M Mᵀ, 0]` with `M: (k, r)`, None where it is a
            matrix.
    """

    widths: tuple[int, ...] | None = None
    ranks: tuple[int | None, ...] = ()

    @classmethod
    def sliced(cls, architecture: Architecture, size: int) -> "Layout":
        """Of a sliced model: `size` everywhere, but the head's site keeps `D`, and what has to be as wide as that."""
        last = architecture.n_sites - 1
        wide = {last} | ({0} if architecture.family.as_wide else set())
        wide |= {last - 1} if any(branch.names.as_wide for branch in architecture.sublayers[-1].branches) else set()
        widths = tuple(architecture.hidden_size if site in wide else size for site in range(architecture.n_sites))
        return cls(widths, (None,) * len(architecture.sublayers))

    @classmethod
    def of(cls, config: Mapping[str, Any], architecture: Architecture) -> "Layout":
        """The layout that a `config.json` tells.

        Raises:
            CheckpointError: it cannot be this model's.
        """
        if not str(config.get("model_type")).startswith(SLICED_PREFIX):
            return cls()
        n_sites, n_shortcuts = architecture.n_sites, architecture.n_sites - 1
        widths = _sizes(config.get(WIDTHS), n_sites)
        if widths is None or 0 in widths:
            raise CheckpointError(f"config.json: {WIDTHS} is not a list of the widths of {n_sites} sites")
        ranks = config.get(RANKS)
        ranks = [None] * n_shortcuts if ranks is None else ranks
        if not isinstance(ranks, list) or _sizes([0 if r is None else r for r in ranks], n_shortcuts) is None:
            raise CheckpointError(f"config.json: {RANKS} is not a list of the ranks of {n_shortcuts} shortcuts")
        for sub, rank in zip(architecture.sublayers, ranks, strict=True):
            if rank is not None and not rank <= widths[sub.site - 1] <= widths[sub.site]:
                raise CheckpointError(f"config.json: {RANKS} has {rank} for {sub.name}, more than its width allows")
        return cls(widths, tuple(ranks))

    def to_config(self) -> dict[str, Any]:
        """What `config.json` says of it; of shortcuts only if one is no matrix."""
        if self.widths is None:
            return {}
        ranks = {RANKS: list(self.ranks)} if any(rank is not None for rank in self.ranks) else {}
        return {WIDTHS: list(self.widths)} | ranks

    def rank(self, site: int) -> int | None:
        """Of the shortcut that leads to a site."""
        return self.ranks[site - 1]

    def weights(self, architecture: Architecture) -> dict[str, Weight]:
        """The rows of the table that a model of this layout has."""
        if self.widths is None:
            rows = architecture.with_tie(False).weights.values()
            made = () if architecture.family.head_bias else (architecture.head.bias,)
            ours = {row.name: _as_stored(row) for row in rows if row.role not in _SLICED and row.name not in made}
            head = ours[architecture.head.weight]
            return ours | {head.name: replace(head, optional=architecture.tied)}
        folded = {name for norm in architecture.folded_norms for name in (norm.weight, norm.bias)}
        forms = {name for sub in architecture.sublayers for name in (sub.shortcut.weight, sub.shortcut.factor)}
        kept = {self.shortcut(sub) for sub in architecture.sublayers}
        absent = folded | (forms - kept) | ({architecture.head.weight} if architecture.tied else set())
        return {name: weight for name, weight in architecture.weights.items() if name not in absent}

    def shortcut(self, sublayer: Sublayer) -> str:
        """The tensor that is a sublayer's shortcut."""
        return sublayer.shortcut.weight if self.rank(sublayer.site) is None else sublayer.shortcut.factor

    def shapes(self, architecture: Architecture, dense: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of this layout's model, from those of the dense model, biases as that has them."""
        D, widths = architecture.hidden_size, self.widths
        if widths is None:
            return {name: dense[name] for name in self.weights(architecture) if name in dense}
        vocabulary = dense[architecture.embedding.weight][0]
        made: dict[str, tuple[int, ...]] = {architecture.embedding.factor: (D, D)}
        made |= {architecture.head.weight: (vocabulary, D), architecture.head.bias: (vocabulary,)}
        for sub in architecture.sublayers:
            made |= {sub.shortcut.weight: (D, D), sub.shortcut.factor: (D, self.rank(sub.site) or 0)}
        shapes = {}
        made |= _biases(architecture, dense)
        for name, weight in self.weights(architecture).items():
            if name in dense or name in made:
                at_site = {axis.dim: widths[axis.site] for axis in weight.axes}
                shape = dense.get(name) or made[name]
                shape = shape[::-1] if weight.transposed else shape
                shapes[name] = tuple(at_site.get(dim, size) for dim, size in enumerate(shape))
        return shapes

    def check(self, shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> None:
        """Check that a checkpoint holds exactly the tensors of this layout, of its widths.

        Raises:
            CheckpointError: a tensor is missing, is unknown (a rotation could then miss it), or has another width.
        """
        rows = self.weights(architecture)
        widths = self.widths or (architecture.hidden_size,) * architecture.n_sites
        sublayers = architecture.sublayers if self.widths else ()
        empty = {sub.shortcut.factor for sub in sublayers if self.rank(sub.site) == 0}
        for name in sorted(n for n, row in rows.items() if not row.optional and n not in shapes and n not in empty):
            raise CheckpointError(f"tensor {name} is missing: the checkpoint is incomplete")
        for name in architecture.without_ignored(sorted(shapes.keys() - rows.keys())):
            spec = architecture.family.sliced_model_type if self.widths else architecture.family.model_type
            raise CheckpointError(f"tensor {name} is not part of a {spec} model as freebits knows it")
        for name in rows.keys() & shapes.keys():
            if rows[name].ndim not in (None, len(shapes[name])):
                raise CheckpointError(f"tensor {name} has shape {list(shapes[name])}, another number of dimensions")
            for axis in rows[name].axes:
                if axis.dim >= len(shapes[name]) or shapes[name][axis.dim] != widths[axis.site]:
                    raise CheckpointError(
                        f"tensor {name} has shape {list(shapes[name])}: dimension {axis.dim} should be "
                        f"{widths[axis.site]}, the width of site {axis.site}"
                    )
        for sub in sublayers:
            rank, name = self.rank(sub.site), sub.shortcut.factor
            if rank is not None and shapes.get(name, (widths[sub.site - 1], 0)) != (widths[sub.site - 1], rank):
                raise CheckpointError(f"tensor {name} is not of the shape {[widths[sub.site - 1], rank]}")


def _as_stored(row: Weight) -> Weight:
    """A row as the dense model stores its matrix."""
    return replace(row, axes=tuple(replace(axis, dim=1 - axis.dim) for axis in row.axes)) if row.transposed else row


def _biases(architecture: Architecture, dense: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The biases that become of LayerNorms' biases, where the dense model's matrices have none."""
    if not architecture.family.centred:
        return {}
    outputs = 1 if architecture.family.transposed else 0
    reads = (read for sub in architecture.sublayers for read in sub.reads)
    return {read.bias: (dense[read.weight][outputs],) for read in reads if read.weight in dense}


def _sizes(sizes: object, count: int) -> tuple[int, ...] | None:
    """A list of so many sizes; None if it is none."""
    if not isinstance(sizes, (list, tuple)) or len(sizes) != count:
        return None
    return tuple(sizes) if all(type(size) is int and 0 <= size < WIDTH for size in sizes) else None
