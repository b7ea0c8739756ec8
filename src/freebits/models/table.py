"""The table of a model: every tensor, what it is for, and which of its axes runs along the residual stream, and where.

After norm folding every norm of the residual stream is a bare RMS norm, which commutes with rotations.
A *site* is a stretch of the stream between two shortcuts. There an orthogonal `Q` can be inserted for
free: every tensor with an axis at the site, producer or consumer, is multiplied by `Q` along that axis
(paper, Remark 3.1, in the layout `(d_out, d_in)` in which `nn.Linear` stores its weights).

A model with `L` blocks of two sublayers has `2L + 1` sites; where attention and MLP run side by side, they are the
two branches of one sublayer, and there are `L + 1`. Site 0 lies before the first sublayer and
site `s` after sublayer `s`; its shortcut joins sites `s - 1` and `s`.

Where the head is tied to the token embedding, that matrix cannot be rotated at one site and not at the other. It
stays as it is, and so do the final norm and the head, which pins the last site; a factor `(D, k)` after the
embedding leads to site 0.
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
"""Groups of tensors in accounts; a sublayer's own group has its name."""


class Role(Enum):
    """What a tensor is for."""

    EMBEDDING = "embedding"
    NORM = "norm"
    READ = "read"
    WRITE = "write"
    SHORTCUT = "shortcut"
    INNER = "inner"
    """Inside a branch, where the stream never comes."""
    FACTOR = "factor"
    """Of a shortcut `[I - M Mᵀ, 0]` the `M`, of a tied embedding what leads from it to the stream."""
    HEAD = "head"


@dataclass(frozen=True)
class Axis:
    """Dimension `dim` of a tensor runs along the residual stream at `site`."""

    dim: int
    site: int
    writes: bool = False
    """Whether the tensor adds to the stream here (producer) or reads it (consumer)."""


@dataclass(frozen=True)
class Weight:
    """One row of the table."""

    name: str
    role: Role
    group: str
    """Under which an account counts it."""
    axes: tuple[Axis, ...] = ()
    optional: bool = False
    """Whether a model may do without it."""
    ndim: int | None = 2
    """How many dimensions it has: one of a bias or a norm's scale, three of a stack of experts; None for any."""
    transposed: bool = False
    """Whether the dense model stores it as (inputs, outputs)."""


@dataclass(frozen=True)
class Module:
    """A module's tensors by their names: the only place that spells them."""

    name: str
    stacked: bool = False
    """Whether it is a stack of experts' matrices."""
    side: str = ""
    """Of a layer of low rank, which is two, the one that meets the stream: `down` reads it, `up` writes it."""

    @property
    def weight(self) -> str:
        """Its matrix, or a norm's scale; of a layer of low rank the matrix that meets the stream."""
        if self.side:
            return f"{self.name}.{self.side}.weight"
        return self.name if self.stacked else f"{self.name}.weight"

    @property
    def other(self) -> str:
        """The other matrix of a layer of low rank."""
        return f"{self.name}.{'up' if self.side == 'down' else 'down'}.weight"

    @property
    def bias(self) -> str:
        """Its bias."""
        if self.side:
            return f"{self.name}.up.bias"
        return f"{self.name}_bias" if self.stacked else f"{self.name}.bias"

    @property
    def factor(self) -> str:
        """What stands for its matrix, or follows it."""
        return f"{self.name}.factor"


