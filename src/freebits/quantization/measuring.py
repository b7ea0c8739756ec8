"""Measure the matrices of a checkpoint by running the model on calibration text.

Groups of windows are measured independently, and the sums of all groups are added in a fixed order.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from operator import add

import torch
from torch import Tensor

from freebits.calibration.engine import Engine
from freebits.calibration.groups import RunningModel, StoredStatistics, measure_group, split_into_groups
from freebits.calibration.observers import Region
from freebits.calibration.sensitivities import (
    MIN_EXPERT_VECTORS,
    InputStatistics,
    Sums,
    fisher_information,
    measure,
    mix_experts,
    siblings,
)
from freebits.execution.progress import Progress
from freebits.execution.serialization import storable
from freebits.execution.work_store import Work
from freebits.integrations.naming import TransformersView
from freebits.quantization.sensitivity_cache import Factor, Matrix, store_factor

_TEMPER = 0.25
"""Exponent that is applied to the frequencies of tokens. One text shows which tokens are rare, but not how rare these
tokens are in other texts."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Measurements:
    """The result of `measure_matrices`.

    Attributes:
        matrices: measured matrices, under the names of the checkpoint.
        n_experts: number of expert matrices.
        n_undersampled: number of expert matrices with fewer than `MIN_EXPERT_VECTORS` input vectors.
        router_tensors: names of the tensors with matrices whose outputs are compared, such as routers.
    """

    matrices: list[Matrix]
    n_experts: int
    n_undersampled: int
    router_tensors: frozenset[str]


@storable
@dataclass(frozen=True)
class _InputFactor:
    """The matrices that share some inputs, and the inverse-Hessian Cholesky factor of these inputs."""

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
    max_activation_bytes: int = 2**31,
) -> Measurements:
    """Run the model on the calibration text, and measure how much the output depends on each matrix.

    Args:
        running: model to run.
        tokens: windows of the calibration text, (windows, T), int64.
        work: executor and work store of the computation.
        seed: seed for sampling the labels.
        rotation: seed of the rotation that is applied to matrices before rounding; None for no rotation.
        progress: callback after each block of the forward and the backward pass, or after each group of windows.
        max_activation_bytes: maximum bytes of a block's activations for one group of windows; see `split_into_groups`.

    Raises:
        CheckpointError: an input, a prediction or a tensor is damaged or not finite.
        UnsupportedModelError: see `measure`.
    """
    groups = split_into_groups(tokens, running.engine, max_activation_bytes)
    if len(groups) == 1:  # the Gram matrices of a block are complete when the block has run, so none is stored
        sums, factors = work.once(
            "measured", partial(_measured_at_once, running, tokens, work, seed, rotation, progress)
        )
    else:
        measure_one = partial(measure_group, running, work.store, seed)
        results = []
        for done, result in enumerate(work.map_large("group", measure_one, groups), start=1):
            results.append(result)
            progress("calibrating", "group of windows", done, len(groups))
        sums = reduce(add, [result[0] for result in results])
        factors = _merged_factors([result[1] for result in results], running.engine, work, rotation)
    regions = [region for inputs in factors for region in inputs.regions]
    information = fisher_information(sums, regions)
    matrices = [
        matrix
        for inputs in factors
        for region in inputs.regions
        for matrix in _as_stored(region, inputs.factor, _information_of(information, region), running.named)
    ]
    matrices += _embeddings(running, sums, work, rotation)
    n_siblings = Counter(map(siblings, regions))
    experts = [region for region in regions if n_siblings[siblings(region)] > 1]
    undersampled = [region for region in experts if sums.n_inputs.get(region, 0) < MIN_EXPERT_VECTORS]
    router_tensors = {
        rows.tensor
        for region in sums.router_tensors
        for rows in running.named.rows(region.name, region.start, region.stop)
    }
    return Measurements(matrices, len(experts), len(undersampled), frozenset(router_tensors))


def _measured_at_once(
    running: RunningModel, tokens: Tensor, work: Work, seed: int, rotation: int | None, progress: Progress
) -> tuple[Sums, list[_InputFactor]]:
    """Measure all windows as one group, and return the sums and the factors of all inputs."""
    factors: list[_InputFactor] = []

    def finish(number: int, complete: list[InputStatistics]) -> None:
        factors.extend(_factors(number, complete, running.engine, work, rotation))

    sums = measure(running.engine, tokens, 0, seed, work.store.folder, finish, progress)
    return sums, factors


def _merged_factors(
    groups: list[list[StoredStatistics]], engine: Engine, work: Work, rotation: int | None
) -> list[_InputFactor]:
    """Average the Gram matrices of all groups of windows, delete them, and return the factors of the averages."""
    by_region: dict[Region, list[StoredStatistics]] = {}
    for group in groups:
        for statistics in group:
            for region in statistics.regions:
                by_region.setdefault(region, []).append(statistics)
    by_block: dict[int, dict[tuple[str, ...], list[Region]]] = {}
    for region, parts in sorted(by_region.items()):
        keys = tuple(part.key for part in parts)
        by_block.setdefault(max(part.number for part in parts), {}).setdefault(keys, []).append(region)
    factors = []
    for number, by_keys in sorted(by_block.items()):
        inputs = []
        for index, regions in enumerate(by_keys.values()):
            parts = by_region[regions[0]]
            n = sum(part.n for part in parts)
            grams = [work.store.get(part.key) * (part.n / max(1, n)) for part in parts]
            inputs.append(InputStatistics(f"{number}-{index}", tuple(regions), n, sum(grams[1:], grams[0])))
        factors += _factors(number, inputs, engine, work, rotation)
        for keys in by_keys:
            for key in keys:
                work.store.drop(key)
    return factors


