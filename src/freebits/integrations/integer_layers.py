"""Layers whose weights stay 8-bit or 4-bit integers in memory."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from freebits.errors import UsageError
from freebits.execution.machine import is_slow
from freebits.integrations.integer_blocks import GROUP, IntegerBlock

_MIN_ROWS = 16
"""Smallest number of rows of 8-bit integers for a thread."""
_MIN_PRODUCTS = 1 << 21
"""Number of scalar products that take about as long as waking a thread."""
_MAX_COMPILED_INPUTS = 16
"""Largest number of input vectors for which the compiled loop is faster than expanding the integers."""


class IntegerMatrix(nn.Module):
    """A matrix `W`, (n, m), of 8-bit or 4-bit integers with scales; see `freebits.integrations.integer_blocks`.

    Large matrices are quantized in blocks of rows, so each block has its own column scales.

    Args:
        sizes: number of rows of each block.
        n_columns: `m`.
        dtype: dtype of the expanded matrix.
    """

    def __init__(self, sizes: Sequence[int], n_columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.starts = [0, *accumulate(sizes)]
        self.shape = self.starts[-1], n_columns
        self.blocks: Any = nn.ModuleList(IntegerBlock(n, n_columns) for n in sizes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IntegerMatrix":
        """Move the matrix or change the dtype of the expanded matrix. The scales stay float32."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def fits(self) -> bool:
        """Whether few of the integers are outliers."""
        return all(block.fits for block in self.blocks)

    def release(self) -> None:
        """Release the memory of the integers and scales."""
        for block in self.blocks:
            block.release()

    def floats(self) -> Tensor:
        """Return the expanded matrix, (n, m)."""
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.blocks[0].rows.device)
        for first, block in self._placed_blocks():
            for start, stop, values in block.values():
                matrix[first + start : first + stop] = values * block.columns * block.rows[start:stop, None]
        return matrix

    def lookup(self, indices: Tensor) -> Tensor:
        """Return rows of the matrix, (…, m), given the indices of the rows, (…).

        Raises:
            IndexError: there is no row with an index.
        """
        flat = indices.flatten()
        if len(flat) and not 0 <= flat.min() <= flat.max() < self.shape[0]:
            raise IndexError(f"an index is outside the range from 0 to {self.shape[0] - 1}")
        values = torch.empty(len(flat), self.shape[1], dtype=self.dtype, device=flat.device)
        for first, block in self._placed_blocks():
            inside = (flat >= first) & (flat < first + block.shape[0])
            values[inside] = block.lookup(flat[inside] - first).to(self.dtype)
        return values.reshape(*indices.shape, self.shape[1])

    def product(self, x: Tensor) -> Tensor:
        """Return `x Wᵀ`, (k, n), for `x`, (k, m), in the dtype of `x`."""
        y = x.new_empty(len(x), self.shape[0], dtype=torch.float32)
        for first, block in self._placed_blocks():
            scaled, out = x.float() * block.columns, y[:, first : first + block.shape[0]]
            if len(x) <= _MAX_COMPILED_INPUTS and x.device.type == "cpu":
                _compiled_product(block, scaled, out)
            else:
                scaled = scaled.to(_product_dtype(x))
                for start, stop, values in block.values(scaled.dtype):
                    out[:, start:stop] = scaled @ values.T
            out *= block.rows
        return y.to(x.dtype)

    def transposed_product(self, y: Tensor) -> Tensor:
        """Return `y W`, (k, m), for `y`, (k, n), in the dtype of `y`."""
        x = y.new_zeros(len(y), self.shape[1], dtype=torch.float32)
        for first, block in self._placed_blocks():
            scaled, of_block = y[:, first : first + block.shape[0]].float() * block.rows, torch.zeros_like(x)
            for start, stop, values in block.values():
                of_block += scaled[:, start:stop] @ values
            x += of_block * block.columns
        return x.to(y.dtype)

    def _placed_blocks(self) -> Iterator[tuple[int, IntegerBlock]]:
        """Yield the index of the first row of each block, and the block.

        Raises:
            UsageError: the block was released.
        """
        for first, block in zip(self.starts, self.blocks, strict=False):
            if len(block.rows) < block.shape[0]:
                raise UsageError(
                    "the weights of a model that stays packed exist only during its forward pass: load the model with "
                    "`keep_integers` instead of `stay_packed`"
                )
            yield first, block


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
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map inputs (…, n_in) to outputs (…, n_out)."""
        x, needs_gradient = input.reshape(-1, self.in_features), torch.is_grad_enabled() and input.requires_grad
        y: Tensor = (
            _Product.apply(x, self.matrix)  # type: ignore[no-untyped-call]
            if needs_gradient
            else self.matrix.product(x)
        )
        y = y.reshape(*input.shape[:-1], self.out_features)
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
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

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
    return torch.float32 if x.device.type == "cpu" and x.dtype.itemsize == 2 and is_slow(x.dtype) else x.dtype


def _compiled_product(block: IntegerBlock, x: Tensor, out: Tensor) -> None:
    """Fill `out`, (k, n), with `x Vᵀ` for few inputs `x`, (k, m), on several threads; see `IntegerBlock.multiply`."""
    (n, m), arrays = block.shape, (np.ascontiguousarray(x.detach().numpy()), out.numpy())
    n_threads = max(1, min(torch.get_num_threads(), len(x) * n * m // _MIN_PRODUCTS))
    step = GROUP if block.nibbles.numel() else _MIN_ROWS
    bounds = sorted({min(n, step * round(n * index / n_threads / step)) for index in range(n_threads)} | {n})
    first, *others = pairwise(bounds) if n else [(0, 0)]
    futures: list[Future[None]] = [
        _threads(n_threads).submit(block.multiply, *arrays, start, stop) for start, stop in others
    ]
    block.multiply(*arrays, *first)
    for future in futures:
        future.result()


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="freebits-product")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child process has none of its parent's threads
