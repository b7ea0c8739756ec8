"""Keep the measurements of each matrix of a checkpoint in a work store until the matrix is rounded."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from freebits.calibration.sensitivities import InputStatistics
from freebits.codecs.hadamard import hadamard_params, rotated
from freebits.codecs.rearranging import TRANSPOSED
from freebits.errors import CheckpointError
from freebits.execution.serialization import storable
from freebits.execution.work_store import Work, WorkStore
from freebits.options import HADAMARD
from freebits.packed.recipe import Recipe
from freebits.quantization.error_compensation import inverse_factor
from freebits.quantization.rate_control import RateModel
from freebits.quantization.scales import DAMPING, row_scales, typical_scales
from freebits.storage.checkpoint import Source
from freebits.types import FLOATS, TensorSpec

JOINED = "joined"
_MAX_WEIGHTS = 1 << 24
"""A matrix with more weights than this is split by rows into pieces, which are rounded and encoded separately. A matrix
that is stored transposed is not split."""


@storable
@dataclass(frozen=True)
class Factor:
    """The inverse-Hessian Cholesky factor `U` of the inputs of some matrices.

    Attributes:
        key: unique name of the inputs; the key of `U` in the work store is `U-` followed by this name.
        diagonal: diagonal of `U`, (inputs,), float32.
    """

    key: str
    diagonal: Tensor


@storable
@dataclass(frozen=True)
class Matrix:
    """A matrix of a checkpoint. It consists of consecutive rows of a tensor, which is viewed as (rows, width).

    Attributes:
        tensor: name of the tensor in the checkpoint.
        start: first row of the matrix.
        stop: row after the last row of the matrix.
        transposed: whether the matrix is stored as (inputs, outputs).
        factor: inverse-Hessian Cholesky factor of the matrix's inputs; None without calibration.
        information: Fisher information, the mean squared gradient at each output, (outputs,), float64; None without
            calibration.
        width: number of weights per row; None stands for the tensor's last dimension.
    """

    tensor: str
    start: int
    stop: int
    transposed: bool
    factor: Factor | None
    information: Tensor | None
    width: int | None = None

    def pieces(self, width: int) -> Iterator["Matrix"]:
        """Yield the matrix in pieces that take little memory to round, or whole if it is stored transposed.

        Args:
            width: number of weights per row.
        """
        n_rows = max(1, _MAX_WEIGHTS // width)
        if self.transposed or self.stop - self.start <= n_rows:
            yield self
            return
        for start in range(self.start, self.stop, n_rows):
            stop = min(start + n_rows, self.stop)
            information = self.information
            if information is not None:
                information = information[start - self.start : stop - self.start].clone()
            yield replace(self, start=start, stop=stop, information=information)


@storable
@dataclass(frozen=True)
class MatrixScales:
    """The relative scales of a matrix's rows and columns, and the counts of the matrix's rate model."""

    rows: Tensor
    columns: Tensor
    counts: Tensor


class SensitivityCache:
    """The measurements of each matrix, by name.

    A matrix that is a whole tensor has the name of the tensor. Otherwise the name is `tensor[start:stop]`, with the
    first row and the row after the last row.

    Attributes:
        matrices: name → matrix.
        rate_models: name → rate model.
        seed: seed of the rotation that is applied to matrices before rounding; None for no rotation.

    Args:
        work: executor and work store for the scales and rate models.
        source: tensors of the checkpoint.
        seed: seed of the rotation, see the attribute.
        base: tensors of the base to which tensors of `source` will be added, by name; None if there are none.
    """

    def __init__(self, work: Work, source: Source, seed: int | None, base: Mapping[str, Tensor] | None = None) -> None:
        self.matrices: dict[str, Matrix] = {}
        self.rate_models: dict[str, RateModel] = {}
        self.seed = seed
        self._work = work
        self._source = _LastTensorSource(source)
        self._base: Mapping[str, Tensor] = base or {}
        self._scales: dict[str, tuple[Tensor, Tensor]] = {}
        self._last_factor: tuple[str, Tensor] = "", torch.empty(0)

    def add(self, matrices: Iterable[Matrix]) -> None:
        """Add matrices with their measurements, and compute the scales and rate models of these matrices.

        Raises:
            CheckpointError: a weight or a gradient is not finite.
        """
        for matrix in matrices:
            shape = self._source.specs[matrix.tensor].shape
            for piece in matrix.pieces(matrix.width or shape[-1]):
                is_tensor = len(shape) == 2 and (piece.start, piece.stop) == (0, shape[0])
                self.matrices[piece.tensor if is_tensor else f"{piece.tensor}[{piece.start}:{piece.stop}]"] = piece
        results = self._work.map("known", partial(_matrix_scales, self._source, self.seed), self.matrices.values())
        for name, scales in zip(self.matrices, results, strict=True):
            self._scales[name] = scales.rows, scales.columns
            self.rate_models[name] = RateModel(scales.counts.numpy())

    def only(self, names: Collection[str]) -> "SensitivityCache":
        """Return a cache that contains only the matrices of some tensors."""
        subset = copy(self)
        subset.rate_models = {
            name: rate_model for name, rate_model in self.rate_models.items() if self.matrices[name].tensor in names
        }
        return subset

    @property
    def tensors(self) -> dict[str, list[str]]:
        """Tensor → names of its matrices in the order of their rows, for all tensors that are rounded."""
        by_tensor: dict[str, list[str]] = {}
        for name in self.rate_models:
            by_tensor.setdefault(self.matrices[name].tensor, []).append(name)
        return {
            tensor: sorted(names, key=lambda name: self.matrices[name].start) for tensor, names in by_tensor.items()
        }

    @property
    def n_weights(self) -> int:
        """The number of weights of all matrices together."""
        return sum(self.spec(name).numel for name in self.rate_models)

    def spec(self, name: str) -> TensorSpec:
        """Return the dtype and shape of a matrix in the form in which the checkpoint stores it."""
        matrix = self.matrices[name]
        tensor_spec = self._source.specs[matrix.tensor]
        return TensorSpec(tensor_spec.dtype_name, (matrix.stop - matrix.start, matrix.width or tensor_spec.shape[-1]))

    def factor_and_scales(self, name: str) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return `U` of a matrix (None without calibration), and the relative scales of its rows and its columns."""
        factor = self.matrices[name].factor
        if factor is None:
            return None, *self._scales[name]
        key, U = self._last_factor
        if key != factor.key:
            del U
            self._last_factor = "", torch.empty(0)  # frees the last factor before the next one is read
            U = self._work.store.get(f"U-{factor.key}")
            self._last_factor = factor.key, U
        return U, *self._scales[name]

    def matrix(self, name: str) -> Tensor:
        """Return a matrix in the form in which it is rounded: not transposed, and rotated if `seed` is not None."""
        return _matrix(self._source, self.seed, self.matrices[name])

    def base_matrix(self, name: str) -> Tensor | None:
        """Return the base's matrix to which a matrix will be added; None if there is none or matrices are rotated."""
        matrix = self.matrices[name]
        if matrix.tensor not in self._base or self.seed is not None:
            return None
        return _matrix(self._base, None, matrix)

    def recipes(self, names: Collection[str]) -> tuple[dict[str, TensorSpec], tuple[Recipe, ...]]:
        """Return name → spec of matrices in the form in which they are rounded, and recipes.

        The recipes undo rotation and transposition, so they make the matrices in the form in which the checkpoint
        stores them.
        """
        recipes: list[Recipe] = []
        rounded: dict[str, TensorSpec] = {}
        for name in names:
            rounded_name, spec = name, self.spec(name)
            if self.matrices[name].transposed:
                makes = {name: spec}
                rounded_name, spec = f"{name}.transposed", TensorSpec(spec.dtype_name, spec.shape[::-1])
                recipes.append(Recipe(TRANSPOSED, {TRANSPOSED: rounded_name}, makes))
            if self.seed is not None:
                makes = {rounded_name: spec}
                rounded_name, spec = f"{rounded_name}.rotated", TensorSpec("F32", spec.shape)
                recipes.append(Recipe(HADAMARD, {"rotated": rounded_name}, makes, hadamard_params(spec, self.seed)))
            rounded[rounded_name] = spec
        return rounded, tuple(reversed(recipes))

    def join_recipes(self, tensor: str, names: Collection[str]) -> tuple[Recipe, ...]:
        """Return the recipe that makes a tensor from its matrices, or no recipe if the tensor is a single matrix."""
        if [*names] == [tensor]:
            return ()
        takes = {str(number): name for number, name in enumerate(names)}
        rows = [self.matrices[name].stop - self.matrices[name].start for name in names]
        return (Recipe(JOINED, takes, {tensor: self._source.specs[tensor]}, {"rows": rows}),)


