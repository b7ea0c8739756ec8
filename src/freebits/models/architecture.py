"""The table of a model: each tensor, its role, and which of its axes runs along the residual stream, at which site.

After norm folding each norm of the residual stream is a bare RMS norm, which commutes with rotations.
A *site* is a stretch of the stream between two shortcuts. An orthogonal `Q` can be inserted there without
changing the function: each tensor with an axis at the site, producer or consumer, is multiplied by `Q` along that axis
(paper, Remark 3.1, in the layout `(d_out, d_in)` in which `nn.Linear` stores its weights).

A model with `L` blocks of two sublayers has `2L + 1` sites. If attention and MLP run in parallel, they are two branches
of one sublayer, and there are `L + 1` sites. Site 0 lies before the first sublayer and site `s` after sublayer `s`,
whose shortcut joins sites `s - 1` and `s`.

If the head is tied to the token embedding, that matrix has axes at the first and the last site, and no rotation fits
both. It stays as it is, and so do the final norm and the head, which fixes the basis of the last site. A factor
`(D, k)` after the embedding leads to site 0.
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
"""Groups for size statistics; a sublayer has a group of its own name."""


class Role(Enum):
    """The role of a tensor."""

    EMBEDDING = "embedding"
    NORM = "norm"
    READ = "read"
    WRITE = "write"
    SHORTCUT = "shortcut"
    INNER = "inner"
    """Inside a branch, without an axis along the stream."""
    FACTOR = "factor"
    """`M` of a shortcut `[I - M Mᵀ, 0]`, or the matrix that maps a tied embedding to the stream."""
    HEAD = "head"


@dataclass(frozen=True)
class Axis:
    """Dimension `dim` of a tensor runs along the residual stream at `site`."""

    dim: int
    site: int
    writes: bool = False
    """True if the tensor adds to the stream (producer), False if it reads the stream (consumer)."""


@dataclass(frozen=True)
class Weight:
    """One row of the table."""

    name: str
    role: Role
    group: str
    """Group under which size statistics count it."""
    axes: tuple[Axis, ...] = ()
    optional: bool = False
    """Whether a model may lack it."""
    ndim: int | None = 2
    """Number of dimensions: 1 for a bias or the scale of a norm, 3 for a stack of experts, None for any."""
    transposed: bool = False
    """Whether the dense model stores it as (inputs, outputs)."""


@dataclass(frozen=True)
class Module:
    """The names of the tensors of a module. No other code composes them."""

    name: str
    stacked: bool = False
    """Whether it is a stack of expert matrices."""
    side: str = ""
    """For a low-rank layer, which of its two matrices has an axis along the stream: `down` reads, `up` writes."""

    @property
    def weight(self) -> str:
        """Its matrix, or the scale of a norm; for a low-rank layer the matrix that `side` names."""
        if self.side:
            return f"{self.name}.{self.side}.weight"
        return self.name if self.stacked else f"{self.name}.weight"

    @property
    def inner_weight(self) -> str:
        """The other matrix of a low-rank layer."""
        return f"{self.name}.{'up' if self.side == 'down' else 'down'}.weight"

    @property
    def bias(self) -> str:
        """Its bias."""
        if self.side:
            return f"{self.name}.up.bias"
        return f"{self.name}_bias" if self.stacked else f"{self.name}.bias"

    @property
    def factor(self) -> str:
        """The factor that replaces its matrix (shortcut) or follows it (tied embedding)."""
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
        """Return the branch `names` of the block called `block`."""

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
        """Yield the rows of its matrices and biases, for a branch that reads at `site - 1` and writes at `site`."""
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
    """Its full name, such as `model.layers.0.attention`."""
    group: str
    branches: tuple[BoundBranch, ...]
    shortcut: Module

    @classmethod
    def bind(cls, names: SublayerNames, block: str, site: int, low_rank_layers: Container[str]) -> "Sublayer":
        """Return the sublayer `names` of the block called `block`."""
        return cls(
            site=site,
            name=f"{block}.{names.name}",
            group=names.name,
            branches=tuple(BoundBranch.bind(branch, block, low_rank_layers) for branch in names.branches),
            shortcut=Module(f"{block}.{names.shortcut}"),
        )

    @property
    def norms(self) -> tuple[Module, ...]:
        """The norms of its branches; branches may share one."""
        return tuple(dict.fromkeys(branch.norm for branch in self.branches))

    @property
    def reads(self) -> tuple[Module, ...]:
        """The matrices that read the stream; a model may lack some of them."""
        return tuple(read for branch in self.branches for read in branch.reads)

    def first_read(self, names: Container[str]) -> Module:
        """Return the first matrix that reads the stream and is in `names`, the tensors of the model."""
        return next(read for read in self.reads if read.weight in names and not read.stacked)

    @property
    def write(self) -> Module:
        """The first matrix that writes the stream."""
        return self.branches[0].writes[0]

    def weights(self, family: Family) -> Iterator[Weight]:
        """Yield its rows, in storage order."""
        before, after = Axis(1, self.site - 1), Axis(0, self.site, writes=True)
        for norm in self.norms:
            yield from _norm(norm, self.group, family.centred)
        yield Weight(self.shortcut.weight, Role.SHORTCUT, SHORTCUTS, (before, after))
        yield Weight(self.shortcut.factor, Role.FACTOR, SHORTCUTS, (Axis(0, self.site - 1),))
        for branch in self.branches:
            yield from branch.weights(self.group, self.site, family.transposed)


@dataclass(frozen=True)
class Part:
    """The unit of processing: the embeddings, one block, or the head."""

    weights: Mapping[str, Weight]
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
            n_tensors: number of tensors of the checkpoint, which limits the number of blocks.

        Raises:
            UnsupportedModelError: see `family_of`.
            CheckpointError: a size is missing or invalid.
        """
        family = family_of(config)
        sizes = [config.get(key) for key in (family.width, family.depth)]
        if not all(type(size) is int and 0 < size < WIDTH for size in sizes):
            raise CheckpointError(f"config.json: {family.width}, {family.depth} are {sizes}: give positive integers")
        width, depth = config[family.width], config[family.depth]
        if n_tensors is not None and depth > n_tensors:
            raise CheckpointError(
                f"config.json: {family.depth} is {depth}, but there are {n_tensors} tensors: the checkpoint is "
                "incomplete"
            )
        scale = config.get(family.branch_scale, 1.0)
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise CheckpointError(f"config.json: {family.branch_scale} is {scale!r}: give a finite number")
        tied = config.get("tie_word_embeddings", family.tied_by_default)
        ranks = config.get(LOW_RANKS) or {}
        if not isinstance(ranks, dict) or not all(type(rank) is int and 0 < rank < WIDTH for rank in ranks.values()):
            raise CheckpointError(f"config.json: {LOW_RANKS} does not map layers to ranks: restore the file")
        return cls(family, width, depth, tied=bool(tied), branch_scale=scale, config=config, low_ranks=ranks)

    def with_tie(self, tied: bool) -> "Architecture":
        """Return the same architecture with its head tied or not."""
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
        """All sublayers, in order: index `s - 1` leads to site `s`."""
        per_block = len(self.family.sublayers)
        return tuple(
            Sublayer.bind(names, f"{self.family.blocks}.{block}", block * per_block + index + 1, self.low_ranks.keys())
            for block in range(self.n_blocks)
            for index, names in enumerate(self.family.sublayers)
        )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The embeddings, each block and the head: together all rows of the table, in forward order."""
        per_block = len(self.family.sublayers)
        blocks = [self.sublayers[start : start + per_block] for start in range(0, len(self.sublayers), per_block)]
        return (
            Part(_by_name(self._embeddings())),
            *(Part(_by_name(row for sub in block for row in sub.weights(self.family)), block) for block in blocks),
            Part(_by_name(self._head())),
        )

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """All tensors that the dense or the sliced model may have, in forward order."""
        return {name: weight for part in self.parts for name, weight in part.weights.items()}

    @property
    def folded_norms(self) -> tuple[Module, ...]:
        """The norms that become bare by folding, in order: all, except the final norm if the head is tied."""
        norms = tuple(norm for sublayer in self.sublayers for norm in sublayer.norms)
        return norms if self.tied else (*norms, self.final_norm)

    def without_ignored(self, names: Iterable[str]) -> list[str]:
        """Return the names without those that no model reads."""
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
        if self.family.head_bias or (self.family.centred and not self.tied):  # the bias of the final norm is folded in
            yield Weight(self.head.bias, Role.HEAD, HEAD, optional=True, ndim=1)


def _norm(module: Module, group: str, centred: bool) -> Iterator[Weight]:
    for name in (module.weight, module.bias) if centred else (module.weight,):
        yield Weight(name, Role.NORM, group, ndim=1)


def _by_name(weights: Iterable[Weight]) -> dict[str, Weight]:
    return {weight.name: weight for weight in weights}