@dataclass(frozen=True)
class BoundBranch:
    """A branch of a sublayer, with the names of its tensors in the model."""

    names: Branch
    norm: Module
    block: str
    reads: tuple[Module, ...]
    writes: tuple[Module, ...]
    inner: tuple[str, ...]

    @classmethod
    def bind(cls, names: Branch, block: str, thin: Container[str]) -> "BoundBranch":
        """The branch `names` of the block called `block`; `thin` are the model's layers of low rank."""

        def modules(relative: Iterable[str], side: str) -> Iterator[Module]:
            for name in relative:
                full = f"{block}.{name}"
                yield Module(full, isinstance(name, Stack), side if full in thin else "")

        return cls(
            names=names,
            norm=Module(f"{block}.{names.norm}"),
            block=block,
            reads=tuple(modules(names.reads, "down")),
            writes=tuple(modules(names.writes, "up")),
            inner=tuple(f"{block}.{name}" for name in names.inner),
        )

    def weights(self, group: str, site: int, transposed: bool) -> Iterator[Weight]:
        """The rows of its matrices and biases, for a branch that reads at `site - 1` and writes at `site`."""
        varies = self.names.varies
        for read in self.reads:
            axis, ndim = (Axis(2, site - 1), 3) if read.stacked else (Axis(1, site - 1), 2)
            yield Weight(read.weight, Role.READ, group, (axis,), varies, ndim, transposed and not read.side)
            if read.side:
                yield Weight(read.other, Role.INNER, group)
        for read in self.reads:
            if not read.stacked:
                yield Weight(read.bias, Role.READ, group, optional=True, ndim=1)
        for name in self.inner:
            yield Weight(name, Role.INNER, group, optional=True, ndim=None)
        for write in self.writes:
            axis, ndim = (Axis(1, site, writes=True), 3) if write.stacked else (Axis(0, site, writes=True), 2)
            if write.side:
                yield Weight(write.other, Role.INNER, group)
            yield Weight(write.weight, Role.WRITE, group, (axis,), varies, ndim, transposed and not write.side)
            if not write.stacked:
                yield Weight(write.bias, Role.WRITE, group, (Axis(0, site, writes=True),), optional=True, ndim=1)


@dataclass(frozen=True)
class Sublayer:
    """The sublayer that leads from site `site - 1` to site `site`."""

    site: int
    name: str
    """Under which it is filed, such as `model.layers.0.attention`."""
    group: str
    branches: tuple[BoundBranch, ...]
    shortcut: Module

    @classmethod
    def bind(cls, names: SublayerNames, block: str, site: int, thin: Container[str]) -> "Sublayer":
        """The sublayer `names` of the block called `block`; `thin` are the model's layers of low rank."""
        return cls(
            site=site,
            name=f"{block}.{names.name}",
            group=names.name,
            branches=tuple(BoundBranch.bind(branch, block, thin) for branch in names.branches),
            shortcut=Module(f"{block}.{names.shortcut}"),
        )

    @property
    def norms(self) -> tuple[Module, ...]:
        """Of its branches, which may share one."""
        return tuple(dict.fromkeys(branch.norm for branch in self.branches))

    @property
    def reads(self) -> tuple[Module, ...]:
        """The matrices that read the stream; a model may lack some of them."""
        return tuple(read for branch in self.branches for read in branch.reads)

    def first_read(self, names: Container[str]) -> Module:
        """The first of the matrices that read the stream, of a model with tensors of these names."""
        return next(read for read in self.reads if read.weight in names and not read.stacked)

    @property
    def write(self) -> Module:
        """The first of the matrices that write the stream."""
        return self.branches[0].writes[0]

    def weights(self, family: Family) -> Iterator[Weight]:
        """Its rows, in the order in which a message holds them."""
        before, after = Axis(1, self.site - 1), Axis(0, self.site, writes=True)
        for norm in self.norms:
            yield from _norm(norm, self.group, family.centred)
        yield Weight(self.shortcut.weight, Role.SHORTCUT, SHORTCUTS, (before, after))
        yield Weight(self.shortcut.factor, Role.FACTOR, SHORTCUTS, (Axis(0, self.site - 1),))
        for branch in self.branches:
            yield from branch.weights(self.group, self.site, family.transposed)


