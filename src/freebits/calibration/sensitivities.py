"""Measure how much a model's output depends on each of its matrices: one pass forwards, one backwards.

What goes into a matrix is summed in the forward pass, the gradients at what comes out in the backward pass. Labels are
drawn from the model's own predictions, so that squared gradients are its Fisher information.
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

from freebits.calibration.engine import Engine, first
from freebits.calibration.products import Product, Products, Region
from freebits.calibration.self_generated import drawn
from freebits.errors import UnsupportedModelError, one_line
from freebits.execution.progress import Progress
from freebits.execution.stored_values import kept

ENOUGH_VECTORS = 64
"""Inputs below which an expert is thinly observed. As many of the average expert's inputs are added to each one's."""
_RECENT = 4
"""Inputs that are kept to find out which matrices read the same."""
_SMALL = 1024
_STEPS = 16
"""Steps of the autograd graph from a choice back to a matrix."""


@dataclass(frozen=True)
class InputStatistics:
    """What goes into matrices that read the same.

    Attributes:
        key: a name for it.
        regions: the matrices.
        n: how many vectors that are not zero.
        gram: mean of `x xᵀ` over them, (inputs, inputs).
    """

    key: str
    regions: tuple[Region, ...]
    n: int
    gram: Tensor


Finish = Callable[[int, list[InputStatistics]], None]
"""Takes the inputs that are complete after an execution of a block, with the number of the execution."""


@kept
@dataclass(frozen=True)
class Sums:
    """What was observed in a group of windows, besides inputs.

    Attributes:
        n_tokens: how many tokens.
        n_inputs: matrix → how many vectors that are not zero it multiplied.
        squares: matrix → sum of the squared gradients at each of its outputs, float64.
        lookups: embedding → `Σ g gᵀ` over the gradients at the rows that were looked up.
        head: `Σ x xᵀ` over the head's inputs; None where there is no head.
        likely: for each token of the vocabulary `Σ p (1 - p)` over its probabilities `p`, float64.
        scale: mean square of the derivative of a logit after the head's output, such as that of a final scale.
        choosing: matrices whose outputs are compared, such as those of routers: gradients do not tell what they do.
    """

    n_tokens: int
    n_inputs: Mapping[Region, int]
    squares: Mapping[Region, Tensor]
    lookups: Mapping[str, Tensor]
    head: Tensor | None
    likely: Tensor
    scale: float
    choosing: frozenset[Region]

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
            self.choosing | other.choosing,
        )


def _added(left: Mapping, right: Mapping) -> dict:  # type: ignore[type-arg]
    """Both, with the sums of what is in both."""
    both = left.keys() & right.keys()
    return {**left, **right, **{key: left[key] + right[key] for key in both}}


def measure(
    engine: Engine, windows: Tensor, start: int, seed: int, scratch: Path, finish: Finish, progress: Progress
) -> Sums:
    """Run a group of windows forwards and backwards.

    Args:
        engine: the model.
        windows: (windows, T), int64.
        start: number of the first of these windows among all.
        seed: of the labels, with the number of the window.
        scratch: folder for what does not fit into memory.
        finish: takes inputs as soon as they are complete; see `Finish`.
        progress: called after each block, forwards and backwards.

    Raises:
        CheckpointError: predictions are not finite.
        UnsupportedModelError: no gradient reaches an embedding.
    """
    observer = _Observer(engine, finish)
    n_runs, done = len(engine.runs), 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("calibrating", "block", done, 2 * n_runs)

    def left(number: int) -> None:
        observer.left(number)
        step()

    engine.on_recompute = step
    with engine.stream_on_disk(windows, scratch):
        with observer.products:
            output = engine.hidden(windows, left)
            observer.left(n_runs)
            hidden = first(output)
            if not hidden.requires_grad:
                raise UnsupportedModelError("no gradient reaches an embedding: it cannot be measured")
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
        frozenset(observer.choosing),
    )


def _backward(hidden: Tensor, gradients: Tensor) -> None:
    try:
        hidden.backward(gradients)
    except Exception as error:  # the library's kinds of error are many
        finding = one_line(" ".join(str(error).split()) or type(error).__name__, 200)
        raise UnsupportedModelError(
            f"no backward pass of this model runs ({finding}): it cannot be measured"
        ) from error


def _through_head(
    engine: Engine, output: object, windows: Tensor, start: int, seed: int, observer: "_Observer"
) -> tuple[Tensor, float, Tensor]:
    """Window by window: how likely tokens are, the scale of logits, and the gradient at the last hidden states."""
    hidden = first(output)
    gradients = torch.empty_like(hidden)
    likely = torch.zeros((), dtype=torch.float64, device=engine.device)
    at_logits = 0.0
    with engine.head_loaded():
        for number, window in enumerate(windows):
            leaf = hidden[number : number + 1].detach().requires_grad_()
            logits = engine.tail(output, leaf, window)[:-1]
            chances = logits.detach().softmax(-1)
            generator = torch.Generator(engine.device).manual_seed(seed + start + number)
            labels = drawn(chances, generator)[:, 0]
            (gradients[number : number + 1],) = torch.autograd.grad(
                cross_entropy(logits, labels, reduction="sum"), leaf
            )
            likely = likely + (chances * (1 - chances)).sum(0).double()
            of_label = chances.gather(1, labels[:, None])
            at_logits += (chances.square().sum() - 2 * of_label.sum() + len(of_label)).item()
    scale = observer.at_head / at_logits if observer.at_head and at_logits else 1.0
    return likely, scale, gradients


class _Observer:
    """Sums over what goes into every matrix, and over the gradients at what comes out."""

    def __init__(self, engine: Engine, finish: Finish) -> None:
        self._engine = engine
        self._finish = finish
        self._ends = {f"{block}.": number for number, block in enumerate(engine.runs)}
        self._recent = Recent()
        self._grams: list[tuple[Tensor, int]] = []
        self._reads: dict[Region, list[int]] = {}
        self.n_inputs: dict[Region, int] = {}
        self.squares: dict[Region, Tensor] = {}
        self.lookups: dict[str, Tensor] = {}
        self.head: Tensor | None = None
        self.at_head = 0.0
        self.choosing: set[Region] = set()
        self._made: dict[Any, Region] = {}
        self.products = Products(engine.parameter_at, self._product, self._lookup, self._choice)

    def _product(self, seen: Product) -> None:
        if seen.region.name == self._engine.head:
            total = gram(seen.inputs.detach()).cpu()
            self.head = total if self.head is None else self.head + total
            if seen.result.requires_grad:
                seen.result.register_hook(self._head_gradient)
            return
        number = self._number(seen.inputs.detach())
        self._reads.setdefault(seen.region, []).append(number)
        self.n_inputs[seen.region] = self.n_inputs.get(seen.region, 0) + self._grams[number][1]
        if seen.result.requires_grad:
            seen.result.register_hook(partial(self._gradient, seen.region, seen.at))
            self._made[seen.result.grad_fn] = seen.region

    def _choice(self, compared: Tensor) -> None:
        """Note the matrices that values come from which are compared, through a few steps of the autograd graph."""
        nodes = {compared.grad_fn} if isinstance(compared, Tensor) else set()
        for _ in range(_STEPS):
            self.choosing |= {self._made[node] for node in nodes if node in self._made}
            before = (of for node in nodes if node is not None and node not in self._made for of in node.next_functions)
            nodes = {of for of, _ in before if of is not None}

    def _gradient(self, region: Region, at: Callable[[Tensor], Tensor], gradient: Tensor) -> None:
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        squares = at(dense).square().sum(0).double().cpu()
        self.squares[region] = self.squares[region] + squares if region in self.squares else squares

    def _head_gradient(self, gradient: Tensor) -> None:
        self.at_head += gradient.square().sum().item()

    def _number(self, x: Tensor) -> int:
        """The number of a Gram matrix: of one that is there, if the same was read before."""
        number: int | None = self._recent.get(x)
        if number is None:
            number = len(self._grams)
            self._grams.append((gram(x), int(x.any(-1).sum())))
            self._recent.add(x, number)
        return number

    def _lookup(self, name: str, rows: Tensor) -> Tensor:
        """The rows of an embedding, with a gradient."""
        leaf = rows.detach().requires_grad_()
        leaf.register_hook(partial(self._outer, name))
        return leaf.clone()  # may be changed in place, which a leaf and views of it may not

    def _outer(self, name: str, gradient: Tensor) -> None:
        total = gram(gradient.flatten(0, -2)).cpu()
        self.lookups[name] = self.lookups[name] + total if name in self.lookups else total

    def left(self, number: int) -> None:
        """An execution of a block is over: hand on the inputs that are complete, and forget them."""
        self._recent.clear()
        self._made.clear()
        complete = sorted(region for region in self._reads if self._last_use(region) <= number)
        together: dict[tuple[int, ...], list[Region]] = {}
        for region in complete:
            together.setdefault(tuple(self._reads.pop(region)), []).append(region)
        found: list[InputStatistics] = []
        for numbers, regions in together.items():
            n = sum(self._grams[of][1] for of in numbers)
            total = sum((self._grams[of][0] for of in numbers[1:]), self._grams[numbers[0]][0])
            found.append(InputStatistics(f"{number}-{len(found)}", tuple(regions), n, total.cpu() / max(1, n)))
        needed = {of for numbers in self._reads.values() for of in numbers}
        for at in range(len(self._grams)):
            if at not in needed:
                self._grams[at] = torch.empty(0), 0
        if found:
            self._finish(number, found)

    def _last_use(self, region: Region) -> int:
        """The last execution of a block that multiplies by a matrix, as far as that is known."""
        own = [number for block, number in self._ends.items() if region.name.startswith(block)]
        return max([self._engine.used.get(region.name, -1), *own])


class Recent:
    """Remembers what belongs to the inputs that were read last: queries, keys and values read the same."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, int, Any]] = []

    def get(self, x: Tensor) -> Any:
        """What belongs to a tensor, if it is among the last; otherwise None."""
        place = (x.data_ptr(), x.shape, x.stride())
        for other, version, value in self._entries:  # which it keeps, so that no other lies in their memory
            if place == (other.data_ptr(), other.shape, other.stride()) and version == x._version:
                return value
        return None

    def add(self, x: Tensor, value: Any) -> None:
        """Remember something."""
        self._entries = [*self._entries[1 - _RECENT :], (x, x._version, value)]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


