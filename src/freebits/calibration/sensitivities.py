"""Measure how much a model's output depends on each of its matrices, with one forward and one backward pass.

The forward pass computes the Gram matrix of each matrix's inputs. The backward pass sums the squared gradients at each
matrix's outputs. Labels are sampled from the model's own predictions, so the squared gradients estimate the Fisher
information of the model.
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
from freebits.errors import UnsupportedModelError, is_out_of_memory, reason_of
from freebits.execution.progress import Progress
from freebits.execution.serialization import storable

MIN_EXPERT_VECTORS = 64
"""An expert with fewer input vectors than this is undersampled. Each expert's statistics are averaged with the
statistics of this many vectors of the average expert."""
_N_RECENT = 4
"""Number of recent inputs that are stored in order to find matrices that share an input."""
_SMALL_WIDTH = 1024
"""Number of inputs below which a Gram matrix is computed as one product."""
_GRAPH_DEPTH = 16
"""Number of steps back through the autograd graph, in search of the matrix that compared values come from."""


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs that several matrices share.

    Attributes:
        key: unique name of the statistics.
        regions: matrices that share the inputs.
        n: number of nonzero input vectors.
        gram: mean of `x xᵀ` over these vectors, (inputs, inputs).
    """

    key: str
    regions: tuple[Region, ...]
    n: int
    gram: Tensor


OnStatistics = Callable[[int, list[InputStatistics]], None]
"""Called after a block execution, with the index of this execution and the statistics that are now complete."""


@storable
@dataclass(frozen=True)
class Sums:
    """Measurements of a group of windows, except the input statistics.

    Attributes:
        n_tokens: number of tokens.
        n_inputs: matrix → number of nonzero vectors that this matrix multiplies.
        squares: matrix → sum of the squared gradients at each output of this matrix, (outputs,), float64.
        lookups: embedding → `Σ g gᵀ` over the gradients `g` at the rows that were looked up, (D, D).
        head: `Σ x xᵀ` over the inputs of the head, (D, D); None if the model has no head.
        likely: for each token of the vocabulary, `Σ p (1 - p)` over all predicted probabilities `p` of this token,
            (vocabulary,), float64.
        scale: mean squared derivative of a logit with respect to the head's output; not 1 if the model scales its
            logits.
        router_tensors: matrices whose outputs are compared, such as routers. Gradients do not measure what happens if
            the result of a comparison changes.
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
        engine: engine that runs the model.
        windows: (windows, T), int64.
        start: index of the group's first window among all windows.
        seed: seed for sampling the labels, which are tokens that the model predicts. The seed of a window is `seed`
            plus the index of the window.
        scratch: folder for data that does not fit into memory.
        on_statistics: callback for input statistics that have become complete, see `OnStatistics`.
        progress: callback after each block of the forward and the backward pass.

    Raises:
        CheckpointError: a prediction is not finite.
        UnsupportedModelError: no gradient reaches an embedding, or transformers cannot run one of the passes.
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
                raise UnsupportedModelError("gradients of this model do not reach any embedding")
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
        if is_out_of_memory(error):
            raise
        reason = reason_of(error)
        raise UnsupportedModelError(f"the backward pass of this model fails ({reason})") from error


def _through_head(
    engine: Engine, output: object, windows: Tensor, start: int, seed: int, observer: "_Observer"
) -> tuple[Tensor, float, Tensor]:
    """Run the head window by window.

    Returns:
        `likely` and `scale` (see `Sums`), and the gradient at the last hidden states, (windows, T, D).
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
            # The gradient at the logits equals the probabilities, minus 1 at the label.
            at_label = probabilities.gather(1, labels[:, None])
            squares_at_logits += (probabilities.square().sum() - 2 * at_label.sum() + len(at_label)).item()
    scale = observer.squares_at_head / squares_at_logits if observer.squares_at_head and squares_at_logits else 1.0
    return likely, scale, gradients


class _Observer:
    """Observer that sums statistics of the inputs of every matrix, and of the gradients at its outputs."""

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
        """Follow the autograd graph back from compared values, and record the matrices that the values come from."""
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
        """Return the index of the Gram matrix of `x`. Compute the matrix unless a recent product had the same input."""
        number: int | None = self._recent.get(x)
        if number is None:
            number = len(self._grams)
            self._grams.append((gram(x), int(x.any(-1).sum())))
            self._recent.add(x, number)
        return number

    def _start_gradient(self, name: str, rows: Tensor) -> Tensor:
        """Return a copy of an embedding's rows that requires a gradient."""
        leaf = rows.detach().requires_grad_()
        leaf.register_hook(partial(self._add_lookup_gradient, name))
        return leaf.clone()  # because the model may change the rows in place, which autograd forbids for leaves

    def _add_lookup_gradient(self, name: str, gradient: Tensor) -> None:
        total = gram(gradient.flatten(0, -2)).cpu()
        self.lookups[name] = self.lookups[name] + total if name in self.lookups else total

    def end_block(self, number: int) -> None:
        """Pass on the statistics that are complete after a block execution, and free their memory."""
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
        """Return the index of the last known block execution that multiplies by a matrix; -1 if none is known."""
        own_runs = [number for prefix, number in self._last_runs.items() if region.name.startswith(prefix)]
        return max([self._engine.last_uses.get(region.name, -1), *own_runs])