class _LastTensorSource:
    """A source that keeps the tensor that it read last, because each matrix of a tensor reads the whole tensor."""

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
        return _LastTensorSource, (self._source,)


def fully_covered_matrices(matrices: Iterable[Matrix], source: Source) -> list[Matrix]:
    """Return the matrices of those floating-point tensors in which every row belongs to exactly one matrix."""
    by_tensor: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        by_tensor.setdefault(matrix.tensor, []).append(matrix)
    result = []
    for tensor, parts in by_tensor.items():
        spec = source.specs[tensor]
        parts.sort(key=lambda matrix: (matrix.start, -matrix.stop))
        ends = [0, *(matrix.stop for matrix in parts)]
        contiguous = all(matrix.start == end for matrix, end in zip(parts, ends, strict=False))
        if spec.dtype_name in FLOATS and len(spec.shape) > 1 and contiguous and ends[-1] == prod(spec.shape[:-1]):
            result += parts
    return result


def store_factor(store: WorkStore, seed: int | None, inputs: InputStatistics) -> Factor:
    """Compute the inverse-Hessian Cholesky factor `U` of some inputs, and put `U` into a work store.

    Raises:
        CheckpointError: an input is not finite.
    """
    if not inputs.gram.isfinite().all():
        raise CheckpointError(
            f"the inputs of tensor {inputs.regions[0].name} are not finite, because the model overflows or its weights "
            "are damaged: download the model again"
        )
    U = inverse_factor(inputs.gram if seed is None else rotated(inputs.gram, seed), DAMPING)
    store.put(f"U-{inputs.key}", U)
    return Factor(inputs.key, U.diagonal().clone())


