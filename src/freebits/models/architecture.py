"""The architecture table of a model: the role of each tensor, and the tensor's axes along the residual stream.

Norm folding turns the norms of the residual stream into bare RMS norms, which commute with rotations; a final norm
before a tied head is an exception. In a sliced model, each skip connection has a matrix, the *shortcut*. The shortcuts
divide the stream into parts, the *sites*. To rotate a site, freebits multiplies each tensor that has an axis at the
site by the same orthogonal `Q` along this axis, no matter whether the tensor writes the stream or reads it. This does
not change the function of the model (Remark 3.1 of arXiv 2410.01309). Matrices have the layout of `nn.Linear`,
`(d_out, d_in)`.

A model with `L` blocks of two sublayers has `2L + 1` sites. If attention and MLP run in parallel, they are two branches
of one sublayer, and there are `L + 1` sites. Site 0 lies before the first sublayer and site `s` after sublayer `s`,
whose shortcut joins sites `s - 1` and `s`.

If the head is tied to the token embedding, the shared matrix has axes at the first and the last site, and no rotation
fits both sites. Therefore this matrix and the final norm stay unchanged, and the last site cannot be rotated. The
embedding of a token, a vector of size `D`, is multiplied by a *factor* `(D, k)`. The product is the stream at site 0,
of width `k`.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any

from freebits.errors import CheckpointError
from freebits.limits import WIDTH
from freebits.models.families import LOW_RANKS, Branch, Family, Stack, SublayerNames, family_of

EMBEDDINGS, SHORTCUTS, HEAD = "embeddings", "shortcuts", "head"
"""Groups of tensors in size statistics. Each other tensor is counted in the group of its sublayer, such as `mlp`."""


class Role(Enum):
    """The role of a tensor."""

    EMBEDDING = "embedding"
    NORM = "norm"
    READ = "read"
    WRITE = "write"
    SHORTCUT = "shortcut"
    INNER = "inner"
    """A tensor inside a branch, without an axis along the stream."""
    FACTOR = "factor"
    """The matrix `M` in place of a shortcut `[I - M Mᵀ, 0]`, or the factor that maps a tied embedding to site 0."""
    HEAD = "head"


@dataclass(frozen=True)
class Axis:
    """Dimension `dim` of a tensor, which runs along the residual stream at site `site`."""

    dim: int
    site: int
    writes: bool = False
    """True if the tensor adds to the stream (producer), False if it reads the stream (consumer)."""


@dataclass(frozen=True)
class Weight:
    """One row of the architecture table, which describes one tensor."""

    name: str
    role: Role
    group: str
    """Group in which size statistics count the tensor."""
    axes: tuple[Axis, ...] = ()
    optional: bool = False
    """Whether a model may lack the tensor."""
    ndim: int | None = 2
    """Number of dimensions: 1 for a bias or the scale of a norm, 3 for a stack of experts, None for any number."""
    transposed: bool = False
    """Whether the dense model stores the matrix as (inputs, outputs)."""


@dataclass(frozen=True)
class Module:
    """A module and the names of its tensors, which differ for stacks of experts and for low-rank layers."""

    name: str
    stacked: bool = False
    """Whether the module is a stack of expert matrices."""
    side: str = ""
    """For a low-rank layer, the one of its two matrices that the property `weight` names: `down`, which reads the
    inputs, or `up`, which computes the outputs. Empty for any other module."""

    @property
    def weight(self) -> str:
        """The name of its matrix or, for a norm, of its scale. For a low-rank layer, `side` selects the matrix."""
        if self.side:
            return f"{self.name}.{self.side}.weight"
        return self.name if self.stacked else f"{self.name}.weight"

    @property
    def inner_weight(self) -> str:
        """The name of the matrix of a low-rank layer that `side` does not select."""
        return f"{self.name}.{'up' if self.side == 'down' else 'down'}.weight"

    @property
    def bias(self) -> str:
        """The name of its bias."""
        if self.side:
            return f"{self.name}.up.bias"
        return f"{self.name}_bias" if self.stacked else f"{self.name}.bias"

    @property
    def factor(self) -> str:
        """The name of the factor that replaces the matrix of a shortcut or follows a tied embedding."""
        return f"{self.name}.factor"


@dataclass(frozen=True)
class BoundBranch:
    """A branch of a sublayer, with the full names of its tensors."""

    names: Branch
    norm: Module
    block: str
    reads: tuple[Module, ...]
    writes: tuple[Module, ...]
    inner: tuple[str, ...]

    @classmethod
    def bind(cls, names: Branch, block: str, low_rank_layers: Container[str]) -> "BoundBranch":
        """Return the branch that `names` describes in the block called `block`."""

        def modules(relative: Iterable[str], side: str) -> Iterator[Module]:
            for name in relative:
                full_name = f"{block}.{name}"
                yield Module(full_name, isinstance(name, Stack), side if full_name in low_rank_layers else "")

        return cls(
            names=names,
            norm=Module(f"{block}.{names.norm}"),
            block=block,
            reads=tuple(modules(names.reads, "down")),
            writes=tuple(modules(names.writes, "up")),
            inner=tuple(f"{block}.{name}" for name in names.inner),
        )

    def weights(self, group: str, site: int, transposed: bool) -> Iterator[Weight]:
        """Yield the table rows of the branch's tensors, except the norm.

        Args:
            group: group in which size statistics count the tensors.
            site: site to which the branch writes; the branch reads the site before it.
            transposed: whether the dense model stores matrices as (inputs, outputs).
        """
        varies = self.names.varies
        for read in self.reads:
            axis, ndim = (Axis(2, site - 1), 3) if read.stacked else (Axis(1, site - 1), 2)
            yield Weight(read.weight, Role.READ, group, (axis,), varies, ndim, transposed and not read.side)
            if read.side:
                yield Weight(read.inner_weight, Role.INNER, group)
        for read in self.reads:
            if not read.stacked:
                yield Weight(read.bias, Role.READ, group, optional=True, ndim=1)
        for name in self.inner:
            yield Weight(name, Role.INNER, group, optional=True, ndim=None)
        for write in self.writes:
            axis, ndim = (Axis(1, site, writes=True), 3) if write.stacked else (Axis(0, site, writes=True), 2)
            if write.side:
                yield Weight(write.inner_weight, Role.INNER, group)
            yield Weight(write.weight, Role.WRITE, group, (axis,), varies, ndim, transposed and not write.side)
            if not write.stacked:
                yield Weight(write.bias, Role.WRITE, group, (Axis(0, site, writes=True),), optional=True, ndim=1)


@dataclass(frozen=True)
class Sublayer:
    """The sublayer that leads from site `site - 1` to site `site`."""

    site: int
    name: str
    """Full name of the sublayer, such as `model.layers.0.attention`."""
    group: str
    branches: tuple[BoundBranch, ...]
    shortcut: Module

    @classmethod
    def bind(cls, names: SublayerNames, block: str, site: int, low_rank_layers: Container[str]) -> "Sublayer":
        """Return the sublayer that `names` describes in the block called `block`."""
        return cls(
            site=site,
            name=f"{block}.{names.name}",
            group=names.name,
            branches=tuple(BoundBranch.bind(branch, block, low_rank_layers) for branch in names.branches),
            shortcut=Module(f"{block}.{names.shortcut}"),
        )

    @property
    def norms(self) -> tuple[Module, ...]:
        """The norms of its branches. A norm that several branches share is listed once."""
        return tuple(dict.fromkeys(branch.norm for branch in self.branches))

    @property
    def reads(self) -> tuple[Module, ...]:
        """The modules that read the stream. A model may lack some of them."""
        return tuple(read for branch in self.branches for read in branch.reads)

    def first_read(self, names: Container[str]) -> Module:
        """Return the first module that reads the stream, is not a stack, and has its matrix among `names`."""
        return next(read for read in self.reads if read.weight in names and not read.stacked)

    @property
    def write(self) -> Module:
        """The first module that writes the stream."""
        return self.branches[0].writes[0]

    def weights(self, family: Family) -> Iterator[Weight]:
        """Yield the table rows of the sublayer's tensors, in storage order."""
        before, after = Axis(1, self.site - 1), Axis(0, self.site, writes=True)
        for norm in self.norms:
            yield from _norm(norm, self.group, family.centred)
        yield Weight(self.shortcut.weight, Role.SHORTCUT, SHORTCUTS, (before, after))
        yield Weight(self.shortcut.factor, Role.FACTOR, SHORTCUTS, (Axis(0, self.site - 1),))
        for branch in self.branches:
            yield from branch.weights(self.group, self.site, family.transposed)


