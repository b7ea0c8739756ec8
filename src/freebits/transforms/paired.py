"""Pairs in their canonical form: of each space, pivot columns of the matrix that writes it become the identity's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from freebits.execution.stored_values import kept
from freebits.models.pairs import Pair, Span, pairs_of
from freebits.models.table import Architecture, Part
from freebits.storage.folder import Source, View
from freebits.transforms.pivoting import act, pivot_bases
from freebits.transforms.transform import Dtypes, Turn
from freebits.types import FLOATS, TensorSpec


@dataclass(frozen=True)
class Placed(View):
    """A source seen from where its tensors are worked on."""

    device: torch.device

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, on the device."""
        return self.source[name].to(self.device)


_PROBES = 32
"""Random vectors on which a pair is compared with what it was."""
_MOST = 2
"""By so many `eps` may a product change when it is rounded; mostly it is less than one, in any basis."""


@kept
@dataclass(frozen=True)
class Nothing:
    """There is nothing to be seen of a part, or to be kept for the next."""


@dataclass(frozen=True)
class Pairs:
    """The move of a dense model, whose stream has no rotation free at single sites, and of an adapter."""

    source: Source
    architecture: Architecture | None

    def begin(self) -> Nothing:
        """Blocks do not depend on each other."""
        return Nothing()

    def look(self, part: Part) -> Nothing:  # noqa: ARG002
        """Nothing."""
        return Nothing()

    def step(self, state: Nothing, part: Part, seen: Nothing, following: Nothing | None) -> tuple[Nothing, Turn]:  # noqa: ARG002
        """No rotation; what pairs need is left in float64."""
        return state, Turn(unrounded=frozenset(name for pair in self._pairs(part) for name in pair.names))

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:
        """Turn the pairs to their canonical form."""
        turn_pairs(self._pairs(part), tensors, dtype)

    def _pairs(self, part: Part) -> list[Pair]:
        return free_pairs(self.source.specs, self.architecture, part, dense=True)


def free_pairs(
    specs: Mapping[str, TensorSpec], architecture: Architecture | None, part: Part, *, dense: bool
) -> list[Pair]:
    """A part's pairs of which another basis undoes nothing: the first matrix that reads a sliced stream is triangular.

    Args:
        specs: of the model's tensors.
        architecture: the model's; None for an adapter.
        part: the part.
        dense: whether the model is dense.
    """
    shapes = {name: specs[name].shape for name in part.weights if name in specs}
    pairs = pairs_of(architecture, part, shapes, dense=dense)
    floats = {name for name in shapes if specs[name].code in FLOATS}
    taken = set() if dense else {sub.first_read(specs).weight for sub in part.sublayers if sub.site == 1}
    return [pair for pair in pairs if floats.issuperset(pair.names) and not taken & {*pair.names}]


def turn_pairs(pairs: Iterable[Pair], tensors: dict[str, Tensor], dtype: Dtypes) -> None:
    """Put pairs in their canonical form and round them, in place.

    A pair that has no such form, or of which rounding would then change the product by more than two `eps` of its dtype
    (relative, in norm), is rounded as it is.

    Args:
        pairs: which.
        tensors: theirs among others, in float64.
        dtype: of a tensor, by name.
    """
    names = {name for pair in pairs for name in pair.names}
    for pair in pairs:
        exact = {name: tensors[name].double() for name in pair.names}
        turned = pivoted(exact, pair)
        if turned is None:
            continue
        rounded = {name: tensor.to(dtype(name)) for name, tensor in turned.items()}
        if product_difference(exact, rounded, pair) <= _MOST * max(torch.finfo(dtype(name)).eps for name in pair.names):
            tensors |= turned
    tensors |= {name: tensors[name].to(dtype(name)) for name in names}


def pivoted(exact: Mapping[str, Tensor], pair: Pair) -> dict[str, Tensor] | None:
    """A pair's tensors in its canonical form, float64; None where a matrix has not full rank."""
    found = pivot_bases(exact, pair)
    if found is None:
        return None
    bases, pivots = found
    turned = act(exact, pair, bases)
    span = pair.writes[0]
    along = turned[span.name].movedim(span.dim, 0)
    for [start], columns in zip(span.starts, pivots, strict=True):  # what is the identity but for the last bits
        along[start : start + pair.size, columns] = torch.eye(pair.size, dtype=along.dtype, device=along.device)
    return turned


def product_difference(exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor], pair: Pair) -> float:
    """By how much the products of a pair's matrices differ, of all that they are, on random vectors."""
    generator = torch.Generator().manual_seed(0)
    writes, reads = pair.writes[0], [span for span in pair.reads if exact[span.name].ndim == 2]
    inner = exact[writes.name]
    probes = torch.randn(inner.shape[1 - writes.dim], _PROBES, generator=generator, dtype=torch.float64)
    probes = probes.to(inner.device)
    changed = whole = 0.0
    for read in reads:
        before, after = (_products(of, writes, read, pair, probes) for of in (exact, rounded))
        changed += (after - before).square().sum().item()
        whole += before.square().sum().item()
    return (changed / whole) ** 0.5 if whole else 0.0


def _products(tensors: Mapping[str, Tensor], writes: Span, read: Span, pair: Pair, probes: Tensor) -> Tensor:
    """What comes of probes through each space."""
    inner = tensors[writes.name].double().movedim(writes.dim, 0)
    outer = tensors[read.name].double().movedim(read.dim, -1)
    results = []
    for [start], places in zip(writes.starts, read.starts, strict=True):
        through = inner[start : start + pair.size] @ probes
        results += [outer[:, place : place + pair.size] @ through for place in places]
    return torch.stack(results)
