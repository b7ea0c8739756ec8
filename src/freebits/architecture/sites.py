"""The site table: which axis of which tensor runs along the residual stream, and at which site.

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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from freebits.architecture.families import Family, SublayerNames, family_of
from freebits.errors import CheckpointError


@dataclass(frozen=True)
class Axis:
    """Dimension `dim` of a stored tensor runs along the residual stream at `site`."""

    dim: int
    site: int
    writes: bool = False
    """Whether the tensor adds to the stream here (producer) or reads it (consumer)."""


@dataclass(frozen=True)
class Sublayer:
    """The sublayer that leads from site `site - 1` to site `site`; all names are full module names."""

    site: int
    norm: str
    reads: tuple[str, ...]
    write: str
    shortcut: str

    @classmethod
    def bind(cls, names: SublayerNames, block: str, site: int) -> "Sublayer":
        """The sublayer `names` of the block called `block`."""
        return cls(
            site=site,
            norm=f"{block}.{names.norm}",
            reads=tuple(f"{block}.{read}" for read in names.reads),
            write=f"{block}.{names.write}",
            shortcut=f"{block}.{names.name}_shortcut",
        )

    @property
    def prefix(self) -> str:
        """Name under which a packed checkpoint files what belongs to the whole sublayer."""
        return self.shortcut.removesuffix("_shortcut")

    @property
    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The residual axes of the sublayer's tensors, in the order in which a message holds them."""
        before, after = self.site - 1, self.site
        return {
            f"{self.shortcut}.weight": (Axis(1, before), Axis(0, after, writes=True)),
            **{f"{read}.weight": (Axis(1, before),) for read in self.reads},
            **{f"{read}.bias": () for read in self.reads},
            f"{self.write}.weight": (Axis(0, after, writes=True),),
            f"{self.write}.bias": (Axis(0, after, writes=True),),
        }


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
    def of(cls, config: Mapping[str, Any]) -> "Architecture":
        """The architecture that a `config.json` describes.

        Raises:
            UnsupportedModelError: see `family_of`.
            CheckpointError: a size is missing or senseless.
        """
        family = family_of(config)
        sizes = [config.get(key) for key in ("hidden_size", "num_hidden_layers")]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise CheckpointError(f"config.json: hidden_size, num_hidden_layers are {sizes}, not two sizes")
        tied = config.get("tie_word_embeddings", family.tied_by_default)
        return cls(family, config["hidden_size"], config["num_hidden_layers"], tied=bool(tied))

    @property
    def n_sites(self) -> int:
        """`2L + 1` for blocks of two sublayers."""
        return self.n_blocks * len(self.family.sublayers) + 1

    @cached_property
    def blocks(self) -> tuple[tuple[Sublayer, ...], ...]:
        """The sublayers of each block."""
        per_block = len(self.family.sublayers)
        return tuple(
            tuple(
                Sublayer.bind(names, f"{self.family.blocks}.{block}", site=block * per_block + index + 1)
                for index, names in enumerate(self.family.sublayers)
            )
            for block in range(self.n_blocks)
        )

    @property
    def free_sites(self) -> range:
        """The sites that can be rotated: all, but a tied head pins the last."""
        return range(self.n_sites - self.tied)

    @cached_property
    def embedding_axes(self) -> dict[str, tuple[Axis, ...]]:
        """The residual axes of the embeddings, and of the tied one's factor."""
        writes = (Axis(1, 0, writes=True),)
        axes = {f"{name}.weight": writes for name in self.family.embeddings}
        return axes | ({self.embedding: (), self.embedding_factor: writes} if self.tied else {})

    @cached_property
    def head_axes(self) -> dict[str, tuple[Axis, ...]]:
        """The residual axes of the output head; of a tied one only the final norm is stored here."""
        if self.tied:
            return dict.fromkeys(self.norm_tensors(self.family.final_norm), ())
        bias: dict[str, tuple[Axis, ...]] = {f"{self.family.head}.bias": ()} if self.family.centred else {}
        return {self.head: (Axis(1, self.n_sites - 1),), **bias}

    @cached_property
    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The site table: the residual axes of every tensor a sliced model may have, in reading order."""
        sublayers = [sublayer.axes for block in self.blocks for sublayer in block]
        return {k: v for axes in (self.embedding_axes, *sublayers, self.head_axes) for k, v in axes.items()}

    @cached_property
    def dense_axes(self) -> dict[str, tuple[Axis, ...]]:
        """The residual axes of every tensor the dense model may have, norms included."""
        norms = (name for norm in (*self._block_norms, self.family.final_norm) for name in self.norm_tensors(norm))
        shortcuts = {f"{sublayer.shortcut}.weight" for block in self.blocks for sublayer in block}
        untied = replace(self, tied=False).axes
        return {name: axes for name, axes in untied.items() if name not in shortcuts} | dict.fromkeys(norms, ())

    @property
    def embedding(self) -> str:
        """The token embedding's tensor."""
        return f"{self.family.embeddings[0]}.weight"

    @property
    def embedding_factor(self) -> str:
        """What leads from a tied embedding to site 0, (D, k)."""
        return f"{self.family.embeddings[0]}.factor"

    @property
    def head(self) -> str:
        """The head's matrix."""
        return f"{self.family.head}.weight"

    @property
    def folded_norms(self) -> tuple[str, ...]:
        """The norms of the residual stream that folding empties, in order: all, but a tied head's keeps its scale."""
        return self._block_norms if self.tied else (*self._block_norms, self.family.final_norm)

    @property
    def _block_norms(self) -> tuple[str, ...]:
        return tuple(sublayer.norm for block in self.blocks for sublayer in block)

    def norm_tensors(self, norm: str) -> tuple[str, ...]:
        """The tensors of a norm."""
        return (f"{norm}.weight", f"{norm}.bias") if self.family.centred else (f"{norm}.weight",)

    def site_sizes(self, sliced_size: int) -> tuple[int, ...]:
        """Width of the stream at each site: `sliced_size`, but the head's site keeps `D`."""
        return (*[sliced_size] * (self.n_sites - 1), self.hidden_size)

    def checked_sizes(self, sizes: object) -> Sequence[int]:
        """`site_sizes` of a `config.json`.

        Raises:
            CheckpointError: they are not the widths of this model's sites.
        """
        if isinstance(sizes, (list, tuple)) and len(sizes) == self.n_sites and all(type(n) is int for n in sizes):
            return sizes
        raise CheckpointError(f"config.json: site_sizes is not a list of the widths of {self.n_sites} sites")

    def check(self, shapes: Mapping[str, tuple[int, ...]], site_sizes: Sequence[int] | None = None) -> None:
        """Check that a checkpoint holds exactly the tensors this architecture speaks of.

        Args:
            shapes: of the checkpoint's tensors.
            site_sizes: widths of a sliced model's sites; without them the model is dense.

        Raises:
            CheckpointError: a tensor is missing, is unknown (a rotation could then miss it), or has another width.
        """
        dense = site_sizes is None
        sizes = [self.hidden_size] * self.n_sites if site_sizes is None else self.checked_sizes(site_sizes)
        known = self.dense_axes if dense else self.axes
        norms = {*self._block_norms, self.family.final_norm}
        optional = {name for name in known if name.endswith(".bias") and name.removesuffix(".bias") not in norms}
        shared = {self.head} if dense and self.tied else set()
        for name in sorted(known.keys() - optional - shared - shapes.keys()):
            raise CheckpointError(f"tensor {name} is missing: the checkpoint is incomplete")
        for name in self.without_ignored(sorted(shapes.keys() - known.keys())):
            kind = self.family.model_type if dense else self.family.sliced_model_type
            raise CheckpointError(f"tensor {name} is not part of a {kind} model as freebits knows it")
        for name in known.keys() & shapes.keys():
            for axis in known[name]:
                if axis.dim >= len(shapes[name]) or shapes[name][axis.dim] != sizes[axis.site]:
                    raise CheckpointError(
                        f"tensor {name} has shape {list(shapes[name])}: dimension {axis.dim} should be "
                        f"{sizes[axis.site]}, the width of site {axis.site}"
                    )

    def without_ignored(self, names: Iterable[str]) -> list[str]:
        """The names less those that no model reads."""
        return [name for name in names if not name.endswith(self.family.ignored)]
