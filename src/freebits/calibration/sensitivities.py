"""Measure how much a model's output depends on each of its matrices, by one forward and one backward pass.

The forward pass sums the inputs of each matrix; the backward pass sums the gradients at its outputs. Labels are sampled
from the model's own predictions, so the squared gradients are the model's Fisher information.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from freebits.calibration.engine import Engine, hidden_states
from freebits.calibration.observers import Product, Products, Region
from freebits.calibration.self_generated import sample_tokens
from freebits.errors import UnsupportedModelError, reason_of
from freebits.execution.progress import Progress
from freebits.execution.serialization import storable

MIN_EXPERT_VECTORS = 64
"""An expert with fewer input vectors is undersampled. Each expert gets this many vectors of the average one added."""
_N_RECENT = 4
"""Number of inputs that are remembered to find matrices that share their input."""
_SMALL_WIDTH = 1024
_GRAPH_DEPTH = 16
"""Number of steps from compared values back through the autograd graph, in search of a matrix."""


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs that several matrices share.

    Attributes:
        key: a unique name.
        regions: the matrices.
        n: number of nonzero input vectors.
        gram: mean of `x xᵀ` over them, (inputs, inputs).
    """

    key: str
    regions: tuple[Region, ...]
    n: int
    gram: Tensor


OnStatistics = Callable[[int, list[InputStatistics]], None]
"""Called after a block execution with its number and the statistics that it completes."""


@storable
@dataclass(frozen=True)
class Sums:
    """Measurements of a group of windows, without input statistics.

    Attributes:
        n_tokens: number of tokens.
        n_inputs: matrix → number of nonzero vectors that it multiplies.
        squares: matrix → sum of the squared gradients at each of its outputs, float64.
        lookups: embedding → `Σ g gᵀ` over the gradients at the rows that were looked up.
        head: `Σ x xᵀ` over the head's inputs; None if there is no head.
        likely: for each token of the vocabulary `Σ p (1 - p)` over its probabilities `p`, float64.
        scale: mean squared derivative of a logit with respect to the head's output, such as that of a final scale.
        router_tensors: matrices whose outputs are compared, such as routers; gradients do not measure their effect.
    """

    n_tokens: int
    n_inputs: Mapping[Region, int]
    squares: Mapping[Region, Tensor]
    lookups: Mapping[str, Tensor]
    head: Tensor | None
    likely: Tensor
    scale: float
    router_tensors: frozenset[Region]

    def __add__(self, other: "Sums") -> "Sums":
        head = None if self.head is None or other.head is None else self.head + other.head
        share = self.n_tokens / (self.n_tokens + other.n_tokens)
        return Sums(
            self.n_tokens + other.n_tokens,
            _added(self.n_inputs, other.n_inputs),
            _added(self.squares, other.squares),
            _added(self.lookups, other.lookups),
            head,
            self.likely + other.likely,
            share * self.scale + (1 - share) * other.scale,
            self.router_tensors | other.router_tensors,
        )


def _added(left: Mapping, right: Mapping) -> dict:  # type: ignore[type-arg]
    """Merge two mappings, and add the values of common keys."""
    common = left.keys() & right.keys()
    return {**left, **right, **{key: left[key] + right[key] for key in common}}


def measure(
    engine: Engine,
    windows: Tensor,
    start: int,
    seed: int,
    scratch: Path,
    on_statistics: OnStatistics,
    progress: Progress,
) -> Sums:
    """Run a forward and a backward pass on a group of windows.

    Args:
        engine: the model.
        windows: (windows, T), int64.
        start: number of the group's first window among all windows.
        seed: seed of the labels; each window adds its number to it.
        scratch: folder for data that does not fit into memory.
        on_statistics: receives input statistics as soon as they are complete; see `OnStatistics`.
        progress: called after each block of the forward and the backward pass.

    Raises:
        CheckpointError: predictions are not finite.
        UnsupportedModelError: no gradient reaches an embedding.
    """
    observer = _Observer(engine, on_statistics)
    n_runs, done = len(engine.runs), 0

    def report_block() -> None:
        nonlocal done
        done += 1
        progress("calibrating", "block", done, 2 * n_runs)

    def end_block(number: int) -> None:
        observer.end_block(number)
        report_block()

    engine.on_recompute = report_block
    with engine.stream_on_disk(windows, scratch):
        with observer.products:
            output = engine.hidden(windows, end_block)
            observer.end_block(n_runs)
            hidden = hidden_states(output)
            if not hidden.requires_grad:
                raise UnsupportedModelError("no gradient reaches an embedding of this model")
            likely, scale, gradients = _through_head(engine, output, windows, start, seed, observer)
        _backward(hidden, gradients)
    return Sums(
        windows.numel(),
        observer.n_inputs,
        observer.squares,
        observer.lookups,
        observer.head,
        likely.cpu(),
        scale,
        frozenset(observer.router_tensors),
    )