@dataclass(frozen=True)
class Part:
    """What is worked on at once: the embeddings, one block, or the head."""

    weights: Mapping[str, Weight]
    sublayers: tuple[Sublayer, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A model's family, bound to its sizes."""

    family: Family
    hidden_size: int
    """`D`, the width of the dense residual stream."""
    n_blocks: int
    tied: bool
    """Whether the head is the token embedding, and stays it."""
    branch_scale: float = 1.0
    """What the dense blocks multiply each branch's result by."""
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What `config.json` says."""
    low_ranks: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    """The layers of low rank, and the rank of each."""

    @classmethod
    def of(cls, config: Mapping[str, Any], n_tensors: int | None = None) -> "Architecture":
        """The architecture that a `config.json` describes.

        Args:
            config: the content of `config.json`.
            n_tensors: of the checkpoint; no config may ask for more blocks than there are tensors.

        Raises:
            UnsupportedModelError: see `family_of`.
            CheckpointError: a size is missing or senseless.
        """
        family = family_of(config)
        sizes = [config.get(key) for key in (family.width, family.depth)]
        if not all(type(size) is int and 0 < size < WIDTH for size in sizes):
            raise CheckpointError(f"config.json: {family.width}, {family.depth} are {sizes}, not two sizes")
        width, depth = config[family.width], config[family.depth]
        if n_tensors is not None and depth > n_tensors:
            raise CheckpointError(
                f"config.json: {family.depth} is {depth}, but there are {n_tensors} tensors: the checkpoint is "
                "incomplete"
            )
        scale = config.get(family.branch_scale, 1.0)
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise CheckpointError(f"config.json: {family.branch_scale} is {scale!r}, not a number")
        tied = config.get("tie_word_embeddings", family.tied_by_default)
        ranks = config.get(LOW_RANKS) or {}
        if not isinstance(ranks, dict) or not all(type(rank) is int and 0 < rank < WIDTH for rank in ranks.values()):
            raise CheckpointError(f"config.json: {LOW_RANKS} is no table of ranks")
        return cls(family, width, depth, tied=bool(tied), branch_scale=scale, config=config, low_ranks=ranks)

    def with_tie(self, tied: bool) -> "Architecture":
        """The same with its head tied or not."""
        return replace(self, tied=tied)

    @property
    def n_sites(self) -> int:
        """`2L + 1` for blocks of two sublayers, `L + 1` for parallel ones."""
        return self.n_blocks * len(self.family.sublayers) + 1

    @property
    def free_sites(self) -> range:
        """The sites that can be rotated: all, but a tied head pins the last."""
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
        """All of them, in order: the one that leads to site `s` is number `s - 1`."""
        per_block = len(self.family.sublayers)
        return tuple(
            Sublayer.bind(names, f"{self.family.blocks}.{block}", block * per_block + index + 1, self.low_ranks.keys())
            for block in range(self.n_blocks)
            for index, names in enumerate(self.family.sublayers)
        )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The embeddings, each block, the head: together every row of the table, in reading order."""
        per_block = len(self.family.sublayers)
        blocks = [self.sublayers[at : at + per_block] for at in range(0, len(self.sublayers), per_block)]
        return (
            Part(_by_name(self._embeddings())),
            *(Part(_by_name(row for sub in block for row in sub.weights(self.family)), block) for block in blocks),
            Part(_by_name(self._head())),
        )

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """Every tensor that the dense or the sliced model may have, in reading order."""
        return {name: weight for part in self.parts for name, weight in part.weights.items()}

    @property
    def folded_norms(self) -> tuple[Module, ...]:
        """The norms of the residual stream that folding empties, in order: all, but a tied head's keeps its scale."""
        norms = tuple(norm for sublayer in self.sublayers for norm in sublayer.norms)
        return norms if self.tied else (*norms, self.final_norm)

    def without_ignored(self, names: Iterable[str]) -> list[str]:
        """The names less those that no model reads."""
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
        if self.family.head_bias or (self.family.centred and not self.tied):  # what becomes of the norm's bias
            yield Weight(self.head.bias, Role.HEAD, HEAD, optional=True, ndim=1)


def _norm(module: Module, group: str, centred: bool) -> Iterator[Weight]:
    for name in (module.weight, module.bias) if centred else (module.weight,):
        yield Weight(name, Role.NORM, group, ndim=1)


def _by_name(weights: Iterable[Weight]) -> dict[str, Weight]:
    return {weight.name: weight for weight in weights}
