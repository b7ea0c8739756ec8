"""Layers whose weights stay 8-bit integers in memory."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from freebits.codecs.integers import ScaledIntegers, scales_of
from freebits.compiled import compiled
from freebits.execution.machine import is_slow

_MAX_INTEGER = 127
_MAX_OUTLIERS = 1 / 64
"""Largest fraction of a matrix's integers that may be outliers; see `IntegerMatrix`."""
_MAX_COMPILED_INPUTS = 16
"""Largest number of input vectors for which the compiled loop is faster than expanding the integers."""
_EXPANDED_AT_ONCE = 1 << 20
"""Number of integers that are expanded to floats at a time; they fit the cache of the processor."""


class IntegerMatrix(nn.Module):
    """A matrix `W`, (n, m), of 8-bit integers with scales.

    An integer that does not fit 8 bits is an *outlier*. The 8-bit integer is then 127 or -127, and the remainder of the
    weight is stored separately, as a float. Large matrices are quantized in blocks of rows, so each block has its own
    column scales. `fill` fills one block.

    Args:
        sizes: number of rows of each block.
        n_columns: `m`.
        dtype: dtype of the expanded matrix.
    """

    integers: Tensor
    rows: Tensor
    columns: Tensor
    outlier_places: Tensor
    outlier_values: Tensor

    def __init__(self, sizes: Sequence[int], n_columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.starts = [0, *accumulate(sizes)]
        n = self.starts[-1]
        self.shape = n, n_columns
        self.register_buffer("integers", torch.empty(n, n_columns, dtype=torch.int8))
        self.register_buffer("rows", torch.empty(n))
        self.register_buffer("columns", torch.empty(len(sizes), n_columns))
        self.register_buffer("outlier_places", torch.empty(0, 2, dtype=torch.int64))
        self.register_buffer("outlier_values", torch.empty(0))

    def fill(self, number: int, block: ScaledIntegers) -> None:
        """Fill block `number`. Call this method once for each block."""
        start, stop = self.starts[number], self.starts[number + 1]
        self.rows[start:stop], self.columns[number] = scales_of(block.rows), scales_of(block.columns)
        places, values = [self.outlier_places], [self.outlier_values]
        n_rows = max(1, _EXPANDED_AT_ONCE // self.integers.shape[1])
        for first, integers in zip(range(start, stop, n_rows), block.integers.split(n_rows), strict=True):
            clamped = integers.clamp(-_MAX_INTEGER, _MAX_INTEGER)
            self.integers[first : first + len(integers)] = clamped
            place = (clamped != integers).nonzero()
            excess = (integers - clamped)[*place.T].float()
            place += torch.tensor([first, 0])
            places.append(place)
            values.append(excess * self.columns[number][place[:, 1]] * self.rows[place[:, 0]])
        self.outlier_places, self.outlier_values = torch.cat(places), torch.cat(values)

    def adopt(self, other: "IntegerMatrix") -> None:
        """Take the integers and scales of another matrix."""
        for name, tensor in other.named_buffers():
            setattr(self, name, tensor)

    def release(self) -> None:
        """Release the memory of the integers and scales."""
        for name, tensor in self.named_buffers():
            setattr(self, name, tensor.new_empty(0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IntegerMatrix":
        """Move the matrix or change the dtype of the expanded matrix. The scales stay float32."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def fits(self) -> bool:
        """Whether at most `_MAX_OUTLIERS` of the integers are outliers."""
        return len(self.outlier_values) <= _MAX_OUTLIERS * self.integers.numel()

    def floats(self) -> Tensor:
        """Return the expanded matrix, (n, m)."""
        blocks = [
            self.integers[start:stop] * columns * self.rows[start:stop, None]
            for (start, stop), columns in zip(pairwise(self.starts), self.columns, strict=True)
        ]
        matrix = torch.cat(blocks)
        matrix[*self.outlier_places.T] += self.outlier_values
        return matrix.to(self.dtype)

    def lookup(self, numbers: Tensor) -> Tensor:
        """Return rows of the matrix, (…, m), given the row numbers, (…)."""
        block = torch.bucketize(numbers, torch.tensor(self.starts[1:], device=numbers.device), right=True)
        values = self.integers[numbers] * self.columns[block] * self.rows[numbers][..., None]
        if len(self.outlier_values):
            rows, columns = self.outlier_places.T
            found, outliers = (numbers.flatten()[:, None] == rows).nonzero().T
            values.flatten(0, -2)[found, columns[outliers]] += self.outlier_values[outliers]
        return values.to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return `x Wᵀ`, (k, n), for `x`, (k, m), in the dtype of `x`."""
        y = x.new_empty(len(x), len(self.rows), dtype=torch.float32)
        for (start, stop), columns in zip(pairwise(self.starts), self.columns, strict=True):
            rows, scaled, out = self.integers[start:stop], x.float() * columns, y[:, start:stop]
            if len(x) <= _MAX_COMPILED_INPUTS and x.device.type == "cpu":
                _compiled_product(rows, scaled, out)
            else:
                scaled = scaled.to(_product_dtype(x))
                n_rows = max(1, _EXPANDED_AT_ONCE // rows.shape[1])
                for chunk, part in zip(rows.split(n_rows), out.split(n_rows, 1), strict=True):
                    part.copy_(scaled @ chunk.to(scaled.dtype).T)
        y *= self.rows
        if len(self.outlier_values):
            rows, columns = self.outlier_places.T
            y.index_add_(1, rows, x.float()[:, columns] * self.outlier_values)
        return y.to(x.dtype)

    def transposed_product(self, y: Tensor) -> Tensor:
        """Return `y W`, (k, m), for `y`, (k, n), in the dtype of `y`."""
        scaled, x = y.float() * self.rows, y.new_zeros(len(y), self.integers.shape[1], dtype=torch.float32)
        for (start, stop), columns in zip(pairwise(self.starts), self.columns, strict=True):
            n_rows = max(1, _EXPANDED_AT_ONCE // self.integers.shape[1])
            block = torch.zeros_like(x)
            pairs = zip(self.integers[start:stop].split(n_rows), scaled[:, start:stop].split(n_rows, 1), strict=True)
            for chunk, part in pairs:
                block += part @ chunk.float()
            x += block * columns
        rows, columns = self.outlier_places.T
        x.index_add_(1, columns, y.float()[:, rows] * self.outlier_values)
        return x.to(y.dtype)


class _Product(torch.autograd.Function):
    """The function `x ↦ x Wᵀ`, which is differentiable in `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: IntegerMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.transposed_product(gradients[0]), None


class IntegerLinear(nn.Linear):
    """The layer `y = x Wᵀ + b`. `weight` is `W`, expanded anew on every use.

    Args:
        matrix: `W`, (n_out, n_in).
        bias: `b`, (n_out,); None for a layer without bias.
    """

    def __init__(self, matrix: IntegerMatrix, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.matrix = matrix
        self.out_features, self.in_features = matrix.shape
        self.bias = bias  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The expanded matrix, (n_out, n_in)."""
        return self.matrix.floats()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (…, n_in) to outputs (…, n_out)."""
        inputs, needs_gradient = x.reshape(-1, self.in_features), torch.is_grad_enabled() and x.requires_grad
        y: Tensor = (
            _Product.apply(inputs, self.matrix)  # type: ignore[no-untyped-call]
            if needs_gradient
            else self.matrix.product(inputs)
        )
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class IntegerEmbedding(nn.Embedding):
    """An embedding. `weight` is its matrix, expanded anew on every use.

    Args:
        matrix: the matrix, (n, m).
        padding_idx: number of the row for padding, as in PyTorch.
    """

    def __init__(self, matrix: IntegerMatrix, padding_idx: int | None) -> None:
        nn.Module.__init__(self)
        self.matrix, self.padding_idx = matrix, padding_idx
        self.num_embeddings, self.embedding_dim = matrix.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The expanded matrix, (n, m)."""
        return self.matrix.floats()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return rows of the matrix, (…, m), given the row numbers, (…)."""
        return self.matrix.lookup(input)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which to multiply: that of `x`, or float32 if this processor is faster with float32."""
    return torch.float32 if x.device.type == "cpu" and is_slow(x.dtype) else x.dtype


def _compiled_product(integers: Tensor, x: Tensor, out: Tensor) -> None:
    """Fill `out`, (k, n), with `x integersᵀ` for few inputs `x`, (k, m), on several threads."""
    n_threads = torch.get_num_threads()
    bounds = [len(integers) * number // n_threads for number in range(n_threads + 1)]
    arrays = integers.numpy(), np.ascontiguousarray(x.detach().numpy()), out.numpy()
    futures: list[Future[None]] = [
        _threads(n_threads).submit(_multiply, *arrays, start, stop) for start, stop in pairwise(bounds)
    ]
    for future in futures:
        future.result()


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="freebits-product")


@partial(compiled, any_order=True)
def _multiply(
    integers: NDArray[np.int8], x: NDArray[np.float32], out: NDArray[np.float32], start: int, stop: int
) -> None:
    """Fill columns `start` to `stop` of `out`.

    Each inner loop computes four sums at once. The first loop takes four inputs and one row of weights, so that each
    weight is converted once for four inputs. The second loop takes one of the remaining inputs and four rows.
    """
    n_inputs, n_columns = x.shape
    n_fours = n_inputs // 4 * 4
    for row in range(start, stop):
        weights = integers[row]
        for i in range(0, n_fours, 4):
            x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
            total0 = total1 = total2 = total3 = np.float32(0)
            for column in range(n_columns):
                weight = np.float32(weights[column])
                total0 += weight * x0[column]
                total1 += weight * x1[column]
                total2 += weight * x2[column]
                total3 += weight * x3[column]
            out[i, row], out[i + 1, row], out[i + 2, row], out[i + 3, row] = total0, total1, total2, total3
    last = stop - 1
    for i in range(n_fours, n_inputs):
        inputs = x[i]
        for row in range(start, stop, 4):
            rows = row, min(row + 1, last), min(row + 2, last), min(row + 3, last)
            w0, w1, w2, w3 = integers[rows[0]], integers[rows[1]], integers[rows[2]], integers[rows[3]]
            total0 = total1 = total2 = total3 = np.float32(0)
            for column in range(n_columns):
                value = inputs[column]
                total0 += np.float32(w0[column]) * value
                total1 += np.float32(w1[column]) * value
                total2 += np.float32(w2[column]) * value
                total3 += np.float32(w3[column]) * value
            out[i, rows[0]], out[i, rows[1]], out[i, rows[2]], out[i, rows[3]] = total0, total1, total2, total3