def _backward(hidden: Tensor, gradients: Tensor) -> None:
    try:
        hidden.backward(gradients)
    except Exception as error:  # transformers raises exceptions of many classes
        reason = reason_of(error)
        raise UnsupportedModelError(f"the backward pass of this model fails ({reason})") from error


def _through_head(
    engine: Engine, output: object, windows: Tensor, start: int, seed: int, observer: "_Observer"
) -> tuple[Tensor, float, Tensor]:
    """Run the head window by window.

    Returns:
        `likely` and `scale`, see `Sums`, and the gradient at the last hidden states.
    """
    hidden = hidden_states(output)
    gradients = torch.empty_like(hidden)
    likely = torch.zeros((), dtype=torch.float64, device=engine.device)
    squares_at_logits = 0.0
    with engine.head_loaded():
        for number, window in enumerate(windows):
            leaf = hidden[number : number + 1].detach().requires_grad_()
            logits = engine.run_head(output, leaf, window)[:-1]
            probabilities = logits.detach().softmax(-1)
            generator = torch.Generator(engine.device).manual_seed(seed + start + number)
            labels = sample_tokens(probabilities, generator)[:, 0]
            (gradients[number : number + 1],) = torch.autograd.grad(
                cross_entropy(logits, labels, reduction="sum"), leaf
            )
            likely = likely + (probabilities * (1 - probabilities)).sum(0).double()
            # The gradient at the logits is the probabilities minus 1 at the label.
            at_label = probabilities.gather(1, labels[:, None])
            squares_at_logits += (probabilities.square().sum() - 2 * at_label.sum() + len(at_label)).item()
    scale = observer.squares_at_head / squares_at_logits if observer.squares_at_head and squares_at_logits else 1.0
    return likely, scale, gradients


