"""Matrices that no calibration text reaches: they are rounded by what their weights alone tell."""

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from freebits.errors import UsageError
from freebits.quantization.sensitivity_cache import Matrix
from freebits.storage.folder import Source
from freebits.types import FLOATS, HALVES, TensorSpec

_SMALL = 0.01
"""Part of the weights up to which routers stay as they are."""
_NARROW = 32
"""Rows or columns below which a matrix stays as it is: small convolution kernels, the states of recurrences."""


def names_to_keep(source: Source, patterns: Sequence[str]) -> dict[str, str]:
    """The tensors whose names match one of the patterns, as in the shell (`*` stands for anything), and the reason.

    Raises:
        UsageError: a pattern matches no tensor.
    """
    kept: dict[str, str] = {}
    for pattern in patterns:
        matched = {name for name in source.specs if fnmatchcase(name, pattern)}
        if not matched:
            some = ", ".join(sorted(source.specs)[:3])
            raise UsageError(f"no tensor's name matches --keep {pattern}: names are as {some}")
        kept |= dict.fromkeys(matched, "asked for with --keep")
    return kept


def choosing_kept(source: Source, choosing: Collection[str]) -> dict[str, str]:
    """The tensors of a model's routers, and the reason why they stay as they are; none if they are not small."""
    weights = sum(source.specs[name].numel for name in choosing)
    small = weights <= _SMALL * sum(spec.numel for spec in source.specs.values())
    return dict.fromkeys(choosing if small else (), "its outputs are compared, as of a router")


def uncalibrated(source: Source, calibrated: Collection[str], kept: Collection[str]) -> list[Matrix]:
    """The matrices to round by their weights alone: all that are large enough and of the checkpoint's own precision.

    Args:
        source: the checkpoint.
        calibrated: names of the tensors of which more is known.
        kept: names of the tensors that stay as they are.
    """
    found = []
    for name, spec in source.specs.items():
        if name not in calibrated and name not in kept and _reason(spec, _wide_among_halves(source)) is None:
            rows, width = as_matrix(spec.shape)
            found.append(Matrix(name, 0, rows, False, None, None, width))
    return found


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix: a convolution kernel as (filters, rest), a stack row by row."""
    total = 1
    for size in shape:
        total *= size
    width = shape[-1] if len(shape) == 2 or (len(shape) == 3 and shape[-1] >= _NARROW) else total // max(1, shape[0])
    return total // max(1, width), width


def coverage_of(
    source: Source, calibrated: Collection[str], alone: Collection[str], kept: Mapping[str, str]
) -> dict[str, Any]:
    """How much of a checkpoint is rounded.

    Args:
        source: the checkpoint.
        calibrated: names of the tensors that are rounded by what calibration told.
        alone: names of those that are rounded by their weights alone.
        kept: names of those that stay as they are, and why.

    Returns:
        `share` of the weights that are rounded; `uncalibrated`, the share that is rounded by weights alone; and for
        each kind of tensor of these, `alone`, and of those that are not rounded, `left`: `tensors` (its name, numbers
        as `*`), `weights` and `reason`, the largest first.
    """
    total = max(1, sum(spec.numel for spec in source.specs.values()))
    halves = _wide_among_halves(source)
    left = {
        name: kept.get(name) or _reason(spec, halves) or "of a part that is left out"
        for name, spec in source.specs.items()
        if name not in calibrated and name not in alone
    }
    weights = {name: spec.numel for name, spec in source.specs.items()}
    return {
        "share": 1 - sum(weights[name] for name in left) / total,
        "uncalibrated": sum(weights[name] for name in alone) / total,
        "alone": _listed(dict.fromkeys(alone, "no text multiplies by it"), weights),
        "left": _listed(left, weights),
    }


def _listed(reasons: Mapping[str, str], weights: Mapping[str, int]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], int] = {}
    for name, reason in reasons.items():
        key = re.sub(r"\d+", "*", name), reason
        sums[key] = sums.get(key, 0) + weights[name]
    ordered = sorted(sums.items(), key=lambda item: -item[1])
    return [{"tensors": tensors, "weights": n, "reason": reason} for (tensors, reason), n in ordered]


def _wide_among_halves(source: Source) -> bool:
    """Whether most of a checkpoint's floats have 16 bits, so that one of 32 bits is there for its precision."""
    sizes = [(spec.code in HALVES, spec.numel) for spec in source.specs.values() if spec.code in FLOATS]
    return 2 * sum(n for is_half, n in sizes if is_half) > sum(n for _, n in sizes)


def _reason(spec: TensorSpec, wide_among_halves: bool) -> str | None:
    """Why a tensor is not rounded; None if it is."""
    if spec.code not in FLOATS:
        return f"its dtype is {spec.code}"
    if len(spec.shape) < 2 or spec.numel == max(spec.shape):
        return "a vector"
    if wide_among_halves and spec.code not in HALVES:
        return f"{spec.code} where the rest has 16 bits"
    if min(as_matrix(spec.shape)) < _NARROW:
        return f"fewer than {_NARROW} rows or columns"
    return None
