"""Round matrices to a goal, from what is known of each, and write them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from freebits.checkpoint import ENTRY, Checkpoint, CheckpointWriter, Source, shard_bytes
from freebits.codes import CODES
from freebits.errors import UsageError
from freebits.huggingface.sensitivity_cache import SensitivityCache, grouped
from freebits.kind import Kind
from freebits.options import GPTQ, INTEGERS, METHODS, PYRAMID, RTN
from freebits.packed import STEM, Contents, PackedFolder, Piece, Recipe, announced, digests_of, plain, staged
from freebits.quantization import (
    GROUP,
    Budget,
    Fixed,
    Rolling,
    gridded,
    pyramids,
    stepped,
)
from freebits.work import Executor, Progress

BITS, MOST_BITS = 4.0, 12
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
    """How the matrices are to be rounded, and how finely."""

    bits: float | None = None
    size: int | None = None
    kl: float | None = None
    method: str = INTEGERS

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.size, self.kl) if value is not None]
        if self.method not in METHODS:
            raise UsageError(f"there is no method {self.method!r}: choose one of {', '.join(METHODS)}")
        if len(given) > 1:
            raise UsageError("--bits, --target-size and --target-kl are each a target: give one")
        if (given and not 0 < given[0] < math.inf) or not 1 <= self.wanted_bits <= MOST_BITS:
            raise UsageError(f"a target of {given[0]}: give bits from 1 to {MOST_BITS}, or bytes or nats above 0")
        if self.method != INTEGERS and (self.size or self.kl):
            raise UsageError(f"method {self.method} has a fixed number of bits per weight: give --bits")
        if self.method in (GPTQ, RTN) and self.wanted_bits not in range(2, 9):
            raise UsageError(f"method {self.method} has 2 to 8 whole bits a number, not {self.bits}")

    @property
    def wanted_bits(self) -> float:
        """For a number, where nothing else is said."""
        return BITS if self.bits is None else self.bits

    @property
    def facts(self) -> dict[str, float]:
        """The target, for the history."""
        told = {"bits": self.bits, "target_size": self.size, "target_kl": self.kl}
        return {key: value for key, value in told.items() if value is not None} or {"bits": BITS}

    def tensors(self, W: Tensor, U: Tensor, rows: Tensor, amount: float) -> tuple[Tensor, ...]:
        """A matrix as its code takes it; `amount` is the `c` of integers, else bits."""
        if self.method == INTEGERS:
            matrix = stepped(W, U, rows, amount)
            return matrix.integers, matrix.rows, matrix.columns
        if self.method == PYRAMID:
            return pyramids(W, U, amount)
        return *gridded(W, U if self.method == GPTQ else None, int(amount)), torch.tensor([int(amount), GROUP])


def write_rounded(
    directory: Path,
    source: Checkpoint | PackedFolder,
    cache: SensitivityCache,
    goal: Goal,
    stage: str | None,
    executor: Executor,
    progress: Progress,
) -> Contents:
    """Round and write everything."""
    tensors = cache.tensors
    n_weights = {name: cache.kind(name).numel for name in cache.budgets}
    together = _TOGETHER if goal.method == INTEGERS else 0
    groups = grouped(tensors, n_weights, together, {tensor: _numbers(tensor) for tensor in tensors})
    last = {names[-1]: tensor for tensor, names in tensors.items()}
    rest = [name for name in source.kinds if name not in tensors]
    longest = {f"{group[0]}.{part}": Kind("U8", (1 << 39,)) for group in groups for part in _PARTS_OF[goal.method]}
    names = announced({name: source.kinds[name] for name in rest}) | {n: kind.shape for n, kind in longest.items()}
    shards = shard_bytes(source) if isinstance(source, Checkpoint) else None
    contents = Contents()
    with CheckpointWriter(directory, names, shards, STEM) as writer:
        for name in rest:
            piece = staged(plain({name: source[name]}), stage)
            contents.write(writer, piece, digests_of(piece))
        rolling = _rolling(cache, goal, groups, partial(_bytes_around, source, cache, contents, groups, names))
        for done, group in enumerate(groups, start=1):
            amount = rolling.next()
            most = 4 * amount
            while True:
                rounded = executor.map(partial(_rounded, cache, goal, amount), group)
                piece = _piece(cache, goal, group, [tensor for tensors in rounded for tensor in tensors])
                excess = rolling.spend(amount, 8.0 * sum(kind.n_bytes for kind, _ in piece.stored.values()))
                if not excess:
                    break
                amount *= max(1.002, 2.0 ** min(2.0, excess / max(1, sum(n_weights[name] for name in group))))
                if amount > most:
                    raise UsageError("so few bytes do not hold the headers: give more")
            complete = [last[name] for name in group if name in last]
            joining = tuple(recipe for tensor in complete for recipe in cache.joining(tensor, tensors[tensor]))
            contents.write(writer, piece + Piece(recipes=joining), digests_of(piece))
            progress(done, len(groups))
    return contents


def _rolling(
    cache: SensitivityCache, goal: Goal, groups: list[list[str]], around: Callable[[], int]
) -> Rolling | Fixed:
    """What says how finely each group is rounded."""
    n_weights = cache.n_weights
    if goal.method != INTEGERS:
        return Fixed(goal.wanted_bits)
    if goal.kl is not None:
        return Fixed(math.sqrt(24 * goal.kl / n_weights))
    bits = goal.wanted_bits * n_weights if goal.size is None else 8.0 * (goal.size - around())
    if bits < n_weights / 4:
        raise UsageError(
            f"a target of {goal.size} bytes leaves {max(bits, 0) / n_weights:.2f} bits per weight: give more"
        )
    return Rolling([Budget.sum(cache.budgets[name] for name in group) for group in groups], bits)


def _rounded(cache: SensitivityCache, goal: Goal, amount: float, name: str) -> tuple[Tensor, ...]:
    return goal.tensors(cache.matrix(name), *cache.known(name), amount)


def _piece(cache: SensitivityCache, goal: Goal, group: Sequence[str], tensors: list[Tensor]) -> Piece:
    """A group of matrices, coded, and turned back where they were rotated."""
    makes, recipes = cache.recipes(group)
    code = _CODE_OF.get(goal.method, goal.method)
    coded = CODES[code].encode(tensors, list(makes.values()))
    takes = {part: f"{group[0]}.{part}" for part in coded.parts}
    stored = {takes[part]: (Kind.of(tensor), tensor) for part, tensor in coded.parts.items()}
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
    tensors = sum(kind.n_bytes for kind in contents.stored.values())
    header = sum(len(name) + len(str(list(shape))) + ENTRY for name, shape in names.items())
    planned = [recipe for tensor, of in cache.tensors.items() for recipe in cache.joining(tensor, of)]
    for group in groups:
        makes, after = cache.recipes(group)
        planned += [Recipe(INTEGERS, {"message": f"{group[0]}.message"}, makes, {"bytes": 10**12}), *after]
    recipes = sum(len(json.dumps(recipe.facts)) + 1 for recipe in (*contents.recipes, *planned))
    digests = sum(len(name) + 40 for name in (*contents.stored, *(f"{group[0]}.message" for group in groups)))
    return tensors + header + recipes + digests + 3 * len(json.dumps(dict(source.config), indent=4)) + _AROUND