class _Observer:
    """Sums statistics of the inputs of every matrix, and of the gradients at its outputs."""

    def __init__(self, engine: Engine, on_statistics: OnStatistics) -> None:
        self._engine = engine
        self._on_statistics = on_statistics
        self._last_runs = {f"{block}.": number for number, block in enumerate(engine.runs)}
        self._recent = RecentInputs()
        self._grams: list[tuple[Tensor, int]] = []
        self._gram_numbers: dict[Region, list[int]] = {}
        self.n_inputs: dict[Region, int] = {}
        self.squares: dict[Region, Tensor] = {}
        self.lookups: dict[str, Tensor] = {}
        self.head: Tensor | None = None
        self.squares_at_head = 0.0
        self.router_tensors: set[Region] = set()
        self._region_of_node: dict[Any, Region] = {}
        self.products = Products(engine.find_parameter, self._add_product, self._start_gradient, self._note_choice)

    def _add_product(self, product: Product) -> None:
        region, result = product.region, product.result
        if region.name == self._engine.head:
            total = gram(product.inputs.detach()).cpu()
            self.head = total if self.head is None else self.head + total
            if result.requires_grad:
                result.register_hook(self._add_head_gradient)
            return
        number = self._gram_number(product.inputs.detach())
        self._gram_numbers.setdefault(region, []).append(number)
        self.n_inputs[region] = self.n_inputs.get(region, 0) + self._grams[number][1]
        if result.requires_grad:
            result.register_hook(partial(self._add_gradient, region, product.select))
            self._region_of_node[result.grad_fn] = region

    def _note_choice(self, compared: Tensor) -> None:
        """Find the matrices that compared values come from, through a few steps of the autograd graph."""
        nodes = {compared.grad_fn} if isinstance(compared, Tensor) else set()
        regions = self._region_of_node
        for _ in range(_GRAPH_DEPTH):
            self.router_tensors |= {regions[node] for node in nodes if node in regions}
            inner = [node for node in nodes if node is not None and node not in regions]
            nodes = {parent for node in inner for parent, _ in node.next_functions if parent is not None}

    def _add_gradient(self, region: Region, select: Callable[[Tensor], Tensor], gradient: Tensor) -> None:
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        squares = select(dense).square().sum(0).double().cpu()
        self.squares[region] = self.squares[region] + squares if region in self.squares else squares

    def _add_head_gradient(self, gradient: Tensor) -> None:
        self.squares_at_head += gradient.square().sum().item()

    def _gram_number(self, x: Tensor) -> int:
        """The index of the Gram matrix of `x`, which is computed only if no recent product had the same input."""
        number: int | None = self._recent.get(x)
        if number is None:
            number = len(self._grams)
            self._grams.append((gram(x), int(x.any(-1).sum())))
            self._recent.add(x, number)
        return number

    def _start_gradient(self, name: str, rows: Tensor) -> Tensor:
        """Return rows of an embedding that require a gradient."""
        leaf = rows.detach().requires_grad_()
        leaf.register_hook(partial(self._add_lookup_gradient, name))
        return leaf.clone()  # the model may change it in place, which autograd forbids for leaves and their views

    def _add_lookup_gradient(self, name: str, gradient: Tensor) -> None:
        total = gram(gradient.flatten(0, -2)).cpu()
        self.lookups[name] = self.lookups[name] + total if name in self.lookups else total

    def end_block(self, number: int) -> None:
        """After a block execution, pass on the statistics that are complete, and free their memory."""
        self._recent.clear()
        self._region_of_node.clear()
        complete = sorted(region for region in self._gram_numbers if self._last_use(region) <= number)
        sharing: dict[tuple[int, ...], list[Region]] = {}
        for region in complete:
            sharing.setdefault(tuple(self._gram_numbers.pop(region)), []).append(region)
        statistics: list[InputStatistics] = []
        for indices, regions in sharing.items():
            n = sum(self._grams[index][1] for index in indices)
            total = sum((self._grams[index][0] for index in indices[1:]), self._grams[indices[0]][0])
            key = f"{number}-{len(statistics)}"
            statistics.append(InputStatistics(key, tuple(regions), n, total.cpu() / max(1, n)))
        needed = {index for indices in self._gram_numbers.values() for index in indices}
        for index in range(len(self._grams)):
            if index not in needed:
                self._grams[index] = torch.empty(0), 0
        if statistics:
            self._on_statistics(number, statistics)

    def _last_use(self, region: Region) -> int:
        """The number of the last known block execution that multiplies by a matrix; -1 if there is none."""
        own_runs = [number for prefix, number in self._last_runs.items() if region.name.startswith(prefix)]
        return max([self._engine.last_uses.get(region.name, -1), *own_runs])


