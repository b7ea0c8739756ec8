"""The canonical form of pairs of matrices.

The first matrix of a pair writes to one or more inner spaces, and the second reads them. Each inner space has a free
basis (see `freebits.models.free_bases`). The canonical form chooses the bases such that the first matrix contains the
rows of an identity matrix for each space.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from freebits.execution.serialization import storable
from freebits.models.architecture import Architecture, Part
from freebits.models.free_bases import Pair, Span, find_pairs
from freebits.storage.checkpoint import Source, View
from freebits.transforms.pivoting import act, pivot_bases
from freebits.transforms.transform import Dtypes, PartChange
from freebits.types import FLOATS, TensorSpec


@dataclass(frozen=True)
class DeviceView(View):
    """A view of a source with its tensors on a given device."""

    device: torch.device

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor called `name`, on the device."""
        return self.source[name].to(self.device)


_PROBES = 32
"""Number of random vectors on which the product of a pair is compared before and after rounding."""
_MAX_ERROR = 2
"""Largest accepted relative error of a rounded product, in multiples of `eps`. Errors are usually below 1 `eps`."""


@storable
@dataclass(frozen=True)
class Empty:
    """An analysis or a state without content."""


@dataclass(frozen=True)
class Pairs:
    """The transform that puts only the pairs of matrices in canonical form.

    It is used for dense models, whose stream cannot be rotated at single sites, and for adapters, which have no stream.
    """

    source: Source
    architecture: Architecture | None

    def begin(self) -> Empty:
        """Return an empty state, because parts do not depend on each other."""
        return Empty()

    def look(self, part: Part) -> Empty:  # noqa: ARG002
        """Return an empty analysis."""
        return Empty()

    def step(self, state: Empty, part: Part, analysis: Empty, following: Empty | None) -> tuple[Empty, PartChange]:  # noqa: ARG002
        """Rotate nothing, and request the tensors of the pairs in float64."""
        return state, PartChange(unrounded=frozenset(name for pair in self._pairs(part) for name in pair.names))

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:
        """Put the pairs in canonical form."""
        canonicalize_pairs(self._pairs(part), tensors, dtype)

    def _pairs(self, part: Part) -> list[Pair]:
        return free_pairs(self.source.specs, self.architecture, part, dense=True)


def free_pairs(
    specs: Mapping[str, TensorSpec], architecture: Architecture | None, part: Part, *, dense: bool
) -> list[Pair]:
    """Return the pairs in a part that consist of floats and have a basis that can be changed.

    In a sliced model, the result excludes each pair that contains the first matrix that reads the stream, because the
    canonical form keeps this matrix triangular.

    Args:
        specs: tensor specs of the model.
        architecture: the architecture of the model; None for an adapter.
        part: the part.
        dense: whether the model is dense.
    """
    shapes = {name: specs[name].shape for name in part.weights if name in specs}
    pairs = find_pairs(architecture, part, shapes, dense=dense)
    floats = {name for name in shapes if specs[name].dtype_name in FLOATS}
    triangular = set() if dense else {sub.first_read(specs).weight for sub in part.sublayers if sub.site == 1}
    return [pair for pair in pairs if floats.issuperset(pair.names) and not triangular & {*pair.names}]


def canonicalize_pairs(pairs: Iterable[Pair], tensors: dict[str, Tensor], dtype: Dtypes) -> None:
    """Put pairs in canonical form and round them, in place.

    A pair keeps its basis if it has no canonical form, or if rounding the canonical form would change the product by
    more than two `eps` of the dtype (relative, in norm).

    Args:
        pairs: the pairs.
        tensors: name → tensor. Tensors of pairs are in float64.
        dtype: name of a tensor → dtype to which the tensor is rounded.
    """
    names = {name for pair in pairs for name in pair.names}
    for pair in pairs:
        exact = {name: tensors[name].double() for name in pair.names}
        canonical = pivoted(exact, pair)
        if canonical is None:
            continue
        rounded = {name: tensor.to(dtype(name)) for name, tensor in canonical.items()}
        eps = max(torch.finfo(dtype(name)).eps for name in pair.names)
        if product_difference(exact, rounded, pair) <= _MAX_ERROR * eps:
            tensors |= canonical
    tensors |= {name: tensors[name].to(dtype(name)) for name in names}


def pivoted(exact: Mapping[str, Tensor], pair: Pair) -> dict[str, Tensor] | None:
    """Return the tensors of a pair in canonical form, float64; None if a matrix does not have full rank."""
    bases_and_pivots = pivot_bases(exact, pair)
    if bases_and_pivots is None:
        return None
    bases, pivots = bases_and_pivots
    canonical = act(exact, pair, bases)
    span = pair.writes[0]
    along = canonical[span.name].movedim(span.dim, 0)
    for [start], columns in zip(span.starts, pivots, strict=True):  # remove rounding errors from the identity
        along[start : start + pair.size, columns] = torch.eye(pair.size, dtype=along.dtype, device=along.device)
    return canonical


def product_difference(exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor], pair: Pair) -> float:
    """Return the relative difference, in norm, of a pair's exact and rounded product, estimated on random vectors."""
    generator = torch.Generator().manual_seed(0)
    writes, reads = pair.writes[0], [span for span in pair.reads if exact[span.name].ndim == 2]
    inner = exact[writes.name]
    probes = torch.randn(inner.shape[1 - writes.dim], _PROBES, generator=generator, dtype=torch.float64)
    probes = probes.to(inner.device)
    difference = total = 0.0
    for read in reads:
        before, after = (_products(tensors, writes, read, pair, probes) for tensors in (exact, rounded))
        difference += (after - before).square().sum().item()
        total += before.square().sum().item()
    return (difference / total) ** 0.5 if total else 0.0


def _products(tensors: Mapping[str, Tensor], writes: Span, read: Span, pair: Pair, probes: Tensor) -> Tensor:
    """Return the products of the two matrices and the probes, one for each place at which a space is read."""
    inner = tensors[writes.name].double().movedim(writes.dim, 0)
    outer = tensors[read.name].double().movedim(read.dim, -1)
    products = []
    for [start], read_starts in zip(writes.starts, read.starts, strict=True):
        written = inner[start : start + pair.size] @ probes
        products += [outer[:, read_start : read_start + pair.size] @ written for read_start in read_starts]
    return torch.stack(products)
