"""The layout of a model: the width of the stream at each site and the form of each shortcut."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from freebits.errors import CheckpointError
from freebits.limits import WIDTH
from freebits.models.architecture import Architecture, Role, Sublayer, Weight
from freebits.models.families import SLICED_PREFIX

WIDTHS, RANKS = "site_sizes", "shortcut_ranks"
"""Keys of the layout in `config.json`. A dense model has neither key."""
_SLICED_ROLES = (Role.SHORTCUT, Role.FACTOR)
_REPAIR = "download the file again, or restore it from a backup"


@dataclass(frozen=True)
class Layout:
    """The widths of the sites, and the ranks of the shortcuts that are stored as factors.

    Attributes:
        widths: width of each site; None for a dense model, which has no shortcuts.
        ranks: for each site except site 0, the rank of the shortcut that leads to it. The rank is `r` if the shortcut
            is stored as the factor `M: (k, r)` of `[I - M Mᵀ, 0]`, and None if the whole matrix is stored.
    """

    widths: tuple[int, ...] | None = None
    ranks: tuple[int | None, ...] = ()

    @classmethod
    def sliced(cls, architecture: Architecture, size: int) -> "Layout":
        """Return the layout of a sliced model: width `size`, or `D` at sites that have to keep the dense width."""
        last = architecture.n_sites - 1
        full = {last} | ({0} if architecture.family.keeps_width else set())
        full |= {last - 1} if any(branch.names.keeps_width for branch in architecture.sublayers[-1].branches) else set()
        widths = tuple(architecture.hidden_size if site in full else size for site in range(architecture.n_sites))
        return cls(widths, (None,) * len(architecture.sublayers))

    @classmethod
    def of(cls, config: Mapping[str, Any], architecture: Architecture) -> "Layout":
        """Return the layout that a `config.json` describes.

        Raises:
            CheckpointError: the layout does not fit the architecture.
        """
        if not str(config.get("model_type")).startswith(SLICED_PREFIX):
            return cls()
        n_sites, n_shortcuts = architecture.n_sites, architecture.n_sites - 1
        widths = _sizes(config.get(WIDTHS), n_sites)
        if widths is None or 0 in widths:
            raise CheckpointError(
                f"{WIDTHS} in config.json is not a list of {n_sites} widths, each from 1 to 2^31 - 1: {_REPAIR}"
            )
        ranks = config.get(RANKS)
        ranks = [None] * n_shortcuts if ranks is None else ranks
        if not isinstance(ranks, list) or _sizes([0 if r is None else r for r in ranks], n_shortcuts) is None:
            raise CheckpointError(
                f"{RANKS} in config.json is not a list of the ranks of {n_shortcuts} shortcuts: {_REPAIR}"
            )
        for sub, rank in zip(architecture.sublayers, ranks, strict=True):
            before, after = widths[sub.site - 1], widths[sub.site]
            if rank is not None and not rank <= before <= after:
                raise CheckpointError(
                    f"{RANKS} in config.json has rank {rank} for {sub.name}, whose shortcut maps width {before} to "
                    f"{after}: {_REPAIR}"
                )
        return cls(widths, tuple(ranks))

    def to_config(self) -> dict[str, Any]:
        """Return the layout as entries of `config.json`. Ranks are included only if a shortcut has a rank."""
        if self.widths is None:
            return {}
        ranks = {RANKS: list(self.ranks)} if any(rank is not None for rank in self.ranks) else {}
        return {WIDTHS: list(self.widths)} | ranks

    def rank(self, site: int) -> int | None:
        """Return the rank of the shortcut that leads to a site, or None if the whole matrix is stored."""
        return self.ranks[site - 1]

    def weights(self, architecture: Architecture) -> dict[str, Weight]:
        """Return name → row of the architecture table, for each tensor that a model with this layout can have."""
        if self.widths is None:
            rows = architecture.with_tie(False).weights.values()
            absent = set() if architecture.family.head_bias else {architecture.head.bias}
            dense = {
                row.name: _as_stored(row) for row in rows if row.role not in _SLICED_ROLES and row.name not in absent
            }
            head = dense[architecture.head.weight]
            return dense | {head.name: replace(head, optional=architecture.tied)}
        folded = {name for norm in architecture.folded_norms for name in (norm.weight, norm.bias)}
        forms = {name for sub in architecture.sublayers for name in (sub.shortcut.weight, sub.shortcut.factor)}
        used_forms = {self.shortcut(sub) for sub in architecture.sublayers}
        absent = folded | (forms - used_forms) | ({architecture.head.weight} if architecture.tied else set())
        return {name: weight for name, weight in architecture.weights.items() if name not in absent}

    def shortcut(self, sublayer: Sublayer) -> str:
        """Return the name of the tensor that stores the shortcut of a sublayer."""
        return sublayer.shortcut.weight if self.rank(sublayer.site) is None else sublayer.shortcut.factor

    def shapes(self, architecture: Architecture, dense: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor in a model with this layout, from the shapes in the `dense` model."""
        D, widths = architecture.hidden_size, self.widths
        if widths is None:
            return {name: dense[name] for name in self.weights(architecture) if name in dense}
        vocabulary = dense[architecture.embedding.weight][0]
        added: dict[str, tuple[int, ...]] = {architecture.embedding.factor: (D, D)}
        added |= {architecture.head.weight: (vocabulary, D), architecture.head.bias: (vocabulary,)}
        for sub in architecture.sublayers:
            added |= {sub.shortcut.weight: (D, D), sub.shortcut.factor: (D, self.rank(sub.site) or 0)}
        shapes = {}
        added |= _folded_biases(architecture, dense)
        for name, weight in self.weights(architecture).items():
            if name in dense or name in added:
                at_site = {axis.dim: widths[axis.site] for axis in weight.axes}
                shape = dense.get(name) or added[name]
                shape = shape[::-1] if weight.transposed else shape
                shapes[name] = tuple(at_site.get(dim, size) for dim, size in enumerate(shape))
        return shapes

    def check(self, shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> None:
        """Check that a checkpoint has the tensors of this layout and no others, and that their shapes fit the layout.

        Optional tensors and factors of rank 0 may be missing. Tensors that no model reads are ignored.

        Args:
            shapes: name → shape of each tensor in the checkpoint.
            architecture: architecture of the model.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape, or is unknown. Unknown tensors are refused because
                a transform would drop them.
        """
        rows = self.weights(architecture)
        widths = self.widths or (architecture.hidden_size,) * architecture.n_sites
        sublayers = architecture.sublayers if self.widths else ()
        empty = {sub.shortcut.factor for sub in sublayers if self.rank(sub.site) == 0}
        for name in sorted(n for n, row in rows.items() if not row.optional and n not in shapes and n not in empty):
            raise CheckpointError(f"tensor {name} is missing, so the checkpoint is incomplete: download it again")
        for name in architecture.without_ignored(sorted(shapes.keys() - rows.keys())):
            model_type = architecture.family.sliced_model_type if self.widths else architecture.family.model_type
            raise CheckpointError(
                f"tensor {name} is not part of a {model_type} model in the architecture table: download the checkpoint "
                "again, or pack it with `codec` none"
            )
        for name in rows.keys() & shapes.keys():
            if rows[name].ndim not in (None, len(shapes[name])):
                raise CheckpointError(
                    f"tensor {name} has shape {list(shapes[name])}, but should have {rows[name].ndim} dimensions: "
                    "download the checkpoint again"
                )
            for axis in rows[name].axes:
                if axis.dim >= len(shapes[name]) or shapes[name][axis.dim] != widths[axis.site]:
                    raise CheckpointError(
                        f"tensor {name} has shape {list(shapes[name])}: dimension {axis.dim} should be "
                        f"{widths[axis.site]}, the width of the residual stream at site {axis.site}; download the "
                        "checkpoint again"
                    )
        for sub in sublayers:
            rank, name = self.rank(sub.site), sub.shortcut.factor
            shape = (widths[sub.site - 1], rank)
            if rank is not None and shapes.get(name, (widths[sub.site - 1], 0)) != shape:
                raise CheckpointError(
                    f"tensor {name} has shape {list(shapes[name])}, but config.json requires shape {list(shape)}: "
                    "download the checkpoint again"
                )


def _as_stored(row: Weight) -> Weight:
    """Return the row with its axes numbered as in the dense model's files, which store some matrices transposed."""
    return replace(row, axes=tuple(replace(axis, dim=1 - axis.dim) for axis in row.axes)) if row.transposed else row


def _folded_biases(architecture: Architecture, dense: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the reading layers' biases, which absorb those of LayerNorms; empty without LayerNorms."""
    if not architecture.family.centred:
        return {}
    outputs = 1 if architecture.family.transposed else 0
    reads = (read for sub in architecture.sublayers for read in sub.reads)
    return {read.bias: (dense[read.weight][outputs],) for read in reads if read.weight in dense}


def _sizes(sizes: object, count: int) -> tuple[int, ...] | None:
    """Return `sizes` as a tuple, or None if they are not a list of `count` integers from 0 to 2^31 - 1."""
    if not isinstance(sizes, (list, tuple)) or len(sizes) != count:
        return None
    return tuple(sizes) if all(type(size) is int and 0 <= size < WIDTH for size in sizes) else None