class RecentInputs:
    """Remembers a value for each of the last few inputs, as several matrices may share one (queries, keys, values)."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, int, Any]] = []

    def get(self, x: Tensor) -> Any:
        """Return the value of a tensor; None if the tensor is not among the last few."""
        view = (x.data_ptr(), x.shape, x.stride())
        for other, version, value in self._entries:  # an entry holds its tensor, so no other tensor reuses the memory
            if view == (other.data_ptr(), other.shape, other.stride()) and version == x._version:
                return value
        return None

    def add(self, x: Tensor, value: Any) -> None:
        """Remember the value of a tensor."""
        self._entries = [*self._entries[1 - _N_RECENT :], (x, x._version, value)]

    def clear(self) -> None:
        """Forget all values."""
        self._entries.clear()


def gram(x: Tensor) -> Tensor:
    """`xᵀ x`, (m, m), for `x` of shape (vectors, m). If `m` is large, the blocks below the diagonal are copies."""
    m = x.shape[1]
    if m < _SMALL_WIDTH:
        return x.T @ x
    G = x.new_empty(m, m)
    width = -(-m // 4)
    for start in range(0, m, width):
        stop = min(start + width, m)
        G[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        G[stop:, start:stop] = G[start:stop, stop:].T
    return G


def siblings(region: Region) -> tuple[str, int, bool]:
    """Return a key that all experts of one mixture share.

    It consists of the name, in which `*` replaces all numbers after the block's, the number of rows, and `transposed`.
    """
    names = region.name.split(".")
    block = next((index for index, name in enumerate(names) if name.isdigit()), len(names))
    pattern = [*names[: block + 1], *("*" if name.isdigit() else name for name in names[block + 1 :])]
    return ".".join(pattern), region.stop - region.start, region.transposed


def mix_experts(
    statistics: Sequence[InputStatistics], matrices: Mapping[str, tuple[int, ...]], key: str
) -> list[InputStatistics]:
    """Mix each expert's input statistics with those of the average expert (shrinkage), and add those of idle experts.

    Each expert gets `MIN_EXPERT_VECTORS` vectors of the average expert added. An expert that no text reaches has
    only those.

    Args:
        statistics: input statistics of a block.
        matrices: parameter → shape, of all matrices.
        key: prefix of the keys for idle experts.
    """
    groups: dict[tuple[tuple[str, int, bool], int], list[InputStatistics]] = {}
    for inputs in statistics:
        groups.setdefault((siblings(inputs.regions[0]), len(inputs.gram)), []).append(inputs)
    reached = {region for inputs in statistics for region in inputs.regions if inputs.n}
    result: list[InputStatistics] = []
    for number, group in enumerate(groups.values()):
        idle = {expert for inputs in group for region in inputs.regions for expert in _idle(region, reached, matrices)}
        n = sum(inputs.n for inputs in group)
        if (len(group) == 1 and not idle) or not n:
            result += group
            continue
        average = sum((inputs.gram * (inputs.n / n) for inputs in group[1:]), group[0].gram * (group[0].n / n))
        for inputs in group:
            if inputs.n:
                mixed = (inputs.gram * inputs.n + average * MIN_EXPERT_VECTORS) / (inputs.n + MIN_EXPERT_VECTORS)
                result.append(replace(inputs, gram=mixed))
        if idle:
            result.append(InputStatistics(f"{key}-idle-{number}", tuple(sorted(idle)), 0, average))
    return result


def _idle(region: Region, reached: set[Region], matrices: Mapping[str, tuple[int, ...]]) -> set[Region]:
    """The sibling experts of a region that no text reached, in the same parameter or in parameters of equal shape."""
    height = region.stop - region.start
    shape = matrices[region.name]
    n_rows = prod(shape[:-1])
    if region.start % height or n_rows % height:
        return set()
    sibling_key = siblings(region)
    experts = {
        Region(name, start, start + height, region.transposed)
        for name, other_shape in matrices.items()
        for start in range(0, n_rows, height)
        if other_shape == shape and siblings(replace(region, name=name)) == sibling_key
    }
    return experts - reached


def fisher_information(sums: Sums, regions: Iterable[Region]) -> dict[Region, Tensor]:
    """Region → mean squared gradient at each output over all tokens, of regions that a gradient reached.

    Each expert gets `MIN_EXPERT_VECTORS` vectors of the average expert added, as in `mix_experts`.
    """
    groups: dict[tuple[str, int, bool], list[Region]] = {}
    for region in regions:
        groups.setdefault(siblings(region), []).append(region)
    result: dict[Region, Tensor] = {}
    for group in groups.values():
        reached = [region for region in group if region in sums.squares]
        n = sum(sums.n_inputs[region] for region in reached)
        if not n:
            continue
        total = sum((sums.squares[region] for region in reached[1:]), sums.squares[reached[0]])
        added = total * (MIN_EXPERT_VECTORS / n if len(group) > 1 else 0.0)
        result |= {region: (sums.squares.get(region, 0.0) + added) / sums.n_tokens for region in group}
    return result
