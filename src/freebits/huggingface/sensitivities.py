"""Measure how much a model's output depends on each of its matrices: one pass forwards, one backwards."""

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.overrides import TorchFunctionMode

from freebits.huggingface.blockwise import BlockwiseModel
from freebits.huggingface.own_text import drawn
from freebits.quantization import Sensitivity
from freebits.work import Progress

_TEMPER = 0.25
"""Power with which a token's frequency counts: a text tells which tokens are rare, not how rare they are elsewhere."""


def measure_sensitivities(
    model: BlockwiseModel, tokens: Tensor, scratch: Path, seed: int, progress: Progress
) -> Iterator[dict[str, Sensitivity]]:
    """How much the output depends on the matrices of each block, from the last on, and then on embedding and head.

    Labels are drawn from the model's own predictions, so that squared gradients are its Fisher information.

    Args:
        model: the model.
        tokens: (windows, T), calibration text.
        scratch: a folder for the stream between the blocks.
        seed: of the draw.
        progress: called after each block, forwards and backwards.
    """
    n_blocks = len(model.blocks)
    streams = [_in_file(scratch / "stream-0", torch.cat(list(model.embed(tokens))))]
    for number in range(n_blocks):
        with model.block(number) as run, torch.no_grad():
            after = torch.cat([run(window.to(model.device)).cpu() for window in streams[-1].split(1)])
        streams.append(_in_file(scratch / f"stream-{number + 1}", after))
        progress(number + 1, 2 * n_blocks)
    hidden, likely, gradient = _head(model, tokens, streams.pop(), seed)
    for number in reversed(range(n_blocks)):
        found, gradient = _block(model, number, streams.pop(), gradient)
        yield found
        progress(2 * n_blocks - number, 2 * n_blocks)
    yield _embeddings(model, hidden, likely, gradient)


def _in_file(path: Path, stream: Tensor) -> Tensor:
    """The same in a file: there is a stream for each block."""
    flat = torch.from_file(str(path), shared=True, size=stream.numel(), dtype=stream.dtype)
    return flat.view(stream.shape).copy_(stream)


def _head(model: BlockwiseModel, tokens: Tensor, stream: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `x xᵀ` over the head's inputs; how likely each token is; the gradient at the stream."""
    generator = torch.Generator(model.device).manual_seed(seed)
    inputs: list[Tensor] = []
    gram: Any = 0
    likely: Any = 0
    handle = model.head_module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    gradients = []
    for window, x in zip(tokens, stream.split(1), strict=True):
        leaf = x.to(model.device).clone().requires_grad_()
        logits = model.logits(leaf, window)[:-1]
        chances = logits.detach().softmax(-1)
        labels = drawn(chances, generator)[:, 0]
        gradients.append(torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), leaf)[0].cpu())
        likely = likely + (chances * (1 - chances)).sum(0)
        rows = inputs.pop().flatten(0, -2)
        gram = gram + rows.T @ rows
    handle.remove()
    n_tokens = tokens.numel()
    return gram / n_tokens, likely / n_tokens, torch.cat(gradients)


def _block(
    model: BlockwiseModel, number: int, stream: Tensor, gradient: Tensor
) -> tuple[dict[str, Sensitivity], Tensor]:
    """Of its matrices, and the gradient at its input, from that at its output."""
    gradients = []
    with model.block(number) as run, _Linears(model.matrices(number)) as linears:
        watches = linears.watches
        for x, g in zip(stream.split(1), gradient.split(1), strict=True):
            leaf = x.to(model.device).clone().requires_grad_()
            gradients.append(torch.autograd.grad(run(leaf), leaf, g.to(model.device))[0].cpu())
            _sum_up(watches.values())
    n_tokens = stream.shape[0] * stream.shape[1]
    found = {name: watch.sensitivity(n_tokens) for name, watch in watches.items() if watch.n_inputs}
    for name in watches.keys() - found.keys():  # an expert to whom no token came: as another of its stack
        others = [other for other in found if other.rpartition("[")[0] == name.rpartition("[")[0] != ""]
        if others:
            least = min(others, key=lambda other: found[other].information.sum().item())
            found[name] = found[least]
    return found, torch.cat(gradients)


class _Linears(TorchFunctionMode):
    """Watches every multiplication by one of some matrices, whichever module does it.

    Attributes:
        watches: by the matrices' names.
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.watches = {name: _Watch() for name in matrices}
        self._places = {(matrix.data_ptr(), matrix.shape): self.watches[name] for name, matrix in matrices.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of any function of torch's."""
        result = func(*args, **(kwargs or {}))
        if func in (linear, torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            first = 1 if func is torch.addmm else 0  # GPT-2's layers: bias, inputs, matrix
            x, matrix = args[first], args[first + 1]
            watch = self._places.get((matrix.data_ptr(), matrix.shape))
            if watch:
                watch.saw(x, result)
        return result


class _Watch:
    """Sums over what goes into a linear layer and over the gradients at what comes out.

    Attributes:
        leader: the first of those that read the same, as queries, keys and values do, which has their Gram matrix.
    """

    def __init__(self) -> None:
        self.n_inputs = 0
        self.leader = self
        self.inputs: list[Tensor] = []
        self._gram = torch.zeros(())
        self._squares = torch.zeros(())

    def saw(self, x: Tensor, output: Tensor) -> None:
        """One multiplication."""
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

    @cached_property
    def gram(self) -> Tensor:
        """Mean over the inputs that came."""
        return self._gram / self.n_inputs

    def sensitivity(self, n_tokens: int) -> Sensitivity:
        """The information is a mean over all tokens."""
        return Sensitivity(self.leader.gram, self._squares / n_tokens)


def _sum_up(watches: Collection[_Watch]) -> None:
    """Take in what the layers saw, of those that read the same once."""
    leaders: dict[tuple[int, ...], _Watch] = {}
    for watch in watches:
        if watch.inputs:
            watch.leader = leaders.setdefault(tuple(x.data_ptr() for x in watch.inputs), watch)
            if watch.leader is watch:
                watch.sum_up()
    for watch in watches:
        watch.inputs.clear()


def _embeddings(model: BlockwiseModel, hidden: Tensor, likely: Tensor, gradient: Tensor) -> dict[str, Sensitivity]:
    """Of the head, and of the embedding, by row; where they are one matrix, of both together.

    A token's row counts as often as the token occurs, tempered so that the mean cost stays what it is.
    """
    likely = likely.double().cpu().clamp_min(torch.finfo(torch.float32).tiny)
    rows = gradient.flatten(0, 1)
    backwards = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for window in gradient:
        backwards += (window.T @ window).double()
    per_row = {model.embedding: backwards / len(rows) / len(likely)}
    of_head = hidden.double().cpu() * likely.mean()
    per_row[model.head] = of_head + per_row[model.embedding] if model.head == model.embedding else of_head
    tempered = likely**_TEMPER
    tempered *= (likely / tempered).mean()
    return {name: Sensitivity(gram / likely.mean(), tempered) for name, gram in per_row.items()}
