"""Round matrices to a target, based on the measurements of each matrix, and write the rounded matrices."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from freebits.errors import UsageError
from freebits.execution.executor import Executor
from freebits.execution.progress import Progress
from freebits.options import INTEGERS, PYRAMID, TRELLIS
from freebits.packed.contents import STEM, Contents, announced, digested
from freebits.packed.encoded_piece import Piece, plain, staged
from freebits.packed.recipe import Recipe
from freebits.quantization.differences import Differences
from freebits.quantization.quantizers import QUANTIZERS, Quantizer, with_trellis
from freebits.quantization.rate_control import FixedRate, RateController, RateModel
from freebits.quantization.sensitivity_cache import SensitivityCache, coding_groups
from freebits.quantization.trellis import GAINS, check_trellis
from freebits.storage.checkpoint import Folder, Source
from freebits.storage.safetensors_files import ENTRY
from freebits.storage.writer import CheckpointWriter
from freebits.types import TensorSpec

BITS, FALLBACK_BITS, MAX_BITS, MAX_PYRAMID_BITS = 4.0, 6.0, 12, 6
LEAST_DIFFERENCE_BITS = 0.1
"""Lower bound of the bits per weight of differences from a base."""
_MIN_GROUP = 1 << 22
"""Number of weights at which a group of matrices is complete. The integers of a group are encoded together."""
_CHECK_BYTES = 100
"""Bytes reserved in the manifest for the digest or the sums of each recipe."""
_FIXED_OVERHEAD = 2048
"""Bytes reserved for the history and for all other entries that the manifest and `config.json` contain only once."""


@dataclass(frozen=True)
class Goal:
    """The rounding method, and one target for the result.

    Attributes:
        bits: average bits per weight; without any target, 4.
        size: largest size of the finished folder in bytes; replaces `bits`.
        kl: expected KL divergence in nats per token; replaces `bits`.
        method: rounding method, see `quantize`.
        fallback_bits: average bits per weight of the matrices that are rounded without calibration.
        trellis: number of states of the trellis of method `integers`; 0 for no trellis. Other methods ignore it.
        least_bits: lower bound of `bits`.
    """

    bits: float | None = None
    size: int | None = None
    kl: float | None = None
    method: str = INTEGERS
    fallback_bits: float = FALLBACK_BITS
    trellis: int = TRELLIS
    least_bits: float = 1.0

    def __post_init__(self) -> None:
        targets = self._targets
        if self.method not in QUANTIZERS:
            raise UsageError(f"`method` is {self.method!r}: choose {' or '.join(QUANTIZERS)}")
        if len(targets) > 1:
            raise UsageError("`bits`, `target_size` and `target_kl` cannot be combined: give only one")
        for name, value in targets.items():
            if name == "bits" and not self.least_bits <= value <= MAX_BITS:
                raise UsageError(f"`bits` is {value}: give a number from {self.least_bits:g} to {MAX_BITS}")
            if not 0 < value < math.inf:
                raise UsageError(f"`{name}` is {value}: give a finite number above 0")
        if not 1 <= self.fallback_bits <= MAX_BITS:
            raise UsageError(f"`fallback_bits` is {self.fallback_bits}: give a number from 1 to {MAX_BITS}")
        if not self.quantizer.adaptive and (self.size or self.kl):
            target = "target_size" if self.size else "target_kl"
            raise UsageError(f"method {self.method} cannot aim at `{target}`: give `bits` instead")
        if self.method == PYRAMID and self.bits_per_weight > MAX_PYRAMID_BITS:
            raise UsageError(f"`bits` is {self.bits}: give at most {MAX_PYRAMID_BITS} for method {PYRAMID}")
        check_trellis(self.trellis)
        if self.quantizer.whole_bits and self.bits_per_weight not in range(2, 9):
            raise UsageError(f"`bits` is {self.bits}: give a whole number from 2 to 8 for method {self.method}")

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer of the method."""
        return with_trellis(self.trellis) if self.method == INTEGERS else QUANTIZERS[self.method]

    @property
    def _targets(self) -> dict[str, float]:
        targets = {"bits": self.bits, "target_size": self.size, "target_kl": self.kl}
        return {name: value for name, value in targets.items() if value is not None}

    @property
    def bits_per_weight(self) -> float:
        """The target in bits per weight, or the default target."""
        return BITS if self.bits is None else self.bits

    @property
    def facts(self) -> dict[str, float]:
        """The target and the trellis, in the form in which the history records them."""
        return (self._targets or {"bits": BITS}) | ({"trellis": self.trellis} if self.method == INTEGERS else {})


