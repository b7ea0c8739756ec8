"""What is known of each matrix of a checkpoint, kept in a work store until the matrix is rounded."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from freebits.calibration.sensitivities import InputStatistics
from freebits.codecs.arrangement import TRANSPOSED
from freebits.codecs.hadamard import rotated
from freebits.errors import CheckpointError
from freebits.execution.stored_values import kept
from freebits.execution.work_store import Work, WorkStore
from freebits.options import HADAMARD
from freebits.packed.recipe import Recipe
from freebits.quantization.error_compensation import inverse_factor
from freebits.quantization.rate_control import RateModel
from freebits.quantization.scales import DAMPING, row_scales, typical_scales
from freebits.storage.folder import Source
from freebits.types import FLOATS, TensorSpec

JOINED = "joined"
_PIECE = 1 << 24
"""Weights of a matrix above which it is rounded and coded in several pieces of so many, row by row."""


@kept
@dataclass(frozen=True)
class Factor:
    """What is known of the inputs of some matrices.

    Attributes:
        key: of `U` in the store.
        diagonal: of `U`, (inputs,), float32.
    """

    key: str
    diagonal: Tensor


@kept
@dataclass(frozen=True)
class Matrix:
    """A matrix of a checkpoint: some rows of a tensor, which is seen as (rows, width).

    Attributes:
        tensor: name in the checkpoint.
        start: its first row.
        stop: the row after its last.
        transposed: whether it is stored as (inputs, outputs).
        factor: of its inputs; None where nothing is known but the weights.
        information: mean squared gradient at each of its outputs, (outputs,), float64; None likewise.
        width: how many weights a row has, if not as many as the tensor's last dimension.
    """

    tensor: str
    start: int
    stop: int
    transposed: bool
    factor: Factor | None
    information: Tensor | None
    width: int | None = None

    def pieces(self, width: int) -> Iterator["Matrix"]:
        """The matrix in pieces that are small enough to be rounded in little memory, of tensors of a width."""
        step = max(1, _PIECE // width)
        if self.transposed or self.stop - self.start <= step:
            yield self
            return
        for start in range(self.start, self.stop, step):
            stop = min(start + step, self.stop)
            information = self.information
            if information is not None:
                information = information[start - self.start : stop - self.start].clone()
            yield replace(self, start=start, stop=stop, information=information)


@kept
@dataclass(frozen=True)
class Known:
    """The relative scales of a matrix's rows and columns, and the counts of its budget."""

    rows: Tensor
    columns: Tensor
    counts: Tensor


class SensitivityCache:
    """What is known of each matrix, by names: that of the tensor, or `name[first row:row after the last]`.

    Attributes:
        matrices: what each is.
        rate_models: of each.
        seed: of the rotation in which matrices are rounded; None for none.

    Args:
        work: who computes what is derived, and where it is kept.
        source: the checkpoint.
        seed: see above.
    """

    def __init__(self, work: Work, source: Source, seed: int | None) -> None:
        self.matrices: dict[str, Matrix] = {}
        self.rate_models: dict[str, RateModel] = {}
        self.seed = seed
        self._work = work
        self._source = _LastRead(source)
        self._scales: dict[str, tuple[Tensor, Tensor]] = {}
        self._last: tuple[str, Tensor] = "", torch.empty(0)

    def add(self, matrices: Iterable[Matrix]) -> None:
        """Take in what was measured of matrices.

        Raises:
            CheckpointError: a weight is not finite.
        """
        for matrix in matrices:
            shape = self._source.specs[matrix.tensor].shape
            for piece in matrix.pieces(matrix.width or shape[-1]):
                whole = len(shape) == 2 and (piece.start, piece.stop) == (0, shape[0])
                self.matrices[piece.tensor if whole else f"{piece.tensor}[{piece.start}:{piece.stop}]"] = piece
        known = self._work.map("known", partial(_known, self._source, self.seed), self.matrices.values())
        for name, of in zip(self.matrices, known, strict=True):
            self._scales[name] = of.rows, of.columns
            self.rate_models[name] = RateModel(of.counts.numpy())

    def only(self, names: Collection[str]) -> "SensitivityCache":
        """The same for the matrices of some tensors."""
        some = copy(self)
        some.rate_models = {
            name: budget for name, budget in self.rate_models.items() if self.matrices[name].tensor in names
        }
        return some

    @property
    def tensors(self) -> dict[str, list[str]]:
        """The tensors that are rounded as a whole, and the names of their matrices, from the first row to the last."""
        found: dict[str, list[str]] = {}
        for name in self.rate_models:
            found.setdefault(self.matrices[name].tensor, []).append(name)
        return {tensor: sorted(names, key=lambda name: self.matrices[name].start) for tensor, names in found.items()}

    @property
    def n_weights(self) -> int:
        """How many weights all matrices have."""
        return sum(self.spec(name).numel for name in self.rate_models)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a matrix as it is stored."""
        matrix = self.matrices[name]
        of = self._source.specs[matrix.tensor]
        return TensorSpec(of.code, (matrix.stop - matrix.start, matrix.width or of.shape[-1]))

    def known(self, name: str) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of a matrix `U`, and the relative scales of its rows and columns."""
        factor, last = self.matrices[name].factor, self._last
        if factor is None:
            return None, *self._scales[name]
        if last[0] != factor.key:
            self._last = last = factor.key, self._work.store.get(f"U-{factor.key}")
        return last[1], *self._scales[name]

    def matrix(self, name: str) -> Tensor:
        """A matrix as it is rounded."""
        return _matrix(self._source, self.seed, self.matrices[name])

    def recipes(self, names: Collection[str]) -> tuple[dict[str, TensorSpec], tuple[Recipe, ...]]:
        """What is rounded in the place of matrices, and how they are made of it."""
        recipes: list[Recipe] = []
        rounded: dict[str, TensorSpec] = {}
        for name in names:
            now, of = name, self.spec(name)
            if self.matrices[name].transposed:
                stored, now, of = {name: of}, f"{name}.transposed", TensorSpec(of.code, of.shape[::-1])
                recipes.append(Recipe(TRANSPOSED, {TRANSPOSED: now}, stored))
            if self.seed is not None:
                turned = TensorSpec("F32", of.shape)
                recipes.append(Recipe(HADAMARD, {"rotated": f"{now}.rotated"}, {now: of}, {"seed": self.seed}))
                now, of = f"{now}.rotated", turned
            rounded[now] = of
        return rounded, tuple(reversed(recipes))

    def joining(self, tensor: str, names: Collection[str]) -> tuple[Recipe, ...]:
        """How a tensor is made of its matrices; nothing where it is one."""
        if [*names] == [tensor]:
            return ()
        takes = {str(number): name for number, name in enumerate(names)}
        rows = [self.matrices[name].stop - self.matrices[name].start for name in names]
        return (Recipe(JOINED, takes, {tensor: self._source.specs[tensor]}, {"rows": rows}),)


