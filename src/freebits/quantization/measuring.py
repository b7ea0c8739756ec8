"""Measure all matrices of a checkpoint: groups of windows are run independently of each other, and added in order."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from operator import add

import torch
from torch import Tensor

from freebits.calibration.engine import Engine
from freebits.calibration.groups import RunningModel, StoredStatistics, groups_of, measured_group
from freebits.calibration.products import Region
from freebits.calibration.sensitivities import (
    ENOUGH_VECTORS,
    InputStatistics,
    Sums,
    informations,
    measure,
    siblings,
    with_idle,
)
from freebits.execution.progress import Progress
from freebits.execution.stored_values import kept
from freebits.execution.work_store import Work
from freebits.integrations.naming import InMemory
from freebits.quantization.sensitivity_cache import Factor, Matrix, factor_of

_TEMPER = 0.25
"""Power with which a token's frequency counts: a text tells which tokens are rare, not how rare they are elsewhere."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        matrices: by the names of the checkpoint.
        n_experts: how many experts the mixtures have, counted by their matrices.
        n_undersampled: how many of them multiplied fewer than 64 vectors.
        choosing: names of tensors with matrices whose outputs are compared.
    """

    matrices: list[Matrix]
    n_experts: int
    n_undersampled: int
    choosing: frozenset[str]


@kept
@dataclass(frozen=True)
class _Factored:
    """Matrices, and what is known of what they read."""

    regions: tuple[Region, ...]
    factor: Factor


def measure_matrices(
    running: RunningModel,
    tokens: Tensor,
    work: Work,
    seed: int,
    rotation: int | None,
    progress: Progress,
    *,
    at_once: int = 2**31,
) -> Measured:
    """Run the calibration text, and find what is known of each matrix.

    Args:
        running: the model.
        tokens: (windows, T), int64.
        work: who runs it, and where results are kept.
        seed: of the labels that are drawn.
        rotation: seed of the rotation in which matrices are rounded, if any.
        progress: called after each block, forwards and backwards.
        at_once: bytes of activations of a block in the backward pass up to which windows are one group.
    """
    groups = groups_of(tokens, running.engine, at_once)
    if len(groups) == 1:  # sums are complete when a block is left
        sums, factored = work.once(
            "measured", partial(_measured_at_once, running, tokens, work, seed, rotation, progress)
        )
    else:
        measure_group = partial(measured_group, running, work.store, seed)
        results = []
        for done, result in enumerate(work.map_large("group", measure_group, groups), start=1):
            results.append(result)
            progress("calibrating", "group of windows", done, len(groups))
        sums = reduce(add, [result[0] for result in results])
        factored = _factored([result[1] for result in results], running.engine, work, rotation)
    information = informations(sums, [region for of in factored for region in of.regions])
    matrices = [
        matrix
        for of in factored
        for region in of.regions
        for matrix in _as_stored(region, of.factor, _known(information, region), running.named)
    ]
    matrices += _embeddings(running, sums, work, rotation)
    specs = [siblings(region) for of in factored for region in of.regions]
    experts = [region for of in factored for region in of.regions if specs.count(siblings(region)) > 1]
    thin = [region for region in experts if sums.n_inputs.get(region, 0) < ENOUGH_VECTORS]
    choosing = {rows.tensor for of in sums.choosing for rows in running.named.rows(of.name, of.start, of.stop)}
    return Measured(matrices, len(experts), len(thin), frozenset(choosing))


def _measured_at_once(
    running: RunningModel, tokens: Tensor, work: Work, seed: int, rotation: int | None, progress: Progress
) -> tuple[Sums, list[_Factored]]:
    """All windows in one group."""
    factored: list[_Factored] = []

    def finish(number: int, found: list[InputStatistics]) -> None:
        factored.extend(_factors(number, found, running.engine, work, rotation))

    sums = measure(running.engine, tokens, 0, seed, work.store.folder, finish, progress)
    return sums, factored


def _factored(
    groups: list[list[StoredStatistics]], engine: Engine, work: Work, rotation: int | None
) -> list[_Factored]:
    """What is known of what matrices read, from the Gram matrices of all groups."""
    read: dict[Region, list[StoredStatistics]] = {}
    for group in groups:
        for listed in group:
            for region in listed.regions:
                read.setdefault(region, []).append(listed)
    numbers: dict[int, dict[tuple[str, ...], list[Region]]] = {}
    for region, found in sorted(read.items()):
        keys = tuple(listed.key for listed in found)
        numbers.setdefault(max(listed.number for listed in found), {}).setdefault(keys, []).append(region)
    factored = []
    for number, together in sorted(numbers.items()):
        inputs = []
        for place, regions in enumerate(together.values()):
            found = read[regions[0]]
            n = sum(listed.n for listed in found)
            parts = [work.store.get(listed.key) * (listed.n / max(1, n)) for listed in found]
            inputs.append(InputStatistics(f"{number}-{place}", tuple(regions), n, sum(parts[1:], parts[0])))
        factored += _factors(number, inputs, engine, work, rotation)
        for keys in together:
            for key in keys:
                work.store.drop(key)
    return factored


def _factors(
    number: int, found: list[InputStatistics], engine: Engine, work: Work, rotation: int | None
) -> list[_Factored]:
    """What is known of the inputs that are complete after a block; the largest last, for all threads."""
    inputs = sorted(with_idle(found, engine.matrices, str(number)), key=lambda inputs: len(inputs.gram))
    factors = work.map(f"factor-{number}", partial(factor_of, work.store, rotation), inputs)
    return [_Factored(of.regions, factor) for of, factor in zip(inputs, factors, strict=True)]


def _known(information: Mapping[Region, Tensor], region: Region) -> Tensor | None:
    """The information of a matrix; of one that no gradient reached, the mean of its block (or of all) instead."""
    if region in information:
        return information[region]
    block = _block(region.name)
    auxiliary = [of.mean() for other, of in information.items() if _block(other.name) == block]
    auxiliary = auxiliary or [of.mean() for of in information.values()]
    return torch.stack(auxiliary).mean() if auxiliary else None


def _block(name: str) -> str:
    """What names of one block begin with."""
    return re.sub(r"^(\D*\d*).*", r"\1", name)


def _as_stored(region: Region, factor: Factor, information: Tensor | None, named: InMemory) -> Iterable[Matrix]:
    """A matrix as the checkpoint has it, where it may be several, or lie the other way round."""
    if information is None:
        return
    m = len(factor.diagonal)
    height = region.stop - region.start
    n_outputs = prod(named.specs[region.name].shape[-1:]) if region.transposed else height
    information = information.expand(n_outputs) if information.ndim == 0 else information
    for rows in named.rows(region.name, region.start, region.stop):
        in_order = torch.equal(rows.order, torch.arange(len(rows.order)))
        if region.transposed != rows.swapped:  # rows in the checkpoint are inputs
            whole = rows.stop - rows.start == m and (rows.swapped or in_order)
            of = information[rows.order] if rows.swapped else information
            transposed = True
        else:
            whole = not rows.swapped or in_order
            of = information if rows.swapped else information[rows.order]
            transposed = False
        if whole:
            yield Matrix(rows.tensor, rows.start, rows.stop, transposed, factor, of)


def _embeddings(running: RunningModel, sums: Sums, work: Work, rotation: int | None) -> list[Matrix]:
    """Embeddings and the head, by row; an embedding and a head that are one matrix both together.

    A token's row counts as often as the token occurs, tempered so that the mean cost stays what it is.
    """
    engine, named = running.engine, running.named
    likely = (sums.likely / sums.n_tokens).clamp_min(_TINY) * sums.scale
    tempered = likely**_TEMPER
    tempered *= (likely / tempered).mean() / likely.mean()
    per_row: dict[str, tuple[Tensor, Tensor]] = {}
    for name, outer in sums.lookups.items():
        n_rows = prod(named.specs[name].shape[:-1])
        weight = _resized(tempered, n_rows)
        per_row[name] = outer.double() / sums.n_tokens / n_rows, weight
    if engine.head is not None and sums.head is not None:
        of_head = sums.head.double() / sums.n_tokens * likely.mean()
        before = per_row.get(engine.head)
        of_both = of_head if before is None else of_head + before[0]
        per_row[engine.head] = of_both, _resized(tempered, prod(named.specs[engine.head].shape[:-1]))
    regions = [Region(name, 0, prod(named.specs[name].shape[:-1]), False) for name in per_row]
    inputs = [
        InputStatistics(f"embedding-{number}", (region,), sums.n_tokens, per_row[region.name][0])
        for number, region in enumerate(regions)
    ]
    factors = work.map("embedding", partial(factor_of, work.store, rotation), inputs)
    return [
        matrix
        for region, factor in zip(regions, factors, strict=True)
        for matrix in _as_stored(region, factor, per_row[region.name][1], named)
    ]


def _resized(weight: Tensor, n: int) -> Tensor:
    """For a table of another size than the vocabulary: what is missing counts as the mean does."""
    return torch.cat([weight[:n], weight.new_ones(max(0, n - len(weight)))])
