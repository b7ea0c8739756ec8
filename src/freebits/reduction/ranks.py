"""How narrow each layer becomes: all are cut where the last direction is worth the same for each number it takes."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from freebits.reduction.low_rank import n_numbers


def allocated(spectra: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]], budget: float) -> dict[str, int]:
    """Ranks by which layers together take at most a part of their numbers, in canonical form, and lose least.

    Args:
        spectra: of each layer what each direction of its outputs carries, descending, in one unit for all.
        sizes: outputs and inputs of each layer.
        budget: the part of all their numbers, in (0, 1).

    Returns:
        Layer → rank, 0 for one that is to stay as it is: where a layer wants more than it has, it does.
    """
    names, slopes, costs = [], [], []
    for name, values in spectra.items():
        n, m = sizes[name]
        cost = np.diff([n_numbers(n, m, rank) for rank in range(len(values) + 1)])
        gain = values.numpy() / np.maximum(cost, 1)
        names += [name] * len(values)
        slopes.append(np.minimum.accumulate(gain))  # a rank has all directions before its last
        costs.append(cost)
    slope, cost = np.concatenate(slopes), np.concatenate(costs)
    order = np.argsort(-slope, kind="stable")
    most = budget * sum(n * m for n, m in sizes.values())
    chosen = order[np.cumsum(cost[order]) <= most]
    counts = dict(zip(*np.unique(np.array(names)[chosen], return_counts=True), strict=True))
    ranks = {name: max(1, int(counts.get(name, 0))) for name in spectra}
    return {name: 0 if rank >= len(spectra[name]) else rank for name, rank in ranks.items()}
