"""Round matrices to a goal, from what is known of each, and write them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from freebits.codecs.registry import CODES
from freebits.errors import UsageError
from freebits.execution.executor import Executor
from freebits.execution.progress import Progress
from freebits.options import GPTQ, INTEGERS, METHODS, PYRAMID, RTN
from freebits.packed.contents import STEM, Contents, announced, digests_of
from freebits.packed.piece import Piece, plain, staged
from freebits.packed.reader import PackedFolder
from freebits.packed.recipe import Recipe
from freebits.quantization.group_rounding import GROUP, gridded
from freebits.quantization.pyramids import pyramids
from freebits.quantization.rate_control import FixedRate, RateController, RateModel
from freebits.quantization.scales import scaled_integers
from freebits.quantization.sensitivity_cache import SensitivityCache, grouped
from freebits.storage.folder import Checkpoint, Source
from freebits.storage.weights import ENTRY
from freebits.storage.writer import CheckpointWriter, shard_bytes
from freebits.types import TensorSpec

BITS, FALLBACK_BITS, MOST_BITS = 4.0, 6.0, 12
_TOGETHER = 1 << 22
"""Numbers that are coded together at least, where a block has as many."""
_CODE_OF = {GPTQ: "grid", RTN: "grid"}
_PARTS_OF = {
    INTEGERS: ("message",),
    PYRAMID: ("points", "scales", "norms", "levels"),
    GPTQ: ("words", "scales", "zeros"),
    RTN: ("words", "scales", "zeros"),
}
_AROUND = 2048
"""Bytes for the history and what else the manifest and `config.json` say once."""


@dataclass(frozen=True)
class Goal:
    """How the matrices are to be rounded, and how finely.

    Attributes:
        bits: for each weight on average.
        size: instead, bytes of the finished folder.
        kl: instead, KL divergence that is to be expected.
        method: see `quantize`.
        fallback_bits: for each weight of the matrices that no calibration reaches, on average.
    """

    bits: float | None = None
    size: int | None = None
    kl: float | None = None
    method: str = INTEGERS
    fallback_bits: float = FALLBACK_BITS

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.size, self.kl) if value is not None]
        if self.method not in METHODS:
            raise UsageError(f"there is no method {self.method!r}: choose one of {', '.join(METHODS)}")
        if len(given) > 1:
            raise UsageError("--bits, --target-size and --target-kl are each a target: give one")
        if (given and not 0 < given[0] < math.inf) or not 1 <= self.wanted_bits <= MOST_BITS:
            raise UsageError(f"a target of {given[0]}: give bits from 1 to {MOST_BITS}, or bytes or nats above 0")
        if not 1 <= self.fallback_bits <= MOST_BITS:
            raise UsageError(f"--fallback-bits {self.fallback_bits}: give 1 to {MOST_BITS}")
        if self.method != INTEGERS and (self.size or self.kl):
            raise UsageError(f"method {self.method} has a fixed number of bits per weight: give --bits")
        if self.method in (GPTQ, RTN) and self.wanted_bits not in range(2, 9):
            raise UsageError(f"method {self.method} has 2 to 8 whole bits per weight, not {self.bits}")

    @property
    def wanted_bits(self) -> float:
        """For a number, where nothing else is said."""
        return BITS if self.bits is None else self.bits

    @property
    def facts(self) -> dict[str, float]:
        """The target, for the history."""
        told = {"bits": self.bits, "target_size": self.size, "target_kl": self.kl}
        return {key: value for key, value in told.items() if value is not None} or {"bits": BITS}

    def tensors(self, W: Tensor, U: Tensor | None, rows: Tensor, columns: Tensor, amount: float) -> tuple[Tensor, ...]:
        """A matrix as its code takes it; `amount` is the `c` of integers, else bits."""
        if self.method == INTEGERS:
            matrix = scaled_integers(W, U, rows, columns, amount)
            return matrix.integers, matrix.rows, matrix.columns
        if self.method == PYRAMID and U is not None:
            return pyramids(W, U, amount)
        return *gridded(W, U if self.method == GPTQ else None, int(amount)), torch.tensor([int(amount), GROUP])


def write_rounded(
    directory: Path,
    source: Checkpoint | PackedFolder,
    cache: SensitivityCache,
    alone: SensitivityCache,
    goal: Goal,
    stage: str | None,
    executor: Executor,
    progress: Progress,
) -> Contents:
    """Round and write everything.

    Args:
        directory: where to write.
        source: the checkpoint.
        cache: the matrices that are rounded to the goal.
        alone: those that are rounded by their weights alone, at so many bits as the goal has for them.
        goal: how finely.
        stage: entropy stage of the other tensors.
        executor: who rounds.
        progress: called after each group of matrices.
    """
    tensors = alone.tensors | cache.tensors
    n_weights = {name: of.spec(name).numel for of in (alone, cache) for name in of.rate_models}
    together = _TOGETHER if goal.method == INTEGERS else 0
    first, groups = (
        grouped(of.tensors, n_weights, together, {tensor: _numbers(tensor) for tensor in of.tensors})
        for of in (alone, cache)
    )
    last = {names[-1]: tensor for tensor, names in tensors.items()}
    rest = [name for name in source.specs if name not in tensors]
    by_weights = replace(goal, method=INTEGERS)
    parts = [(group[0], INTEGERS) for group in first] + [(group[0], goal.method) for group in groups]
    longest = {f"{name}.{part}": TensorSpec("U8", (1 << 39,)) for name, method in parts for part in _PARTS_OF[method]}
    names = announced({name: source.specs[name] for name in rest}) | {n: spec.shape for n, spec in longest.items()}
    shards = shard_bytes(source) if isinstance(source, Checkpoint) else None
    contents = Contents()
    done, total = 0, sum(of.spec(name).n_bytes for of in (alone, cache) for name in of.rate_models)
    with CheckpointWriter(directory, names, shards, STEM) as writer:
        for name in rest:
            piece = staged(plain({name: source[name]}), stage)
            contents.write(writer, piece, digests_of(piece))

        def write(of: SensitivityCache, group: list[str], piece: Piece) -> None:
            complete = [last[name] for name in group if name in last]
            joining = tuple(recipe for tensor in complete for recipe in of.joining(tensor, tensors[tensor]))
            contents.write(writer, piece + Piece(recipes=joining), digests_of(piece))
            nonlocal done
            done += sum(of.spec(name).n_bytes for name in group)
            progress("quantizing", "byte", done, total)

        for group in first:
            n = sum(n_weights[name] for name in group)
            amount = RateModel.sum(alone.rate_models[name] for name in group).c(goal.fallback_bits * n)
            write(alone, group, _rounded_together(alone, by_weights, amount, group, executor))
        controller = _controller(cache, goal, groups, partial(_bytes_around, source, cache, contents, groups, names))
        for group in groups:
            write(cache, group, _fitting(cache, goal, controller, group, executor))
    return contents


def _controller(
    cache: SensitivityCache, goal: Goal, groups: list[list[str]], around: Callable[[], int]
) -> RateController | FixedRate:
    """What says how finely each group is rounded."""
    n_weights = cache.n_weights
    if goal.method != INTEGERS:
        return FixedRate(goal.wanted_bits)
    if goal.kl is not None:
        return FixedRate(math.sqrt(24 * goal.kl / n_weights))
    bits = goal.wanted_bits * n_weights if goal.size is None else 8.0 * (goal.size - around())
    if bits < n_weights / 4:
        raise UsageError(
            f"a target of {goal.size} bytes leaves {max(bits, 0) / n_weights:.2f} bits per weight: give more"
        )
    return RateController([RateModel.sum(cache.rate_models[name] for name in group) for group in groups], bits)


def _fitting(
    cache: SensitivityCache,
    goal: Goal,
    controller: RateController | FixedRate,
    group: Sequence[str],
    executor: Executor,
) -> Piece:
    """A group of matrices, rounded as finely as there are bytes left for it."""
    amount = controller.next()
    most = 4 * amount
    n_weights = max(1, sum(cache.spec(name).numel for name in group))
    while True:
        piece = _rounded_together(cache, goal, amount, group, executor)
        excess = controller.spend(amount, 8.0 * sum(spec.n_bytes for spec, _ in piece.stored.values()))
        if not excess:
            return piece
        amount *= max(1.002, 2.0 ** min(2.0, excess / n_weights))
        if amount > most and goal.size is None:  # of a tiny model, whose headers take more than its weights
            return piece
        if amount > most:
            raise UsageError("so few bytes do not hold the headers: give more")


def _rounded_together(
    cache: SensitivityCache, goal: Goal, amount: float, group: Sequence[str], executor: Executor
) -> Piece:
    rounded = executor.map(partial(_rounded, cache, goal, amount), group)
    return _piece(cache, goal, group, [tensor for tensors in rounded for tensor in tensors])


def _rounded(cache: SensitivityCache, goal: Goal, amount: float, name: str) -> tuple[Tensor, ...]:
    return goal.tensors(cache.matrix(name), *cache.known(name), amount)


def _piece(cache: SensitivityCache, goal: Goal, group: Sequence[str], tensors: list[Tensor]) -> Piece:
    """A group of matrices, coded, and turned back where they were rotated."""
    makes, recipes = cache.recipes(group)
    code = _CODE_OF.get(goal.method, goal.method)
    coded = CODES[code].encode(tensors, list(makes.values()))
    takes = {part: f"{group[0]}.{part}" for part in coded.parts}
    stored = {takes[part]: (TensorSpec.of(tensor), tensor) for part, tensor in coded.parts.items()}
    return Piece(stored, (Recipe(code, takes, makes, coded.params), *recipes))


def _numbers(name: str) -> tuple[int, ...]:
    """The numbers in a name; those of embeddings and heads have none."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _bytes_around(
    source: Source,
    cache: SensitivityCache,
    contents: Contents,
    groups: Sequence[Sequence[str]],
    names: Mapping[str, tuple[int, ...]],
) -> int:
    """At most what the finished folder has besides the messages: other tensors, headers, manifest, config."""
    tensors = sum(spec.n_bytes for spec in contents.stored.values())
    header = sum(len(name) + len(str(list(shape))) + ENTRY for name, shape in names.items())
    planned = [recipe for tensor, of in cache.tensors.items() for recipe in cache.joining(tensor, of)]
    for group in groups:
        makes, after = cache.recipes(group)
        planned += [Recipe(INTEGERS, {"message": f"{group[0]}.message"}, makes, {"bytes": 10**12}), *after]
    recipes = sum(len(json.dumps(recipe.facts)) + 1 for recipe in (*contents.recipes, *planned))
    digests = sum(len(name) + 40 for name in (*contents.stored, *(f"{group[0]}.message" for group in groups)))
    return tensors + header + recipes + digests + 3 * len(json.dumps(dict(source.config), indent=4)) + _AROUND
