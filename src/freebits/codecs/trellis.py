"""Trellises for trellis-coded quantization (Marcellin and Fischer 1990), with Ungerboeck's one-dimensional codes.

A column of a matrix is a path through the states of a trellis. In units of the scale, a value is an integer `k` in an
even state, and `k + 1/2` in an odd state. The state and the parity of `k` determine the next state. A symbol `k` takes
the same number of bits as without a trellis, but the encoder can choose between two shifted grids. The mean squared
error is therefore smaller. The code `integers` stores half the scale, so that all values are integers: `2 k` in an even
state and `2 k + 1` in an odd state.
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
    """Return the next state for each state and parity of `k`, (n_states, 2). Every column starts in state 0.

    If `n_states` is 0, there is no trellis: the result, (1, 2), has only state 0.
    """
    if not n_states:
        return np.zeros((1, 2), np.uint8)
    h0, h1 = POLYNOMIALS[n_states]
    states = np.arange(n_states)
    shifted = states >> 1 ^ (states & 1) * (h0 >> 1)
    return np.stack([shifted, shifted ^ h1 >> 1], 1).astype(np.uint8)
