"""Round each column to the path through a trellis that has the least squared error (Viterbi 1967)."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freebits.codecs.trellis import transitions
from freebits.compiled import compiled
from freebits.errors import UsageError

GAINS = {0: 1.0, 4: 0.794, 8: 0.778, 16: 0.769, 32: 0.757, 64: 0.750, 128: 0.741, 256: 0.736}
"""Number of states → mean squared error relative to rounding without a trellis.

A test measures these errors and requires that they agree within 3 %."""


def check_trellis(n_states: int) -> None:
    """Raise a `UsageError` if there is no trellis with so many states."""
    if n_states not in GAINS:
        raise UsageError(f"`trellis` is {n_states}: give {', '.join(map(str, GAINS))}")


def trellis_round(targets: Tensor, n_states: int) -> Tensor:
    """Round columns to the nearest paths through a trellis.

    Args:
        targets: values in units of the scale, (n, m), one column for each path.
        n_states: number of states.

    Returns:
        The values of the paths in halves of the scale, (n, m), int32; see `freebits.codecs.trellis`.
    """
    columns = np.ascontiguousarray(targets.detach().cpu().numpy().T, dtype=np.float64)
    values = np.empty(columns.shape, np.int32)
    _search(columns, *_predecessors(n_states), values)
    return torch.from_numpy(values.T)


@cache
def _predecessors(n_states: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return two arrays, (2, n_states): the predecessors of each state, and the kind of the symbol after each of these.

    One symbol leads from a predecessor to a state. The *kind* of a symbol is `2 grid + parity`. The grid is 1 if the
    symbol leaves an odd state, else 0.
    """
    following = transitions(n_states)
    before, kinds = np.empty((2, n_states), np.uint32), np.empty((2, n_states), np.uint32)
    n_found = np.zeros(n_states, np.int64)
    for state in range(n_states):
        for parity in (0, 1):
            end = following[state, parity]
            before[n_found[end], end], kinds[n_found[end], end] = state, 2 * (state & 1) + parity
            n_found[end] += 1
    return before, kinds


@compiled
def _search(
    targets: NDArray[np.float64], before: NDArray[np.uint32], kinds: NDArray[np.uint32], values: NDArray[np.int32]
) -> None:
    """Fill `values`, (m, n), with the paths of least squared error for `targets`, (m, n)."""
    n_paths, n = targets.shape
    n_states = before.shape[1]
    costs, new_costs = np.empty(n_states), np.empty(n_states)
    choices = np.empty((n, n_states), np.uint8)  # which of the two predecessors is better
    nearest, errors = np.empty((n, 4), np.int32), np.empty(4)  # the nearest symbol of each kind, and its error
    before0, before1, kinds0, kinds1 = before[0], before[1], kinds[0], kinds[1]
    for path in range(n_paths):
        costs[:] = 1e30
        costs[0] = 0.0
        for row in range(n):
            for grid in range(2):
                target = targets[path, row] - 0.5 * grid
                symbol = int(np.rint(target))
                neighbor = symbol + 1 if target > symbol else symbol - 1
                first, second = 2 * grid + (symbol & 1), 2 * grid + (neighbor & 1)
                nearest[row, first], errors[first] = symbol, (target - symbol) ** 2
                nearest[row, second], errors[second] = neighbor, (target - neighbor) ** 2
            for state in range(n_states):  # without branches, which a processor could not predict
                cost0 = costs[before0[state]] + errors[kinds0[state]]
                cost1 = costs[before1[state]] + errors[kinds1[state]]
                new_costs[state] = min(cost0, cost1)
                choices[row, state] = cost1 < cost0
            costs, new_costs = new_costs, costs
        state = int(np.argmin(costs))
        for row in range(n - 1, -1, -1):
            choice = choices[row, state]
            kind = kinds[choice, state]
            values[path, row] = 2 * nearest[row, kind] + (kind >> 1)
            state = before[choice, state]