def _factors(
    number: int, complete: list[InputStatistics], engine: Engine, work: Work, rotation: int | None
) -> list[_InputFactor]:
    """Compute the factors of the inputs that are complete after a block, from the smallest to the largest.

    The largest factor comes last, because an executor of threads computes the last item with all threads of PyTorch.
    """
    inputs = sorted(mix_experts(complete, engine.matrices, str(number)), key=lambda inputs: len(inputs.gram))
    factors = work.map(f"factor-{number}", partial(store_factor, work.store, rotation), inputs)
    return [_InputFactor(statistics.regions, factor) for statistics, factor in zip(inputs, factors, strict=True)]


def _information_of(information: Mapping[Region, Tensor], region: Region) -> Tensor | None:
    """Return the Fisher information of a matrix.

    If the matrix has no gradients, return the mean over its block. If no matrix of the block has gradients, return the
    mean over all matrices. If no matrix of the model has gradients, return None.
    """
    if region in information:
        return information[region]
    block = _block(region.name)
    means = [values.mean() for other, values in information.items() if _block(other.name) == block]
    means = means or [values.mean() for values in information.values()]
    return torch.stack(means).mean() if means else None


def _block(name: str) -> str:
    """Return the prefix of a name that all names of the same block share."""
    return re.sub(r"^(\D*\d*).*", r"\1", name)


def _as_stored(region: Region, factor: Factor, information: Tensor | None, named: TransformersView) -> Iterable[Matrix]:
    """Yield the checkpoint's matrices, possibly transposed, that hold the rows of a matrix of the running model."""
    if information is None:
        return
    m = len(factor.diagonal)
    height = region.stop - region.start
    n_outputs = prod(named.specs[region.name].shape[-1:]) if region.transposed else height
    information = information.expand(n_outputs) if information.ndim == 0 else information
    for rows in named.rows(region.name, region.start, region.stop):
        in_order = torch.equal(rows.order, torch.arange(len(rows.order)))
        if region.transposed != rows.swapped:  # each row in the checkpoint belongs to one input
            complete = rows.stop - rows.start == m and (rows.swapped or in_order)
            row_information = information[rows.order] if rows.swapped else information
            transposed = True
        else:
            complete = not rows.swapped or in_order
            row_information = information if rows.swapped else information[rows.order]
            transposed = False
        if complete:
            yield Matrix(rows.tensor, rows.start, rows.stop, transposed, factor, row_information)


def _embeddings(running: RunningModel, sums: Sums, work: Work, rotation: int | None) -> list[Matrix]:
    """Return the embeddings and the head as matrices.

    If the embedding is tied to the head, their Gram matrices are added. The Fisher information of a row is a power of
    the frequency with which the model predicts the row's token (`_TEMPER`). A factor scales the powers so that the mean
    KL divergence per weight is `c² / 24`, as in other matrices; see `freebits.quantization.scales`.
    """
    engine, named = running.engine, running.named
    likely = (sums.likely / sums.n_tokens).clamp_min(_TINY) * sums.scale
    tempered = likely**_TEMPER
    tempered *= (likely / tempered).mean() / likely.mean()
    gram_and_weight: dict[str, tuple[Tensor, Tensor]] = {}
    for name, outer in sums.lookups.items():
        n_rows = prod(named.specs[name].shape[:-1])
        weight = _resized(tempered, n_rows)
        gram_and_weight[name] = outer.double() / sums.n_tokens / n_rows, weight
    if engine.head is not None and sums.head is not None:
        gram = sums.head.double() / sums.n_tokens * likely.mean()
        embedding = gram_and_weight.get(engine.head)
        gram = gram if embedding is None else gram + embedding[0]
        gram_and_weight[engine.head] = gram, _resized(tempered, prod(named.specs[engine.head].shape[:-1]))
    regions = [Region(name, 0, prod(named.specs[name].shape[:-1]), False) for name in gram_and_weight]
    inputs = [
        InputStatistics(f"embedding-{number}", (region,), sums.n_tokens, gram_and_weight[region.name][0])
        for number, region in enumerate(regions)
    ]
    factors = work.map("embedding", partial(store_factor, work.store, rotation), inputs)
    return [
        matrix
        for region, factor in zip(regions, factors, strict=True)
        for matrix in _as_stored(region, factor, gram_and_weight[region.name][1], named)
    ]


def _resized(weight: Tensor, n: int) -> Tensor:
    """Return `n` row weights: drop the last weights, or append ones, if the vocabulary has another size than `n`."""
    return torch.cat([weight[:n], weight.new_ones(max(0, n - len(weight)))])
