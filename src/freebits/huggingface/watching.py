"""Watch what goes into the linear layers of a block and what comes back: Gram matrices and squared gradients."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from freebits.work import kept


@kept
@dataclass(frozen=True)
class Sums:
    """What was seen of a matrix in a chunk.

    Attributes:
        leader: the first of those that read the same, as queries, keys and values do, which has their Gram matrix.
        n_inputs: how many inputs came.
        gram: `Σ x xᵀ` over them, of a leader.
        squares: of the gradients at what came out, by row.
        place: how many multiplications by watched matrices came before its first.
    """

    leader: str
    n_inputs: int
    gram: Tensor | None
    squares: Tensor
    place: int


class Linears(TorchFunctionMode):
    """Watches every multiplication by one of some matrices, whichever module does it.

    Attributes:
        watches: by the matrices' names.
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.watches = {name: Watch() for name in matrices}
        self._count = 0
        self._places = {
            (matrix.data_ptr(), shape): self.watches[name]
            for name, matrix in matrices.items()
            for shape in (matrix.shape, matrix.shape[::-1])  # Falcon's layers multiply by a transposed view
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of any function of torch's."""
        result = func(*args, **(kwargs or {}))
        if func in (linear, torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            first = 1 if func is torch.addmm else 0  # GPT-2's layers: bias, inputs, matrix
            x, matrix = args[first], args[first + 1]
            watch = self._places.get((matrix.data_ptr(), matrix.shape))
            if watch:
                watch.saw(x, result, self._count)
                self._count += 1
        return result


class Watch:
    """Sums over what goes into a linear layer and over the gradients at what comes out.

    Attributes:
        first: of those that read the same, as queries, keys and values do, the one that has their Gram matrix; None
            where this is it, since what refers to itself stays in memory until someone looks for such.
    """

    def __init__(self) -> None:
        self.n_inputs = self.place = 0
        self.first: Watch | None = None
        self.inputs: list[Tensor] = []
        self._gram = torch.zeros(())
        self._squares = torch.zeros(())

    def saw(self, x: Tensor, output: Tensor, place: int) -> None:
        """One multiplication, after so many others."""
        if not self.n_inputs:
            self.place = place
        self.inputs.append(x.detach())
        self.n_inputs += x.numel() // x.shape[-1]
        if output.requires_grad:
            output.register_hook(self._felt)

    def _felt(self, gradient: Tensor) -> None:
        self._squares = self._squares + gradient.flatten(0, -2).square().sum(0).cpu()

    def sum_up(self) -> None:
        """Take in the inputs."""
        rows = torch.cat([x.flatten(0, -2) for x in self.inputs])
        self._gram = self._gram + (rows.T @ rows).cpu()

    def sums(self, leader: str) -> Sums:
        """What was seen."""
        return Sums(leader, self.n_inputs, self._gram if self.first is None else None, self._squares, self.place)


def sum_up(watches: Collection[Watch]) -> None:
    """Take in what the layers saw, of those that read the same once."""
    leaders: dict[tuple[int, ...], Watch] = {}
    for watch in watches:
        if watch.inputs:
            leader = leaders.setdefault(tuple(x.data_ptr() for x in watch.inputs), watch)
            watch.first = None if leader is watch else leader
            if leader is watch:
                watch.sum_up()
    for watch in watches:
        watch.inputs.clear()
