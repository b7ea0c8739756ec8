"""Observe every multiplication by a parameter, or by a view of one, whichever module does it.

A parameter is recognized by the memory that it lies in, so an expert in a stack, a transposed weight and an operand of
an `einsum` are recognized as well as the weight of a linear layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from itertools import product as combinations
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from freebits.execution.stored_values import kept


@kept
@dataclass(frozen=True, order=True)
class Region:
    """A matrix in a parameter: some rows of the parameter, seen as (rows, last dimension).

    Attributes:
        name: of the parameter.
        start: its first row.
        stop: the row after its last.
        transposed: whether it is stored as (inputs, outputs).
    """

    name: str
    start: int
    stop: int
    transposed: bool


@dataclass(frozen=True)
class Product:
    """One multiplication by a matrix.

    Attributes:
        region: the matrix.
        inputs: (vectors, inputs), what it multiplied.
        result: the result of the whole call.
        at: gives from a tensor of the result's shape what belongs to this matrix, (vectors, outputs).
    """

    region: Region
    inputs: Tensor
    result: Tensor
    at: Callable[[Tensor], Tensor]


Find = Callable[[Tensor], "tuple[str, Tensor] | None"]
"""The name of a parameter and the parameter, for a tensor that lies in its memory."""


class Products(TorchFunctionMode):
    """While it is active, reports products and lookups.

    Args:
        find: recognizes parameters.
        on_product: called with each product of a call; what it returns for the only product of a call, if anything,
            takes the place of the call's result.
        on_lookup: called with a parameter's name and the rows that were looked up in it, once they are there; returns
            what takes their place.
        on_choice: called with a tensor whose values are compared, as those of a router are.
    """

    def __init__(
        self,
        find: Find,
        on_product: Callable[[Product], Tensor | None],
        on_lookup: Callable[[str, Tensor], Tensor] | None = None,
        on_choice: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._find = find
        self._on_product = on_product
        self._on_lookup = on_lookup
        self._on_choice = on_choice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of any function of torch's."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "embedding" and self._on_lookup is not None:
            found = self._find(_argument(args, kwargs, 1, "weight"))
            return self._on_lookup(found[0], result) if found else result
        if name in _CHOICES and self._on_choice is not None:
            self._on_choice(args[0])
        operands = _OPERANDS[name](args, kwargs or {}) if name in _OPERANDS else None
        if operands is None:
            return result
        left, right, labels = operands
        for matrix, other in ((right, left), (left, right)):
            found = self._find(matrix.tensor)
            if found and min(matrix.tensor.ndim, found[1].ndim) > 1 and not self._find(other.tensor):
                for seen in _products(*found, matrix, other, labels, result):
                    replaced = self._on_product(seen)
                    result = result if replaced is None else replaced
        return result


_CHOICES = ("topk", "argmax", "sort", "argsort")


class Operand(NamedTuple):
    """A tensor in a product, with a label for each of its dimensions."""

    tensor: Tensor
    labels: tuple[str, ...]


class Operands(NamedTuple):
    """Both tensors of a product, and the labels of its result."""

    left: Operand
    right: Operand
    labels: tuple[str, ...]


def _argument(args: Sequence[Any], kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else (kwargs or {}).get(name)


def _linear(args: Sequence[Any], kwargs: Any) -> Operands | None:
    x, W = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    if W.ndim != 2:
        return None
    before = tuple(f"t{at}" for at in range(x.ndim - 1))
    return Operands(Operand(x, (*before, "k")), Operand(W, ("c", "k")), (*before, "c"))


def _matmul(left: Any, right: Any) -> Operands | None:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.ndim * right.ndim == 0:
        return None
    of_left = ("r", "k") if left.ndim > 1 else ("k",)
    of_right = ("k", "c") if right.ndim > 1 else ("k",)
    batch = [tuple(f"b{at}" for at in range(tensor.ndim - 2, 0, -1)) for tensor in (left, right)]
    labels = max(batch, key=len) + tuple(label for label in ("r", "c") if label in of_left + of_right)
    return Operands(_squeezed(left, batch[0] + of_left), _squeezed(right, batch[1] + of_right), labels)


def _squeezed(tensor: Tensor, labels: tuple[str, ...]) -> Operand:
    """Without the batch dimensions of size one, which are broadcast."""
    left = [at for at, label in enumerate(labels) if not (label.startswith("b") and tensor.shape[at] == 1)]
    ones = [at for at in range(tensor.ndim) if at not in left]
    return Operand(tensor.squeeze(ones) if ones else tensor, tuple(labels[at] for at in left))


def _einsum(args: Sequence[Any], kwargs: Any) -> Operands | None:  # noqa: ARG001
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    equation = args[0].replace(" ", "") if args and isinstance(args[0], str) else ""
    if len(operands) != 2 or "->" not in equation:
        return None
    inputs, _, result = equation.partition("->")
    parts = inputs.split(",")
    if "..." in equation:
        n_dots = max(t.ndim - len(part.replace("...", "")) for t, part in zip(operands, parts, strict=True))
        dots = [f"dot{at}" for at in range(n_dots)]
        named = [_labels(part, dots, t.ndim) for part, t in zip(parts, operands, strict=True)]
        of_result = _labels(result, dots, n_dots + len(result) - 3)
    else:
        named, of_result = [tuple(part) for part in parts], tuple(result)
    left, right = (Operand(tensor, labels) for tensor, labels in zip(operands, named, strict=True))
    return Operands(left, right, of_result)


def _labels(part: str, dots: list[str], n_dims: int) -> tuple[str, ...]:
    if "..." not in part:
        return tuple(part)
    before, _, after = part.partition("...")
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
    """The products of a call, one for each matrix in the operand that lies in the parameter."""
    batch = [label for label in matrix.labels if label in other.labels and label in labels]
    inputs = [label for label in matrix.labels if label in other.labels and label not in labels]
    outputs = [label for label in matrix.labels if label not in other.labels and label in labels]
    vectors = [label for label in other.labels if label in labels and label not in batch]
    ones = dict.fromkeys((label for label in labels if label not in matrix.labels + other.labels), 0)
    used = {*batch, *inputs, *outputs, *vectors}
    if not inputs or not outputs or used != {*matrix.labels, *other.labels} or len(labels) != result.ndim:
        return
    size = dict(zip(matrix.labels, matrix.tensor.shape, strict=True))
    stride = dict(zip(matrix.labels, matrix.tensor.stride(), strict=True))
    n_apart = next((n for n in range(len(outputs)) if _joined(outputs[n:], size, stride)), None)
    within = _joined(inputs, size, stride)
    if n_apart is None or within is None:
        return
    apart, outputs = [*batch, *outputs[:n_apart]], outputs[n_apart:]
    across = _joined(outputs, size, stride)
    n_outputs, n_inputs = (prod(size[label] for label in of) for of in (outputs, inputs))
    for at in combinations(*(range(size[label]) for label in apart)):
        chosen = dict(zip(apart, at, strict=True))
        offset = int(matrix.tensor.storage_offset()) + sum(stride[label] * index for label, index in chosen.items())
        chosen |= ones
        region = _region(name, parameter, offset, (n_outputs, across or 0), (n_inputs, within))
        if region is None:
            return
        x = _selected(other, chosen, [*vectors, *inputs]).reshape(-1, n_inputs)

        def within_result(tensor: Tensor, chosen: dict[str, int] = chosen) -> Tensor:
            return _selected(Operand(tensor, labels), chosen, [*vectors, *outputs]).reshape(-1, n_outputs)

        yield Product(region, x, result, within_result)


def _joined(group: list[str], size: dict[str, int], stride: dict[str, int]) -> int | None:
    """The stride of several dimensions that are one in memory; None where they are not one."""
    group = [label for label in group if size[label] > 1] or group[-1:]
    for outer, inner in pairwise(group):
        if stride[outer] != stride[inner] * size[inner]:
            return None
    return stride[group[-1]]


def _region(
    name: str, parameter: Tensor, offset: int, outputs: tuple[int, int], inputs: tuple[int, int]
) -> Region | None:
    """Which matrix of a parameter a view is, from the size and the stride of its outputs and of its inputs."""
    width = parameter.shape[-1]
    for transposed, (n_rows, row), (n_columns, column) in ((False, outputs, inputs), (True, inputs, outputs)):
        lies_so = (n_columns == 1 or column == 1) and (n_rows == 1 or row == width)
        if lies_so and n_columns == width and offset % width == 0:
            return Region(name, offset // width, offset // width + n_rows, transposed)
    return None


def _selected(operand: Operand, chosen: dict[str, int], order: list[str]) -> Tensor:
    """A part of a tensor, its dimensions in an order."""
    tensor, labels = operand.tensor, list(operand.labels)
    for label, index in chosen.items():
        if label in labels:
            tensor = tensor.select(labels.index(label), index)
            labels.remove(label)
    return tensor.permute([labels.index(label) for label in order])
