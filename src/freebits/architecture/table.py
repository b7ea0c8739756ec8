"""The table of a model: every tensor, what it is for, and which of its axes runs along the residual stream, and where.

After norm folding every norm of the residual stream is a bare RMS norm, which commutes with rotations.
A *site* is a stretch of the stream between two shortcuts. There an orthogonal `Q` can be inserted for
free: every tensor with an axis at the site, producer or consumer, is multiplied by `Q` along that axis
(paper, Remark 3.1, in the layout `(d_out, d_in)` in which `nn.Linear` stores its weights).

A model with `L` blocks of two sublayers has `2L + 1` sites. Site 0 lies before the first sublayer and
site `s` after sublayer `s`; its shortcut joins sites `s - 1` and `s`.

Where the head is tied to the token embedding, that matrix cannot be rotated at one site and not at the other. It
stays as it is, and so do the final norm and the head, which pins the last site; a factor `(D, k)` after the
embedding leads to site 0.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

from freebits.architecture.families import Family, SublayerNames, family_of
from freebits.errors import CheckpointError

EMBEDDINGS, SHORTCUTS, HEAD = "embeddings", "shortcuts", "head"
"""Groups of tensors in accounts; a sublayer's own group has its name."""


class Role(Enum):
    """What a tensor is for."""

    EMBEDDING = "embedding"
    NORM = "norm"
    READ = "read"
    WRITE = "write"
    SHORTCUT = "shortcut"
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
    is_matrix: bool = True
    """Or else a vector: a bias, a norm's scale."""


@dataclass(frozen=True)
class Module:
    """A module's tensors by their names: the only place that spells them."""

    name: str

    @property
    def weight(self) -> str:
        """Its matrix, or a norm's scale."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """Its bias."""
        return f"{self.name}.bias"

    @property
    def factor(self) -> str:
        """What stands for its matrix, or follows it."""
        return f"{self.name}.factor"


@dataclass(frozen=True)
class Sublayer:
    """The sublayer that leads from site `site - 1` to site `site`."""

    site: int
    name: str
    """Under which it is filed, such as `model.layers.0.attention`."""
    group: str
    norm: Module
    reads: tuple[Module, ...]
    write: Module
    shortcut: Module
    value: Module | None = None
    """Of attention what makes the values."""

    @classmethod
    def bind(cls, names: SublayerNames, block: str, site: int) -> "Sublayer":
        """The sublayer `names` of the block called `block`."""
        return cls(
            site=site,
            name=f"{block}.{names.name}",
            group=names.name,
            norm=Module(f"{block}.{names.norm}"),
            reads=tuple(Module(f"{block}.{read}") for read in names.reads),
            write=Module(f"{block}.{names.write}"),
            shortcut=Module(f"{block}.{names.shortcut}"),
            value=Module(f"{block}.{names.value}") if names.value else None,
        )

    def weights(self, centred: bool) -> Iterator[Weight]:
        """Its rows, in the order in which a message holds them; `centred` norms have a bias."""
        before, after = Axis(1, self.site - 1), Axis(0, self.site, writes=True)
        yield from _norm(self.norm, self.group, centred)
        yield Weight(self.shortcut.weight, Role.SHORTCUT, SHORTCUTS, (before, after))
        yield Weight(self.shortcut.factor, Role.FACTOR, SHORTCUTS, (Axis(0, self.site - 1),))
        yield from (Weight(read.weight, Role.READ, self.group, (before,)) for read in self.reads)
        yield from (Weight(read.bias, Role.READ, self.group, optional=True, is_matrix=False) for read in self.reads)
        yield Weight(self.write.weight, Role.WRITE, self.group, (after,))
        yield Weight(self.write.bias, Role.WRITE, self.group, (after,), optional=True, is_matrix=False)


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
        sizes = [config.get(key) for key in ("hidden_size", "num_hidden_layers")]
        if not all(type(size) is int and 0 < size < _MOST for size in sizes):
            raise CheckpointError(f"config.json: hidden_size, num_hidden_layers are {sizes}, not two sizes")
        if n_tensors is not None and config["num_hidden_layers"] > n_tensors:
            raise CheckpointError(
                f"config.json: num_hidden_layers is {config['num_hidden_layers']}, but there are {n_tensors} tensors: "
                "the checkpoint is incomplete"
            )
        tied = config.get("tie_word_embeddings", family.tied_by_default)
        return cls(family, config["hidden_size"], config["num_hidden_layers"], tied=bool(tied))

    def with_tie(self, tied: bool) -> "Architecture":
        """The same with its head tied or not."""
        return replace(self, tied=tied)

    @property
    def n_sites(self) -> int:
        """`2L + 1` for blocks of two sublayers."""
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
            Sublayer.bind(names, f"{self.family.blocks}.{block}", site=block * per_block + index + 1)
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
            *(
                Part(_by_name(row for sub in block for row in sub.weights(self.family.centred)), block)
                for block in blocks
            ),
            Part(_by_name(self._head())),
        )

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """Every tensor that the dense or the sliced model may have, in reading order."""
        return {name: weight for part in self.parts for name, weight in part.weights.items()}

    @property
    def folded_norms(self) -> tuple[Module, ...]:
        """The norms of the residual stream that folding empties, in order: all, but a tied head's keeps its scale."""
        norms = tuple(sublayer.norm for sublayer in self.sublayers)
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
        if self.family.centred and not self.tied:  # what becomes of the norm's bias
            yield Weight(self.head.bias, Role.HEAD, HEAD, optional=True, is_matrix=False)


_MOST = 2**31


def _norm(module: Module, group: str, centred: bool) -> Iterator[Weight]:
    for name in (module.weight, module.bias) if centred else (module.weight,):
        yield Weight(name, Role.NORM, group, is_matrix=False)


def _by_name(weights: Iterable[Weight]) -> dict[str, Weight]:
    return {weight.name: weight for weight in weights}