def write_rounded(
    directory: Path,
    source: Folder,
    cache: SensitivityCache,
    weights_only: SensitivityCache,
    goal: Goal,
    stage: str | None,
    executor: Executor,
    progress: Progress,
    differences: Differences | None = None,
) -> Contents:
    """Round the matrices and write all tensors.

    Args:
        directory: folder to write to.
        source: checkpoint to round.
        cache: matrices that are rounded to the target, with their measurements.
        weights_only: matrices that are rounded without calibration, to `fallback_bits` of the goal.
        goal: rounding method and target.
        stage: entropy stage of the tensors that are not rounded; None stores these tensors without one.
        executor: executor that runs the rounding.
        progress: callback after each group of matrices.
        differences: the model as differences from its base, which are rounded instead of the matrices; None if there
            is no base.

    Returns:
        The recipes and digests for the manifest.

    Raises:
        UsageError: the target size cannot be reached.
    """
    caches = weights_only, cache
    tensors = weights_only.tensors | cache.tensors
    n_weights = {name: subset.spec(name).numel for subset in caches for name in subset.rate_models}
    min_weights = _MIN_GROUP if goal.quantizer.adaptive else 0
    fallback_groups, groups = (
        coding_groups(subset.tensors, n_weights, min_weights, {tensor: _numbers(tensor) for tensor in subset.tensors})
        for subset in caches
    )
    completes = {names[-1]: tensor for tensor, names in tensors.items()}
    not_rounded = [name for name in source.specs if name not in tensors]
    parts = [f"{group[0]}.{part}" for group in groups for part in goal.quantizer.parts]
    parts += [f"{group[0]}.message" for group in fallback_groups]
    shapes = announced({name: source.specs[name] for name in not_rounded}) | dict.fromkeys(parts, (1 << 39,))
    contents = Contents()
    done, total = 0, sum(subset.spec(name).n_bytes for subset in caches for name in subset.rate_models)
    with CheckpointWriter(directory, shapes, source.shard_bytes, STEM) as writer:
        for name in not_rounded:
            contents.write(writer, *_exact_piece(name, source[name], stage, differences))

        def write(subset: SensitivityCache, group: list[str], piece: Piece) -> None:
            complete = [completes[name] for name in group if name in completes]
            joins = tuple(recipe for tensor in complete for recipe in subset.join_recipes(tensor, tensors[tensor]))
            contents.write(writer, *_finished_piece(piece, joins, differences))
            nonlocal done
            done += sum(subset.spec(name).n_bytes for name in group)
            progress("quantizing", "byte", done, total)

        for group in fallback_groups:
            n = sum(n_weights[name] for name in group)
            c = RateModel.sum(weights_only.rate_models[name] for name in group).c(goal.fallback_bits * n)
            piece = _rounded_group(weights_only, replace(goal, method=INTEGERS), c, group, executor)
            write(weights_only, group, piece)
        overhead = partial(_overhead_bytes, source, cache, contents, groups, shapes, differences)
        controller = _controller(cache, goal, groups, overhead)
        for group in groups:
            write(cache, group, _fitting_group(cache, goal, controller, group, executor))
    return contents


def _exact_piece(
    name: str, tensor: Tensor, stage: str | None, differences: Differences | None
) -> tuple[Piece, dict[str, str]]:
    """Encode a tensor that is not rounded. Return the piece, and the digests of the stored tensors."""
    if differences:
        return digested(*differences.exact(name, tensor, stage))
    return digested(staged(plain({name: tensor}), stage))


def _finished_piece(
    piece: Piece, joins: tuple[Recipe, ...], differences: Differences | None
) -> tuple[Piece, dict[str, str]]:
    """Add checks to a piece, and recipes that join matrices of this and earlier pieces. Return the same."""
    if not differences:
        checked, digests = digested(piece)
        return checked + Piece(recipes=joins), digests
    checked, digests = digested(*differences.on_base(piece))
    return checked + differences.on_base(Piece(recipes=joins))[0], digests


