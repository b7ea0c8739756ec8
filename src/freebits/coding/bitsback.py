"""The bits-back code of one site (paper, Algorithms 5 and 6, one step of each).

A *message* is a row of words (16-bit floats). Encoding takes the last `r (r + 1) / 2` words of the message
as a random rotation, gives `r` words back, and stores the matrix rotated; decoding finds the rotation in
the rotated matrix and puts the words back. The code has fixed length, so an error stays where it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from freebits.coding.bits import as_tensor, pack_bits, unpack_bits
from freebits.coding.corrections import apply_corrections, count_corrections, encode_corrections
from freebits.coding.rotation import (
    n_words_taken,
    recovered_rotation,
    rotation_from_words,
    rotation_signs,
    words_from_rotation,
)


class Declined(Exception):  # noqa: N818  (no error: the caller stores the site plain)
    """This site cannot be encoded, or not at a gain; the message says why."""


@dataclass(frozen=True)
class Coded:
    """An encoded site.

    Attributes:
        message: (n - r (r - 1) / 2,), the words left.
        matrix: (n, r), the rotated matrix; columns that are zero in the canonical direction are left out.
        signs: uint8, one bit a row of the rotation, padded to a multiple of 8 bytes.
        corrections: uint8, see `freebits.coding.corrections`; for the words taken, then the matrix by rows.
    """

    message: Tensor
    matrix: Tensor
    signs: Tensor
    corrections: Tensor

    @property
    def n_corrections(self) -> int:
        """How many words are corrected."""
        return count_corrections(self.corrections)


def message_length(n_before: int, rank: int) -> int:
    """Words of a message of `n_before` words once a rotation of size `rank` has been taken."""
    return n_before - n_words_taken(rank) + rank


def encode(message: Tensor, W: Tensor, threshold: float) -> Coded:
    """Store `W` in a random rotation that the message pays for.

    Args:
        message: (n,), 16-bit words.
        W: (m, k), float64, in canonical direction (`canonical_direction`).
        threshold: the largest error of a decoded word left without correction.

    Raises:
        Declined: a number is not finite or does not fit, the message is too short, or the gain is negative.
    """
    rank = _rank(W, message.dtype, threshold)
    zeros, W = W[:, : W.shape[1] - rank], W[:, W.shape[1] - rank :]
    kept, taken = _split(message, n_words_taken(rank))
    Q, eigenvalues = rotation_from_words(_finite(taken, "a word of the message"), rank)
    coded_values = _finite(eigenvalues.to(message.dtype), "an eigenvalue")
    matrix = _finite((W @ Q).to(message.dtype), "a rotated weight")
    signs = rotation_signs(matrix.double(), Q)
    true = torch.cat([taken, W.to(message.dtype).flatten()])
    decoded = torch.cat(_decoded(coded_values, matrix, signs))
    corrections = encode_corrections(true, decoded, threshold)
    coded = Coded(torch.cat([kept, coded_values]), matrix, as_tensor(pack_bits(signs.long().numpy(), 1)), corrections)
    gain = (len(message) - len(coded.message) + zeros.numel()) * message.dtype.itemsize
    cost = coded.signs.nbytes + coded.corrections.nbytes
    if cost >= gain:
        raise Declined(f"signs and corrections take {cost} bytes, more than the {gain} gained")
    return coded


def decode(coded: Coded, n_columns: int) -> tuple[Tensor, Tensor]:
    """The message and the matrix `(m, n_columns)` in canonical direction, both in words; inverse of `encode`.

    Raises:
        ValueError: the parts do not fit together.
    """
    rank = coded.matrix.shape[1]
    if len(coded.message) < rank:
        raise ValueError(f"a message of {len(coded.message)} words does not hold {rank} eigenvalues")
    kept, eigenvalues = _split(coded.message, rank)
    signs = torch.from_numpy(unpack_bits(coded.signs.numpy().tobytes(), rank, 1)).bool()
    decoded = torch.cat(_decoded(eigenvalues, coded.matrix, signs))
    corrected = apply_corrections(decoded, coded.corrections)
    taken, W = corrected[: n_words_taken(rank)], corrected[n_words_taken(rank) :]
    zeros = torch.zeros(len(coded.matrix), n_columns - rank, dtype=W.dtype)
    return torch.cat([kept, taken]), torch.cat([zeros, W.reshape(-1, rank)], dim=1)


def _decoded(eigenvalues: Tensor, matrix: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """The words taken and the matrix by rows, before correction. The encoder runs this too."""
    wide = matrix.double()
    Q = recovered_rotation(wide, signs)
    words = words_from_rotation(Q, eigenvalues)
    return words.to(matrix.dtype), (wide @ Q.T).to(matrix.dtype).flatten()


def _rank(W: Tensor, dtype: torch.dtype, threshold: float) -> int:
    """Columns that do not vanish: beside the largest, in this dtype, and in any case within the threshold."""
    norms = _finite(W, "a weight").norm(dim=0)
    vanishes = (norms <= norms.max() * torch.finfo(dtype).eps ** 2) & (W.abs().amax(dim=0) <= threshold)
    rank = W.shape[1] - int(vanishes.int().cumprod(dim=0).sum())  # they come first, as eigenvalues ascend
    if rank < 2:
        raise Declined(f"the output matrix has rank {rank}: there is no rotation to gain from")
    return rank


def _split(message: Tensor, n_last: int) -> tuple[Tensor, Tensor]:
    if len(message) < n_last:
        raise Declined(f"the message has {len(message)} words, the rotation takes {n_last}")
    return message[: len(message) - n_last], message[len(message) - n_last :]


def _finite(numbers: Tensor, what: str) -> Tensor:
    if not numbers.isfinite().all():
        raise Declined(f"{what} is not finite or does not fit {numbers.dtype}")
    return numbers
