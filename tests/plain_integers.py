"""The code `integers` in plain Python, written from `docs/format.md`: a reference for the compiled loops."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from freebits.codecs.bits import zstd
from freebits.codecs.trellis import POLYNOMIALS

Matrix = list[list[int]]


def table(level: int, mean: float) -> tuple[int, list[int]]:
    """Return `R` and the frequencies of the symbols."""
    deviation = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)[level % 4] * 2.0 ** (level // 4)
    radius = int(4.5 * deviation) + 2
    masses = []
    for integer in range(-radius, radius + 1):
        mass = 0.0
        for j in range(8):
            y = ((abs(integer - mean) + ((2 * j + 1) / 16 - 0.5)) / deviation) ** 2 / 2
            z = y / 1024
            value = 1 - z * (1 - z / 2 * (1 - z / 3 * (1 - z / 4)))
            for _ in range(10):
                value = value * value
            mass = mass + value
        masses.append(mass)
    total = 0.0
    for mass in masses:
        total = total + mass
    frequencies = [1 + int(mass / total * (2**14 - 2 * radius - 2)) for mass in masses] + [1]
    frequencies[radius] += 2**14 - sum(frequencies)
    return radius, frequencies


class Lanes:
    """The states and the bitstream."""

    def __init__(self, units: list[int]) -> None:
        self.states = [units[2 * lane] + (units[2 * lane + 1] << 16) for lane in range(32)]
        self.units, self.lane = units[64:], 0

    def refill(self) -> None:
        if self.states[self.lane] < 2**16:
            self.states[self.lane] = (self.states[self.lane] << 16) + self.units.pop(0)

    def symbol(self, frequencies: list[int]) -> int:
        state, start, symbol = self.states[self.lane], 0, 0
        while state % 2**14 >= start + frequencies[symbol]:
            start, symbol = start + frequencies[symbol], symbol + 1
        self.states[self.lane] = frequencies[symbol] * (state >> 14) + state % 2**14 - start
        self.refill()
        return symbol

    def raw(self, n_bits: int) -> int:
        value = self.states[self.lane] % 2**n_bits
        self.states[self.lane] >>= n_bits
        self.refill()
        return value

    def bits(self, n: int) -> int:
        low = self.raw(min(n, 16))
        return low + (self.raw(n - 16) << 16) if n > 16 else low


def integers(lanes: Lanes, rows: list[int], columns: list[int], n_states: int) -> Matrix:
    """Return one matrix of integers."""
    states = [0] * len(columns)
    matrix: Matrix = []
    h0, h1 = POLYNOMIALS[n_states] if n_states else (0, 0)
    for row in rows:
        matrix.append([])
        for column, state in enumerate(states):
            level = min(max(row + columns[column], -12), 96)
            n_lower = max(0, -((24 - level) // 4))
            radius, frequencies = table(level - 4 * n_lower, -0.5 if state % 2 else 0.0)
            symbol = lanes.symbol(frequencies)
            if symbol > 2 * radius:
                k = lanes.bits(32)
                k -= 2**32 if k >= 2**31 else 0
            else:
                k = (symbol - radius << n_lower) + (lanes.bits(n_lower) if n_lower else 0)
            lanes.lane = (lanes.lane + 1) % 32
            matrix[-1].append(2 * k + state % 2 if n_states else k)
            if n_states:
                states[column] = state >> 1 ^ state % 2 * (h0 >> 1) ^ k % 2 * (h1 >> 1)
    return matrix


def decode(message: bytes, shapes: list[tuple[int, int]], n_states: int) -> list[tuple[Matrix, list[int], list[int]]]:
    """Return the integers, row exponents and column exponents of each matrix."""
    end = 4 + int.from_bytes(message[:4], "little")
    side_data = zstd.decompress(message[4:end])
    lanes = Lanes(np.frombuffer(message[end:], "<u2").tolist())
    decoded, start = [], 0
    for n, m in shapes:
        arrays = []
        for size, dtype in ((n, "<i2"), (m, "<i2"), (n, "i1"), (m, "i1")):
            arrays.append(np.frombuffer(side_data, dtype, size, start).tolist())
            start += size * int(dtype[-1])
        decoded.append((integers(lanes, arrays[2], arrays[3], n_states), arrays[0], arrays[1]))
    assert lanes.states == [2**16] * 32
    assert not lanes.units
    return decoded


def half_steps(symbols: NDArray[np.int32], n_states: int) -> NDArray[Any]:
    """Return the values in half steps of paths through a trellis, (n, m), for their symbols."""
    h0, h1 = POLYNOMIALS[n_states]
    states, values = np.zeros(symbols.shape[1], int), []
    for row in symbols:
        values.append(2 * row + states % 2)
        states = states >> 1 ^ states % 2 * (h0 >> 1) ^ row % 2 * (h1 >> 1)
    return np.array(values).reshape(symbols.shape)