def gram(x: Tensor) -> Tensor:
    """`xᵀ x`, (m, m), of (vectors, m). Of large ones the blocks below the diagonal are copied, not computed."""
    m = x.shape[1]
    if m < _SMALL:
        return x.T @ x
    G = x.new_empty(m, m)
    width = -(-m // 4)
    for start in range(0, m, width):
        stop = min(start + width, m)
        G[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        G[stop:, start:stop] = G[start:stop, stop:].T
    return G


def siblings(region: Region) -> tuple[str, int, bool]:
    """What experts of one mixture have in common: the name but for numbers after the block's, rows, how they lie."""
    parts = region.name.split(".")
    block = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    spec = [*parts[: block + 1], *("*" if part.isdigit() else part for part in parts[block + 1 :])]
    return ".".join(spec), region.stop - region.start, region.transposed


def with_idle(
    found: Sequence[InputStatistics], matrices: Mapping[str, tuple[int, ...]], key: str
) -> list[InputStatistics]:
    """Inputs of a block, each expert's mixed with the average expert's (shrinkage).

    Each expert gets `ENOUGH_VECTORS` vectors of the average one added; an expert that no text reached has only those.

    Args:
        found: inputs in a block.
        matrices: the shapes of all matrices there, by the names of parameters.
        key: for what idle experts read.
    """
    groups: dict[tuple[tuple[str, int, bool], int], list[InputStatistics]] = {}
    for inputs in found:
        groups.setdefault((siblings(inputs.regions[0]), len(inputs.gram)), []).append(inputs)
    seen = {region for inputs in found for region in inputs.regions if inputs.n}
    result: list[InputStatistics] = []
    for number, group in enumerate(groups.values()):
        idle = {of for inputs in group for region in inputs.regions for of in _idle(region, seen, matrices)}
        n = sum(inputs.n for inputs in group)
        if (len(group) == 1 and not idle) or not n:
            result += group
            continue
        average = sum((inputs.gram * (inputs.n / n) for inputs in group[1:]), group[0].gram * (group[0].n / n))
        for inputs in group:
            if inputs.n:
                mixed = (inputs.gram * inputs.n + average * ENOUGH_VECTORS) / (inputs.n + ENOUGH_VECTORS)
                result.append(replace(inputs, gram=mixed))
        if idle:
            result.append(InputStatistics(f"{key}-idle-{number}", tuple(sorted(idle)), 0, average))
    return result


def _idle(region: Region, seen: set[Region], matrices: Mapping[str, tuple[int, ...]]) -> set[Region]:
    """The experts beside one that no text reached: in the same parameter, or in parameters of the same kind."""
    height = region.stop - region.start
    shape = matrices[region.name]
    n_rows = prod(shape[:-1])
    if region.start % height or n_rows % height:
        return set()
    spec = siblings(region)
    experts = {
        Region(name, start, start + height, region.transposed)
        for name, of in matrices.items()
        for start in range(0, n_rows, height)
        if of == shape and siblings(replace(region, name=name)) == spec
    }
    return experts - seen


def informations(sums: Sums, regions: Iterable[Region]) -> dict[Region, Tensor]:
    """The mean squared gradient at each output of matrices, over all tokens; of those that a gradient reached.

    Of experts as many inputs of the average one are counted in as for what they read, see `with_idle`.
    """
    groups: dict[tuple[str, int, bool], list[Region]] = {}
    for region in regions:
        groups.setdefault(siblings(region), []).append(region)
    found: dict[Region, Tensor] = {}
    for group in groups.values():
        reached = [region for region in group if region in sums.squares]
        n = sum(sums.n_inputs[region] for region in reached)
        if not n:
            continue
        total = sum((sums.squares[region] for region in reached[1:]), sums.squares[reached[0]])
        added = total * (ENOUGH_VECTORS / n if len(group) > 1 else 0.0)
        found |= {region: (sums.squares.get(region, 0.0) + added) / sums.n_tokens for region in group}
    return found