def _controller(
    cache: SensitivityCache, goal: Goal, groups: list[list[str]], overhead: Callable[[], int]
) -> RateController | FixedRate:
    """Return the controller that chooses the rate parameter for each group; see `Quantizer`."""
    n_weights = cache.n_weights
    if not goal.quantizer.adaptive:
        return FixedRate(goal.bits_per_weight)
    if goal.kl is not None:
        return FixedRate(math.sqrt(24 * goal.kl / n_weights / GAINS[goal.trellis]))
    bits = goal.bits_per_weight * n_weights if goal.size is None else 8.0 * (goal.size - overhead())
    if bits < goal.least_bits / 4 * n_weights:
        raise UsageError(
            f"a target of {goal.size} bytes leaves {max(bits, 0) / n_weights:.2f} bits per weight: give a larger target"
        )
    return RateController([RateModel.sum(cache.rate_models[name] for name in group) for group in groups], bits)


def _fitting_group(
    cache: SensitivityCache,
    goal: Goal,
    controller: RateController | FixedRate,
    group: Sequence[str],
    executor: Executor,
) -> Piece:
    """Round and encode a group of matrices.

    While the last group takes more bits than remain, repeat with larger scales.
    """
    rate_parameter = controller.next()
    max_rate_parameter = 4 * rate_parameter
    n_weights = max(1, sum(cache.spec(name).numel for name in group))
    while True:
        piece = _rounded_group(cache, goal, rate_parameter, group, executor)
        excess = controller.spend(rate_parameter, 8.0 * sum(spec.n_bytes for spec, _ in piece.stored.values()))
        if not excess:
            return piece
        rate_parameter *= max(1.002, 2.0 ** min(2.0, excess / n_weights))
        if rate_parameter > max_rate_parameter:
            if goal.size is None:  # no size was required; in a tiny model, side data can take more bits than weights
                return piece
            raise UsageError(f"a target of {goal.size} bytes has no room for the headers: give a larger target")


def _rounded_group(
    cache: SensitivityCache, goal: Goal, rate_parameter: float, group: Sequence[str], executor: Executor
) -> Piece:
    """Round and encode a group of matrices."""
    results = executor.map(partial(_rounded_matrix, cache, goal, rate_parameter), group)
    return _encoded_group(cache, goal, group, [tensor for tensors in results for tensor in tensors])


def _rounded_matrix(cache: SensitivityCache, goal: Goal, rate_parameter: float, name: str) -> tuple[Tensor, ...]:
    matrix, base = cache.matrix(name), cache.base_matrix(name)
    return goal.quantizer.round(matrix, *cache.factor_and_scales(name), rate_parameter, base)


def _encoded_group(cache: SensitivityCache, goal: Goal, group: Sequence[str], tensors: list[Tensor]) -> Piece:
    """Encode a group of rounded matrices, and add the recipes that undo rotation and transposition."""
    makes, recipes = cache.recipes(group)
    coded = goal.quantizer.encode(tensors, list(makes.values()))
    takes = {part: f"{group[0]}.{part}" for part in coded.parts}
    stored = {takes[part]: (TensorSpec.of(tensor), tensor) for part, tensor in coded.parts.items()}
    return Piece(stored, (Recipe(goal.quantizer.code, takes, makes, coded.params), *recipes))


def _numbers(name: str) -> tuple[int, ...]:
    """Return the numbers in a tensor's name. Names of embeddings and heads usually have no numbers."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _overhead_bytes(
    source: Source,
    cache: SensitivityCache,
    contents: Contents,
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    differences: Differences | None,
) -> int:
    """Return an upper bound for the bytes of the finished folder without the bitstreams of the matrices.

    The bound counts the other tensors, the headers, the manifest and the config.
    """
    tensors = sum(spec.n_bytes for spec in contents.stored.values())
    header = sum(len(name) + len(str(list(shape))) + ENTRY for name, shape in shapes.items())
    planned = [recipe for tensor, names in cache.tensors.items() for recipe in cache.join_recipes(tensor, names)]
    for group in groups:
        makes, later_recipes = cache.recipes(group)
        planned += [Recipe(INTEGERS, {"message": f"{group[0]}.message"}, makes, {"bytes": 10**12}), *later_recipes]
    if differences:
        planned = [*differences.added(planned)]
        tensors += len(json.dumps(differences.expected_base(contents.base).facts))
    recipes = sum(len(json.dumps(recipe.facts)) + 1 for recipe in (*contents.recipes, *planned))
    recipes += _CHECK_BYTES * len(planned)
    digests = sum(len(name) + 40 for name in (*contents.stored, *(f"{group[0]}.message" for group in groups)))
    config = 3 * len(json.dumps(dict(source.config), indent=4))
    return tensors + header + recipes + digests + config + _FIXED_OVERHEAD
