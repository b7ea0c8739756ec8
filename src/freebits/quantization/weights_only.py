"""Select the matrices that are rounded without calibration, and report which tensors are rounded.

An uncalibrated matrix has no measurements, for example because the calibration text does not use the matrix. So only
its weights determine how it is rounded.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from freebits.errors import UsageError
from freebits.quantization.sensitivity_cache import Matrix
from freebits.storage.checkpoint import Source
from freebits.types import FLOATS, HALF_DTYPES, TensorSpec

_SMALL = 0.01
"""Routers are not rounded if all routers together have at most this fraction of the weights."""
_MIN_SIDE = 32
"""An uncalibrated matrix with fewer rows or columns than this is not rounded. Examples are small convolution kernels
and the decay rates of state-space models."""


def names_to_keep(source: Source, patterns: Sequence[str]) -> dict[str, str]:
    """Return name → reason to keep the tensor, for tensors that match a shell pattern (`*` matches any text).

    Raises:
        UsageError: a pattern matches no tensor.
    """
    reasons: dict[str, str] = {}
    for pattern in patterns:
        matched = {name for name in source.specs if fnmatchcase(name, pattern)}
        if not matched:
            examples = ", ".join(sorted(source.specs)[:3])
            raise UsageError(
                f"pattern {pattern} in `keep` matches no tensor: give a pattern for names such as {examples}"
            )
        reasons |= dict.fromkeys(matched, "matched by `keep`")
    return reasons


def routers_to_keep(source: Source, router_tensors: Collection[str]) -> dict[str, str]:
    """Return name → reason to keep the tensor, for the routers of a model; empty if the routers are not small."""
    weights = sum(source.specs[name].numel for name in router_tensors)
    small = weights <= _SMALL * sum(spec.numel for spec in source.specs.values())
    return dict.fromkeys(router_tensors if small else (), "its outputs are compared, like those of a router")


def uncalibrated(source: Source, calibrated: Collection[str], kept: Collection[str]) -> list[Matrix]:
    """Return the matrices to round without calibration.

    The result has all floating-point matrices except small matrices, and except matrices of 32 or 64 bits per weight if
    most weights have 16.

    Args:
        source: checkpoint to round.
        calibrated: names of the calibrated tensors.
        kept: names of the tensors that are not rounded.
    """
    matrices = []
    for name, spec in source.specs.items():
        if name not in calibrated and name not in kept and _reason(spec, _mostly_half_precision(source)) is None:
            rows, width = matrix_shape(spec.shape)
            matrices.append(Matrix(name, 0, rows, False, None, None, width))
    return matrices


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the numbers of rows and columns of a tensor that is viewed as a matrix.

    A tensor with three dimensions counts as a stack of matrices if its last dimension is at least `_MIN_SIDE`. The rows
    of a stack are the rows of all its matrices. Any other tensor with more than two dimensions counts as a convolution
    kernel, which has one row for each filter.
    """
    total = 1
    for size in shape:
        total *= size
    width = shape[-1] if len(shape) == 2 or (len(shape) == 3 and shape[-1] >= _MIN_SIDE) else total // max(1, shape[0])
    return total // max(1, width), width


def coverage_report(
    source: Source, calibrated: Collection[str], weights_only: Collection[str], kept: Mapping[str, str]
) -> dict[str, Any]:
    """Report how much of a checkpoint is rounded.

    Args:
        source: checkpoint that is rounded.
        calibrated: names of the tensors that are rounded with calibration.
        weights_only: names of the tensors that are rounded without calibration.
        kept: name → reason, for the tensors that are not rounded.

    Returns:
        `share` is the fraction of the weights that are rounded. `uncalibrated` is the fraction of the weights that are
        rounded without calibration. `alone` lists the tensors that are rounded without calibration, and `left` lists
        the tensors that are not rounded; both lists begin with the largest. An entry covers all tensors that have the
        same reason and whose names differ only in numbers. It has the keys `tensors` (the name with `*` for each
        number), `weights` (the number of weights) and `reason`.
    """
    total = max(1, sum(spec.numel for spec in source.specs.values()))
    half_precision = _mostly_half_precision(source)
    not_rounded = {
        name: kept.get(name) or _reason(spec, half_precision) or "excluded by `only`"
        for name, spec in source.specs.items()
        if name not in calibrated and name not in weights_only
    }
    weights = {name: spec.numel for name, spec in source.specs.items()}
    return {
        "share": 1 - sum(weights[name] for name in not_rounded) / total,
        "uncalibrated": sum(weights[name] for name in weights_only) / total,
        "alone": _summary(dict.fromkeys(weights_only, "not measured on calibration text"), weights),
        "left": _summary(not_rounded, weights),
    }


def _summary(reasons: Mapping[str, str], weights: Mapping[str, int]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], int] = {}
    for name, reason in reasons.items():
        key = re.sub(r"\d+", "*", name), reason
        sums[key] = sums.get(key, 0) + weights[name]
    largest_first = sorted(sums.items(), key=lambda item: -item[1])
    return [{"tensors": tensors, "weights": n, "reason": reason} for (tensors, reason), n in largest_first]


def _mostly_half_precision(source: Source) -> bool:
    """Return whether most floating-point weights of a checkpoint have 16 bits.

    If so, an uncalibrated tensor with more bits per weight is not rounded, because it probably needs this precision.
    """
    sizes = [
        (spec.dtype_name in HALF_DTYPES, spec.numel) for spec in source.specs.values() if spec.dtype_name in FLOATS
    ]
    return 2 * sum(n for is_half, n in sizes if is_half) > sum(n for _, n in sizes)


def _reason(spec: TensorSpec, half_precision: bool) -> str | None:
    """Return the reason why an uncalibrated tensor is not rounded; None if the tensor is rounded."""
    if spec.dtype_name not in FLOATS:
        return f"its dtype is {spec.dtype_name}"
    if len(spec.shape) < 2 or spec.numel == max(spec.shape):
        return "a vector"
    if half_precision and spec.dtype_name not in HALF_DTYPES:
        return f"its dtype is {spec.dtype_name}, while most weights have 16 bits"
    if min(matrix_shape(spec.shape)) < _MIN_SIDE:
        return f"fewer than {_MIN_SIDE} rows or columns"
    return None
