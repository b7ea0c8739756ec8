"""The bits-back code of one site (paper, Algorithms 5 and 6, one step of each).

A *message* is a row of words (16-bit floats). Encoding takes the last `r (r + 1) / 2` words of the message
as a random rotation, gives `r` words back, and stores the matrix rotated; decoding finds the rotation in
the rotated matrix and puts the words back. The code has fixed length, so an error stays where it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, pack_bits, unpack_bits
from freebits.codecs.code import Coded, Declined, Params
from freebits.codecs.corrections import apply_corrections, encode_corrections, read_corrections
from freebits.codecs.rotation_values import (
    n_values_taken,
    rotation_from_values,
    rotation_signs,
    unsigned_rotation,
    values_from_rotation,
    with_signs,
)
from freebits.types import CPU, HALVES, TensorSpec

THRESHOLD = 0.01
MESSAGE, MATRIX, SIGNS, CORRECTIONS = "message", "matrix", "signs", "corrections"
_N_SUMS = 4
_TOLERANCE = 2.0**-10
_ROW = 4096
_ROWS = 8192
"""So many are widened to float64 at a time."""


@dataclass(frozen=True)
class BitsBack:
    """The code of one site.

    Its tensors are those whose words make the message, in order, and last the output matrix `Wᵀ: (k, m)`.

    Attributes:
        threshold: the largest error of a decoded word that is left without a correction.
        device: where the encoder's linear algebra runs.
    """

    threshold: float = THRESHOLD
    device: torch.device = CPU
    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:
        """Store the output matrix in a random rotation that the message pays for.

        Args:
            tensors: the message's in words; the output matrix in float64 and in canonical direction
                (`canonical_direction`).
            makes: their kinds.

        Raises:
            Declined: a number is not finite or does not fit, the message is too short, or there is no gain.
        """
        *taken, output = tensors
        dtype, W = makes[-1].dtype, output.T
        message = torch.cat([tensor.flatten() for tensor in taken])
        rank = _rank(W, dtype, self.threshold)
        zeros, W = W[:, : W.shape[1] - rank], W[:, W.shape[1] - rank :]
        n_taken = n_values_taken(rank)
        if len(message) < n_taken:
            raise Declined(f"the message has {len(message)} words, the rotation takes {n_taken}")
        kept, last = message[: len(message) - n_taken], message[len(message) - n_taken :]
        Q, eigenvalues = rotation_from_values(_finite(last, "a word of the message").to(self.device), rank)
        coded_values = _finite(eigenvalues.to(dtype), "an eigenvalue")
        rows = [(some.to(self.device) @ Q).to(dtype) for some in W.split(_ROWS)]
        matrix = _finite(torch.cat(rows), "a rotated weight")
        unsigned = unsigned_rotation(matrix)
        signs = rotation_signs(unsigned, Q)
        true = torch.cat([last, W.to(dtype).flatten()])
        decoded = _decoded(coded_values, matrix, with_signs(unsigned, signs)).cpu()
        coded_values, matrix, signs = coded_values.cpu(), matrix.cpu(), signs.cpu()
        corrections = encode_corrections(true, decoded, self.threshold)
        parts = {
            MESSAGE: torch.cat([kept, coded_values]),
            MATRIX: matrix.T,
            SIGNS: as_tensor(pack_bits(signs.long().numpy(), 1)),
            CORRECTIONS: corrections,
        }
        gain = (len(message) - len(parts[MESSAGE]) + zeros.numel()) * dtype.itemsize
        cost = parts[SIGNS].nbytes + corrections.nbytes
        if cost >= gain:
            raise Declined(f"signs and corrections take {cost} bytes, more than the {gain} gained")
        params = {"rank": rank, CORRECTIONS: corrections.nbytes, "sums": _sums(apply_corrections(decoded, corrections))}
        n_corrected = len(read_corrections(corrections, dtype)[0])
        return Coded({name: part for name, part in parts.items() if len(part)}, params, n_corrected)

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The message's tensors and the output matrix in canonical direction, all in words."""
        *taken, output = makes
        rank = params["rank"]
        kept, eigenvalues = parts[MESSAGE].split([len(parts[MESSAGE]) - rank, rank])
        matrix = parts[MATRIX].T
        signs = torch.from_numpy(unpack_bits(bytes_from(parts[SIGNS], -(-rank // 8)).tobytes(), rank, 1)).bool()
        if not (eigenvalues.isfinite().all() and matrix.isfinite().all()):
            raise ValueError("a number that is not finite")
        try:
            decoded = _decoded(eigenvalues, matrix, with_signs(unsigned_rotation(matrix), signs))
        except RuntimeError as error:  # the decomposition does not converge
            raise ValueError(str(error)) from None
        decoded = apply_corrections(decoded, parts.get(CORRECTIONS, torch.empty(0, dtype=torch.uint8)))
        _check_sums(decoded, params["sums"])
        words = torch.cat([kept, decoded[: n_values_taken(rank)]]).split([spec.numel for spec in taken])
        W = decoded[n_values_taken(rank) :].reshape(-1, rank)
        zeros = torch.zeros(len(W), output.shape[0] - rank, dtype=W.dtype)
        shaped = [part.reshape(spec.shape) for part, spec in zip(words, taken, strict=True)]
        return [*shaped, torch.cat([zeros, W], dim=1).T.contiguous()]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """The message left, the rotated matrix, a sign for each row of the rotation, and corrections if any."""
        *taken, output = makes
        (k, m), rank = output.shape, params["rank"]
        n_values = sum(spec.numel for spec in taken)
        if {spec.code for spec in makes} != {output.code} or output.code not in HALVES:
            raise ValueError("words of different dtypes, or none of 16 bits")
        if type(rank) is not int or not (0 < rank <= k and n_values >= n_values_taken(rank)):
            raise ValueError(f"a rotation of size {rank!r} for {output} and a message of {n_values} words")
        sums = params["sums"]
        if len(sums) != _N_SUMS or not all(isinstance(value, float) and math.isfinite(value) for value in sums):
            raise ValueError("sums that are none")
        parts = {
            MESSAGE: TensorSpec(output.code, (n_values - n_values_taken(rank) + rank,)),
            MATRIX: TensorSpec(output.code, (rank, m)),
            SIGNS: bytes_spec(-(-rank // 8)),
            CORRECTIONS: bytes_spec(params[CORRECTIONS]),
        }
        return {name: spec for name, spec in parts.items() if spec.n_bytes}


def _decoded(eigenvalues: Tensor, matrix: Tensor, Q: Tensor) -> Tensor:
    """The words taken and then the matrix by rows, before correction. The encoder runs this, too."""
    words = values_from_rotation(Q, eigenvalues).to(matrix.dtype)
    rows = [(some.double() @ Q.T).to(matrix.dtype).flatten() for some in matrix.split(_ROWS)]
    return torch.cat([words, *rows])


def _rank(W: Tensor, dtype: torch.dtype, threshold: float) -> int:
    """Columns that do not vanish: beside the largest, in this dtype, and in any case within the threshold."""
    norms = _finite(W, "a weight").norm(dim=0)
    least, most = torch.aminmax(W, dim=0)
    vanishes = (norms <= norms.max() * torch.finfo(dtype).eps ** 2) & (torch.maximum(-least, most) <= threshold)
    rank = W.shape[1] - int(vanishes.int().cumprod(dim=0).sum())  # they come first, as eigenvalues ascend
    if rank < 2:
        raise Declined(f"the output matrix has rank {rank}: there is no rotation to gain from")
    return rank


def _finite(numbers: Tensor, what: str) -> Tensor:
    if not numbers.isfinite().all():
        raise Declined(f"{what} is not finite or does not fit {numbers.dtype}")
    return numbers


def _sums(words: Tensor) -> list[float]:
    """Sums of words with signs that depend on their place: that of its row and that of its column, in rows of 4096.

    Another machine may round a word here and there the other way, so decoded words have no digest. A rotation that
    another machine failed to find changes these sums by about as much as the words are large.
    """
    n_rows = -(-len(words) // _ROW)
    rows = torch.nn.functional.pad(words, (0, n_rows * _ROW - len(words))).reshape(n_rows, _ROW)
    of_rows = torch.cat([some.double() @ _signs(_ROW) for some in rows.split(_ROWS)])
    sums: list[float] = (_signs(n_rows) * of_rows).sum(0).tolist()
    return sums


def _signs(count: int) -> Tensor:
    """Number n's sign in sum j, (count, 4): bit 63 - j of `n · 0x9E3779B97F4A7C15`, 1 for minus."""
    hashed = np.arange(count, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    bits = hashed >> (63 - np.arange(_N_SUMS, dtype=np.uint64)) & np.uint64(1)
    return torch.from_numpy(1 - 2 * bits.astype(np.float64))


def _check_sums(words: Tensor, expected: list[float]) -> None:
    most = _TOLERANCE * torch.linalg.vector_norm(words, dtype=torch.float64).item()
    if not all(abs(found - sum_) <= most for found, sum_ in zip(_sums(words), expected, strict=True)):
        raise ValueError("its words do not add up to what they did when it was packed: this machine decodes otherwise")
