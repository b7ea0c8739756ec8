"""Observe every matrix product with a parameter or with a view of a parameter, in any module.

Parameters are recognized by the address of their memory. So not only the weights of linear layers are observed, but
also stacked experts, transposed weights and operands of `einsum`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from itertools import product as combinations
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from freebits.execution.serialization import storable


@storable
@dataclass(frozen=True, order=True)
class Region:
    """A matrix that consists of consecutive rows of a parameter. The parameter is viewed as (rows, last dimension).

    Attributes:
        name: name of the parameter.
        start: first row of the matrix.
        stop: row after the last row of the matrix.
        transposed: whether the matrix is stored as (inputs, outputs).
    """

    name: str
    start: int
    stop: int
    transposed: bool


@dataclass(frozen=True)
class Product:
    """One multiplication by a matrix.

    Attributes:
        region: matrix of the product.
        inputs: other operand of the product, (vectors, inputs).
        result: result of the whole call, which may compute several products.
        select: function that selects the outputs of this matrix, (vectors, outputs), from a tensor of the shape of
            `result`.
    """

    region: Region
    inputs: Tensor
    result: Tensor
    select: Callable[[Tensor], Tensor]


FindParameter = Callable[[Tensor], "tuple[str, Tensor] | None"]
"""Takes a tensor. Returns the name and value of the parameter in whose memory the tensor lies, or None."""


class Products(TorchFunctionMode):
    """Context manager that reports products, embedding lookups and comparisons of values.

    Args:
        find_parameter: function that recognizes parameters, see `FindParameter`.
        on_product: callback for each product of a call; if it returns a tensor, the tensor replaces the result of the
            call.
        on_lookup: callback for each embedding lookup; it takes the parameter's name and the rows that were looked up,
            and returns a replacement for these rows.
        on_choice: callback for a tensor whose values are compared by `topk`, `argmax`, `sort` or `argsort`, such as the
            outputs of a router.
    """

    def __init__(
        self,
        find_parameter: FindParameter,
        on_product: Callable[[Product], Tensor | None],
        on_lookup: Callable[[str, Tensor], Tensor] | None = None,
        on_choice: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._find_parameter = find_parameter
        self._on_product = on_product
        self._on_lookup = on_lookup
        self._on_choice = on_choice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function, and report the call if it is a product, a lookup or a comparison."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "embedding" and self._on_lookup is not None:
            table = self._find_parameter(_argument(args, kwargs, 1, "weight"))
            return self._on_lookup(table[0], result) if table else result
        if name in _CHOICES and self._on_choice is not None:
            self._on_choice(_argument(args, kwargs, 0, "input"))
        operands = _OPERANDS[name](args, kwargs or {}) if name in _OPERANDS else None
        if operands is None:
            return result
        left, right, labels = operands
        for matrix, other in ((right, left), (left, right)):
            match = self._find_parameter(matrix.tensor)
            if match and min(matrix.tensor.ndim, match[1].ndim) > 1 and not self._find_parameter(other.tensor):
                for product in _products(*match, matrix, other, labels, result):
                    replacement = self._on_product(product)
                    result = result if replacement is None else replacement
        return result


_CHOICES = ("topk", "argmax", "sort", "argsort")


class Operand(NamedTuple):
    """A tensor in a product, with a label for each of its dimensions."""

    tensor: Tensor
    labels: tuple[str, ...]


class Operands(NamedTuple):
    """The two operands of a product, and a label for each dimension of the result."""

    left: Operand
    right: Operand
    labels: tuple[str, ...]


def _argument(args: Sequence[Any], kwargs: Any, position: int, name: str) -> Any:
    return args[position] if len(args) > position else (kwargs or {}).get(name)


def _linear(args: Sequence[Any], kwargs: Any) -> Operands | None:
    x, W = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    if W.ndim != 2:
        return None
    leading = tuple(f"t{index}" for index in range(x.ndim - 1))
    return Operands(Operand(x, (*leading, "k")), Operand(W, ("c", "k")), (*leading, "c"))


def _matmul(left: Any, right: Any) -> Operands | None:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.ndim * right.ndim == 0:
        return None
    left_labels = ("r", "k") if left.ndim > 1 else ("k",)
    right_labels = ("k", "c") if right.ndim > 1 else ("k",)
    batch = [tuple(f"b{index}" for index in range(tensor.ndim - 2, 0, -1)) for tensor in (left, right)]
    labels = max(batch, key=len) + tuple(label for label in ("r", "c") if label in left_labels + right_labels)
    return Operands(_squeezed(left, batch[0] + left_labels), _squeezed(right, batch[1] + right_labels), labels)


def _squeezed(tensor: Tensor, labels: tuple[str, ...]) -> Operand:
    """Return an operand without the batch dimensions of size one, which broadcasting would expand."""
    dims = [dim for dim, label in enumerate(labels) if not (label.startswith("b") and tensor.shape[dim] == 1)]
    ones = [dim for dim in range(tensor.ndim) if dim not in dims]
    return Operand(tensor.squeeze(ones) if ones else tensor, tuple(labels[dim] for dim in dims))


def _einsum(args: Sequence[Any], kwargs: Any) -> Operands | None:  # noqa: ARG001
    tensors = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    equation = args[0].replace(" ", "") if args and isinstance(args[0], str) else ""
    if len(tensors) != 2 or "->" not in equation:
        return None
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if "..." in equation:
        n_dots = max(t.ndim - len(term.replace("...", "")) for t, term in zip(tensors, terms, strict=True))
        dots = [f"dot{index}" for index in range(n_dots)]
        input_labels = [_labels(term, dots, t.ndim) for term, t in zip(terms, tensors, strict=True)]
        output_labels = _labels(output, dots, n_dots + len(output) - 3)
    else:
        input_labels, output_labels = [tuple(term) for term in terms], tuple(output)
    left, right = (Operand(tensor, labels) for tensor, labels in zip(tensors, input_labels, strict=True))
    return Operands(left, right, output_labels)


def _labels(term: str, dots: list[str], n_dims: int) -> tuple[str, ...]:
    """Return the labels of a term of an `einsum` equation. Labels from `dots` replace an ellipsis."""
    if "..." not in term:
        return tuple(term)
    before, _, after = term.partition("...")
    n_dots = n_dims - len(before) - len(after)
    return (*before, *dots[len(dots) - n_dots :], *after)


_OPERANDS: dict[str, Callable[[Any, Any], Operands | None]] = {
    "linear": _linear,
    "einsum": _einsum,
    "__rmatmul__": lambda args, _: _matmul(args[1], args[0]),
    **dict.fromkeys(
        ("matmul", "__matmul__", "mm", "bmm"),
        lambda args, kwargs: _matmul(args[0], next(iter((*args[1:2], *kwargs.values())), None)),
    ),
    "addmm": lambda args, kwargs: _matmul(_argument(args, kwargs, 1, "mat1"), _argument(args, kwargs, 2, "mat2")),
    "baddbmm": lambda args, kwargs: _matmul(_argument(args, kwargs, 1, "batch1"), _argument(args, kwargs, 2, "batch2")),
}


def _products(
    name: str, parameter: Tensor, matrix: Operand, other: Operand, labels: tuple[str, ...], result: Tensor
) -> Iterator[Product]:
    """Yield the products of a call, one for each matrix in the operand `matrix`, which lies in the parameter."""
    batch = [label for label in matrix.labels if label in other.labels and label in labels]
    inputs = [label for label in matrix.labels if label in other.labels and label not in labels]
    outputs = [label for label in matrix.labels if label not in other.labels and label in labels]
    vectors = [label for label in other.labels if label in labels and label not in batch]
    squeezed = dict.fromkeys((label for label in labels if label not in matrix.labels + other.labels), 0)
    covered = {*batch, *inputs, *outputs, *vectors}
    if not inputs or not outputs or covered != {*matrix.labels, *other.labels} or len(labels) != result.ndim:
        return
    size = dict(zip(matrix.labels, matrix.tensor.shape, strict=True))
    stride = dict(zip(matrix.labels, matrix.tensor.stride(), strict=True))
    n_separate = next((n for n in range(len(outputs)) if _merged_stride(outputs[n:], size, stride)), None)
    input_stride = _merged_stride(inputs, size, stride)
    if n_separate is None or input_stride is None:
        return
    # Each combination of indices into the dimensions in `separate` selects one matrix.
    separate, outputs = [*batch, *outputs[:n_separate]], outputs[n_separate:]
    output_stride = _merged_stride(outputs, size, stride) or 0
    n_outputs, n_inputs = (prod(size[label] for label in group) for group in (outputs, inputs))
    for position in combinations(*(range(size[label]) for label in separate)):
        indices = dict(zip(separate, position, strict=True))
        offset = int(matrix.tensor.storage_offset()) + sum(stride[label] * index for label, index in indices.items())
        indices |= squeezed
        region = _region(name, parameter, offset, (n_outputs, output_stride), (n_inputs, input_stride))
        if region is None:
            return
        x = _selected(other, indices, [*vectors, *inputs]).reshape(-1, n_inputs)

        def select(tensor: Tensor, indices: dict[str, int] = indices) -> Tensor:
            return _selected(Operand(tensor, labels), indices, [*vectors, *outputs]).reshape(-1, n_outputs)

        yield Product(region, x, result, select)


def _merged_stride(group: list[str], size: dict[str, int], stride: dict[str, int]) -> int | None:
    """Return the stride of several dimensions viewed as one dimension; None if no such view exists."""
    group = [label for label in group if size[label] > 1] or group[-1:]
    for outer, inner in pairwise(group):
        if stride[outer] != stride[inner] * size[inner]:
            return None
    return stride[group[-1]]


def _region(
    name: str, parameter: Tensor, offset: int, outputs: tuple[int, int], inputs: tuple[int, int]
) -> Region | None:
    """Return the region of a view, given the size and stride of its outputs and of its inputs.

    Return None if the view does not consist of whole rows.
    """
    width = parameter.shape[-1]
    for transposed, (n_rows, row_stride), (n_columns, column_stride) in (
        (False, outputs, inputs),
        (True, inputs, outputs),
    ):
        is_contiguous = (n_columns == 1 or column_stride == 1) and (n_rows == 1 or row_stride == width)
        if is_contiguous and n_columns == width and offset % width == 0:
            return Region(name, offset // width, offset // width + n_rows, transposed)
    return None


def _selected(operand: Operand, indices: dict[str, int], order: list[str]) -> Tensor:
    """Index some dimensions of a tensor, and permute the other dimensions into the given order."""
    tensor, labels = operand.tensor, list(operand.labels)
    for label, index in indices.items():
        if label in labels:
            tensor = tensor.select(labels.index(label), index)
            labels.remove(label)
    return tensor.permute([labels.index(label) for label in order])