class _LastRead:
    """A source that keeps the tensor that was read last, as a tensor may be read for each of its matrices."""

    def __init__(self, source: Source) -> None:
        self.specs, self.config = source.specs, source.config
        self._source = source
        self._last: tuple[str, Tensor] = "", torch.empty(0)

    def __getitem__(self, name: str) -> Tensor:
        last = self._last
        if last[0] != name:
            self._last = last = name, self._source[name]
        return last[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return _LastRead, (self._source,)


def whole_tensors(matrices: Iterable[Matrix], source: Source) -> list[Matrix]:
    """The matrices of those tensors that are matrices as a whole, each row in one of them."""
    by_tensor: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        by_tensor.setdefault(matrix.tensor, []).append(matrix)
    found = []
    for tensor, of in by_tensor.items():
        spec = source.specs[tensor]
        of.sort(key=lambda matrix: (matrix.start, -matrix.stop))
        ends = [0, *(matrix.stop for matrix in of)]
        meet = all(matrix.start == end for matrix, end in zip(of, ends, strict=False))
        if spec.code in FLOATS and len(spec.shape) > 1 and meet and ends[-1] == prod(spec.shape[:-1]):
            found += of
    return found


def factor_of(store: WorkStore, seed: int | None, inputs: InputStatistics) -> Factor:
    """Put the factor of inputs into a store.

    Raises:
        CheckpointError: the inputs are not finite.
    """
    if not inputs.gram.isfinite().all():
        raise CheckpointError(
            f"what {inputs.regions[0].name} reads is not finite: the model overflows, or its weights are damaged"
        )
    U = inverse_factor(inputs.gram if seed is None else rotated(inputs.gram, seed), DAMPING)
    store.put(f"U-{inputs.key}", U)
    return Factor(inputs.key, U.diagonal().clone())


def _known(source: Source, seed: int | None, matrix: Matrix) -> Known:
    """What is derived from a matrix's weights."""
    information = matrix.information
    if information is not None and not information.isfinite().all():
        raise CheckpointError(f"what {matrix.tensor} leads to is not finite: the model overflows or is damaged")
    W = _matrix(source, None, matrix)
    if not W.isfinite().all():
        n = int((~W.isfinite()).sum())
        raise CheckpointError(
            f"tensor {matrix.tensor} has {n} weights that are NaN or infinite: they cannot be rounded; set them to "
            "zero, or keep every bit with --lossless"
        )
    if seed is not None:  # a rotation spreads over all rows what is known of each
        W = rotated(W, seed)
        information = None if information is None else information.mean().expand(len(information))
    if matrix.factor is None or information is None:
        rows, columns = typical_scales(W)
    else:
        rows, columns = row_scales(information), matrix.factor.diagonal
    return Known(rows, columns, torch.from_numpy(RateModel.of(W, rows, columns).counts))


def _matrix(source: Source, seed: int | None, matrix: Matrix) -> Tensor:
    tensor = source[matrix.tensor]
    W = tensor.reshape(-1, matrix.width or tensor.shape[-1])[matrix.start : matrix.stop]
    W = W.T if matrix.transposed else W
    return W if seed is None else rotated(W, seed)


def grouped(
    matrices: Mapping[str, list[str]], n_weights: Mapping[str, int], together: int, order: Mapping[str, tuple[int, ...]]
) -> list[list[str]]:
    """Matrices that are coded together, in an order of their tensors.

    Args:
        matrices: tensor → its matrices.
        n_weights: of each matrix.
        together: how many weights a group has at least, where a block has as many.
        order: tensor → the numbers in its name; those of one block begin alike.
    """
    groups: list[list[str]] = []
    size, block = together, None
    for tensor in sorted(matrices, key=lambda tensor: (bool(order[tensor]), order[tensor])):
        for number, name in enumerate(matrices[tensor]):
            begins = number == 0 and (len(matrices[tensor]) > 1 or order[tensor][:1] != block)
            if begins or size >= together:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += n_weights[name]
        block = order[tensor][:1] if len(matrices[tensor]) == 1 else None
    return groups