@dataclass(frozen=True)
class Part:
    """A part of a model that is processed as a unit: the embeddings, one block, or the head."""

    weights: Mapping[str, Weight]
    """Name → table row, for each tensor of the part."""
    sublayers: tuple[Sublayer, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A model family with the sizes of one model."""

    family: Family
    hidden_size: int
    """`D`, the width of the dense residual stream."""
    n_blocks: int
    tied: bool
    """Whether the head stays tied to the token embedding."""
    branch_scale: float = 1.0
    """Factor by which the dense blocks multiply the result of each branch."""
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The content of `config.json`."""
    low_ranks: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Name of each low-rank layer → its rank."""

    @classmethod
    def of(cls, config: Mapping[str, Any], n_tensors: int | None = None) -> "Architecture":
        """Return the architecture that a `config.json` describes.

        Args:
            config: the content of `config.json`.
            n_tensors: number of tensors of the checkpoint, used as upper limit of the number of blocks; None for no
                limit.

        Raises:
            UnsupportedModelError: see `family_of`.
            CheckpointError: a size is missing or invalid.
        """
        family = family_of(config)
        sizes = [config.get(key) for key in (family.width, family.depth)]
        if not all(type(size) is int and 0 < size < WIDTH for size in sizes):
            raise CheckpointError(
                f"config.json sets {family.width} and {family.depth} to {sizes[0]!r} and {sizes[1]!r}: "
                "give integers from 1 to 2^31 - 1"
            )
        width, depth = config[family.width], config[family.depth]
        if n_tensors is not None and depth > n_tensors:
            raise CheckpointError(
                f"config.json sets {family.depth} to {depth}, but the checkpoint has only {n_tensors} tensors: "
                "download it again"
            )
        scale = config.get(family.branch_scale, 1.0)
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise CheckpointError(f"config.json sets {family.branch_scale} to {scale!r}: give a finite number")
        tied = config.get("tie_word_embeddings", family.tied_by_default)
        ranks = config.get(LOW_RANKS) or {}
        if not isinstance(ranks, dict) or not all(type(rank) is int and 0 < rank < WIDTH for rank in ranks.values()):
            raise CheckpointError(
                f"{LOW_RANKS} in config.json does not map layers to ranks: "
                "download the file again, or restore it from a backup"
            )
        return cls(family, width, depth, tied=bool(tied), branch_scale=scale, config=config, low_ranks=ranks)

    def with_tie(self, tied: bool) -> "Architecture":
        """Return the same architecture with a tied or an untied head."""
        return replace(self, tied=tied)

    @property
    def n_sites(self) -> int:
        """The number of sites: `2L + 1` for blocks of two sublayers, `L + 1` for blocks of one."""
        return self.n_blocks * len(self.family.sublayers) + 1

    @property
    def free_sites(self) -> range:
        """The sites that can be rotated: all, except the last one if the head is tied."""
        return range(self.n_sites - self.tied)

    @cached_property
    def embedding(self) -> Module:
        """The token embedding."""
        return Module(self.family.embeddings[0])

    @cached_property
    def head(self) -> Module:
        """The output head."""
        return Module(self.family.head)

    @cached_property
    def final_norm(self) -> Module:
        """The norm before the head."""
        return Module(self.family.final_norm)

    @cached_property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All sublayers, in order. The sublayer at index `s - 1` leads to site `s`."""
        per_block = len(self.family.sublayers)
        return tuple(
            Sublayer.bind(names, f"{self.family.blocks}.{block}", block * per_block + index + 1, self.low_ranks.keys())
            for block in range(self.n_blocks)
            for index, names in enumerate(self.family.sublayers)
        )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts in forward order: the embeddings, each block, and the head. Together they have all table rows."""
        per_block = len(self.family.sublayers)
        blocks = [self.sublayers[start : start + per_block] for start in range(0, len(self.sublayers), per_block)]
        return (
            Part(_by_name(self._embeddings())),
            *(Part(_by_name(row for sub in block for row in sub.weights(self.family)), block) for block in blocks),
            Part(_by_name(self._head())),
        )

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """Name → table row, for all tensors that the dense or the sliced model may have, in forward order."""
        return {name: weight for part in self.parts for name, weight in part.weights.items()}

    @property
    def folded_norms(self) -> tuple[Module, ...]:
        """The norms that folding makes bare, in order: all norms, except the final norm if the head is tied."""
        norms = tuple(norm for sublayer in self.sublayers for norm in sublayer.norms)
        return norms if self.tied else (*norms, self.final_norm)

    def without_ignored(self, names: Iterable[str]) -> list[str]:
        """Return the given names of tensors, without the names of tensors that no model reads (`Family.ignored`)."""
        return [name for name in names if not name.endswith(self.family.ignored)]

    def _embeddings(self) -> Iterator[Weight]:
        writes = (Axis(1, 0, writes=True),)
        for module in map(Module, self.family.embeddings):
            tied = self.tied and module == self.embedding
            yield Weight(module.weight, Role.EMBEDDING, EMBEDDINGS, () if tied else writes)
            if tied:
                yield Weight(module.factor, Role.FACTOR, EMBEDDINGS, writes)

    def _head(self) -> Iterator[Weight]:
        yield from _norm(self.final_norm, HEAD, self.family.centred)
        axes = () if self.tied else (Axis(1, self.n_sites - 1),)
        yield Weight(self.head.weight, Role.HEAD, HEAD, axes, optional=self.tied)
        if self.family.head_bias or (self.family.centred and not self.tied):  # folding adds the bias of the final norm
            yield Weight(self.head.bias, Role.HEAD, HEAD, optional=True, ndim=1)


def _norm(module: Module, group: str, centred: bool) -> Iterator[Weight]:
    for name in (module.weight, module.bias) if centred else (module.weight,):
        yield Weight(name, Role.NORM, group, ndim=1)


def _by_name(weights: Iterable[Weight]) -> dict[str, Weight]:
    return {weight.name: weight for weight in weights}