class RecentInputs:
    """A cache with a value for each of the last few inputs, because several matrices may share an input.

    For example, the matrices of queries, keys and values have the same input.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, int, Any]] = []

    def get(self, x: Tensor) -> Any:
        """Return the value that is stored for a tensor; None if the tensor is not one of the last few inputs."""
        view = (x.data_ptr(), x.shape, x.stride())
        for other, version, value in self._entries:  # entries hold tensors, so no other tensor reuses their memory
            if view == (other.data_ptr(), other.shape, other.stride()) and version == x._version:
                return value
        return None

    def add(self, x: Tensor, value: Any) -> None:
        """Store a value for a tensor."""
        self._entries = [*self._entries[1 - _N_RECENT :], (x, x._version, value)]

    def clear(self) -> None:
        """Delete all stored values."""
        self._entries.clear()


def gram(x: Tensor) -> Tensor:
    """Return `xᵀ x`, (m, m), for `x` of shape (vectors, m).

    If `m` is large, copy the blocks below the diagonal from the blocks above the diagonal.
    """
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
    """Return a key that is the same for corresponding matrices of all experts in a mixture of experts.

    The key consists of the name with `*` in place of each number after the block number, of the number of rows, and of
    `transposed`.
    """
    names = region.name.split(".")
    block = next((index for index, name in enumerate(names) if name.isdigit()), len(names))
    pattern = [*names[: block + 1], *("*" if name.isdigit() else name for name in names[block + 1 :])]
    return ".".join(pattern), region.stop - region.start, region.transposed


def mix_experts(
    statistics: Sequence[InputStatistics], matrices: Mapping[str, tuple[int, ...]], key: str
) -> list[InputStatistics]:
    """Mix the input statistics of each expert with those of the average expert (shrinkage).

    `MIN_EXPERT_VECTORS` vectors of the average expert are added to the vectors of each expert. An idle expert, which
    the calibration text does not use, gets the statistics of the average expert.

    Args:
        statistics: input statistics of the matrices of a block.
        matrices: parameter → shape, for all parameters that are matrices.
        key: prefix of the keys of the statistics of idle experts.

    Returns:
        The mixed statistics, including those of idle experts.
    """
    groups: dict[tuple[tuple[str, int, bool], int], list[InputStatistics]] = {}
    for inputs in statistics:
        groups.setdefault((siblings(inputs.regions[0]), len(inputs.gram)), []).append(inputs)
    used = {region for inputs in statistics for region in inputs.regions if inputs.n}
    result: list[InputStatistics] = []
    for number, group in enumerate(groups.values()):
        idle = {expert for inputs in group for region in inputs.regions for expert in _idle(region, used, matrices)}
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


def _idle(region: Region, used: set[Region], matrices: Mapping[str, tuple[int, ...]]) -> set[Region]:
    """Return the idle experts among an expert and its siblings.

    Siblings lie in the same parameter or in parameters of equal shape.
    """
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
    return experts - used


def fisher_information(sums: Sums, regions: Iterable[Region]) -> dict[Region, Tensor]:
    """Return region → mean squared gradient over all tokens at each output of the region, (outputs,), float64.

    `MIN_EXPERT_VECTORS` vectors of the average expert are added to the vectors of each expert, as in `mix_experts`. The
    result omits a region if neither this region nor a sibling has gradients.
    """
    groups: dict[tuple[str, int, bool], list[Region]] = {}
    for region in regions:
        groups.setdefault(siblings(region), []).append(region)
    result: dict[Region, Tensor] = {}
    for group in groups.values():
        with_gradients = [region for region in group if region in sums.squares]
        n = sum(sums.n_inputs[region] for region in with_gradients)
        if not n:
            continue
        total = sum((sums.squares[region] for region in with_gradients[1:]), sums.squares[with_gradients[0]])
        added = total * (MIN_EXPERT_VECTORS / n if len(group) > 1 else 0.0)
        result |= {region: (sums.squares.get(region, 0.0) + added) / sums.n_tokens for region in group}
    return result
