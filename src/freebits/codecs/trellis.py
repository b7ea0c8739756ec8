"""Trellises for trellis-coded quantization (Marcellin and Fischer 1990), with Ungerboeck's one-dimensional codes.

A column of a matrix is a path through the states of a trellis. In an even state the values are the integers `k`, in an
odd state the values are `k + 1/2`. The next state depends on the state and on the parity of `k`. So a symbol `k` costs
the same number of bits as without a trellis, but the encoder can choose between two shifted grids, and the mean squared
error is smaller.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

POLYNOMIALS = {
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o23, 0o4),
    32: (0o45, 0o10),
    64: (0o103, 0o24),
    128: (0o235, 0o126),
    256: (0o515, 0o362),
}
"""Number of states → parity-check polynomials of Ungerboeck's code with this number of states."""


@cache
def transitions(n_states: int) -> NDArray[np.uint8]:
    """Return the next state for each state and parity, (n_states, 2). The first state of every column is 0.

    Without a trellis (0), there is one state.
    """
    if not n_states:
        return np.zeros((1, 2), np.uint8)
    h0, h1 = POLYNOMIALS[n_states]
    states = np.arange(n_states)
    shifted = states >> 1 ^ (states & 1) * (h0 >> 1)
    return np.stack([shifted, shifted ^ h1 >> 1], 1).astype(np.uint8)