def _matrix_scales(source: Source, seed: int | None, matrix: Matrix) -> MatrixScales:
    """Compute the scales and the rate model of a matrix."""
    information = matrix.information
    if information is not None and not information.isfinite().all():
        raise CheckpointError(
            f"the gradients at tensor {matrix.tensor} are not finite, because the model overflows or its weights are "
            "damaged: download the model again"
        )
    W = _matrix(source, None, matrix)
    if not W.isfinite().all():
        n = int((~W.isfinite()).sum())
        raise CheckpointError(
            f"tensor {matrix.tensor} has {n} weights that are NaN or infinite and cannot be rounded: set them to "
            "zero, or use `compress` with `lossless`, which keeps every bit"
        )
    if seed is not None:  # a rotation mixes all rows, so each row gets the mean Fisher information
        W = rotated(W, seed)
        information = None if information is None else information.mean().expand(len(information))
    if matrix.factor is None or information is None:
        rows, columns = typical_scales(W)
    else:
        rows, columns = row_scales(information), matrix.factor.diagonal
    return MatrixScales(rows, columns, torch.from_numpy(RateModel.of(W, rows, columns).counts))


def _matrix(source: Source | Mapping[str, Tensor], seed: int | None, matrix: Matrix) -> Tensor:
    tensor = source[matrix.tensor]
    W = tensor.reshape(-1, matrix.width or tensor.shape[-1])[matrix.start : matrix.stop]
    W = W.T if matrix.transposed else W
    return W if seed is None else rotated(W, seed)


def coding_groups(
    matrices: Mapping[str, list[str]],
    n_weights: Mapping[str, int],
    min_weights: int,
    order: Mapping[str, tuple[int, ...]],
) -> list[list[str]]:
    """Divide matrices into groups that are encoded together, in the order of the numbers in `order`.

    Tensors without numbers come first.

    Args:
        matrices: tensor → names of its matrices.
        n_weights: matrix → number of its weights.
        min_weights: number of weights at which a group is complete; a group also ends at the end of a block, and before
            and after a tensor with several matrices.
        order: tensor → numbers in the name of the tensor; the first number is the same for all tensors of a block.
    """
    groups: list[list[str]] = []
    size, block = min_weights, None
    for tensor in sorted(matrices, key=lambda tensor: (bool(order[tensor]), order[tensor])):
        for number, name in enumerate(matrices[tensor]):
            begins = number == 0 and (len(matrices[tensor]) > 1 or order[tensor][:1] != block)
            if begins or size >= min_weights:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += n_weights[name]
        block = order[tensor][:1] if len(matrices[tensor]) == 1 else None
    return groups
