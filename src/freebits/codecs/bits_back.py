"""The bits-back code of one site (one step of Algorithms 5 and 6 in arXiv 2410.01309).

A *site* is a part of the residual stream between two shortcuts, which are the matrices on the skip connections. The
*output matrix* of a sublayer writes to the site. The *message* is a sequence of 16-bit floats: the values of the
shortcut before the site and of the matrices with which the sublayer reads the stream. If the output matrix has rank
`r`, encoding converts the last `r (r + 1) / 2` values of the message to a rotation and `r` eigenvalues. The eigenvalues
replace these values, and the output matrix is stored rotated. Decoding computes the rotation from the rotated matrix,
and the values from the rotation and the eigenvalues. Every value takes 16 bits, so a wrongly decoded value does not
shift the next ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freebits.codecs.base import Check, Coded, Declined, Params
from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, pack_bits, unpack_bits
from freebits.codecs.corrections import apply_corrections, encode_corrections, read_corrections
from freebits.codecs.rotation_values import (
    n_values_taken,
    rotation_from_values,
    rotation_signs,
    unsigned_rotation,
    values_from_rotation,
    with_signs,
)
from freebits.codecs.sums import N_SUMS, are_sums, check_sums, sums
from freebits.types import CPU, HALF_DTYPES, TensorSpec

THRESHOLD = 0.01
MESSAGE, MATRIX, SIGNS, CORRECTIONS = "message", "matrix", "signs", "corrections"
_ROWS_AT_ONCE = 8192
"""Number of rows that are converted to float64 at a time."""


@dataclass(frozen=True)
class BitsBack:
    """The code of one site.

    The last tensor is the output matrix `Wᵀ: (k, m)`. The values of the tensors before it, in order, are the message.

    Attributes:
        threshold: the largest absolute error of a decoded value that is not corrected.
        device: the device for the linear algebra of the encoder.
    """

    threshold: float = THRESHOLD
    device: torch.device = CPU
    exact = False
    check = Check.NONE
    param_names = frozenset({"rank", "corrections", "sums"})

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:
        """Encode the end of the message as a rotation of the output matrix.

        Args:
            tensors: the tensors of the message as 16-bit floats, then the output matrix in float64 and in canonical
                direction (see `canonical_direction`).
            makes: the specs of the decoded tensors.

        Raises:
            Declined: a value is not finite or does not fit its dtype, the message is too short, or encoding saves no
                bytes.
        """
        *message_tensors, output = tensors
        dtype, W = makes[-1].dtype, output.T
        message = torch.cat([tensor.flatten() for tensor in message_tensors])
        rank = _rank(W, dtype, self.threshold)
        zeros, W = W[:, : W.shape[1] - rank], W[:, W.shape[1] - rank :]
        n_values = n_values_taken(rank)
        if len(message) < n_values:
            raise Declined(f"the message has {len(message)} values, but the rotation needs {n_values}")
        head, tail = message[: len(message) - n_values], message[len(message) - n_values :]
        Q, eigenvalues = rotation_from_values(_finite(tail, "a value of the message").to(self.device), rank)
        stored_eigenvalues = _finite(eigenvalues.to(dtype), "an eigenvalue")
        rows = [(block.to(self.device) @ Q).to(dtype) for block in W.split(_ROWS_AT_ONCE)]
        matrix = _finite(torch.cat(rows), "a rotated weight")
        unsigned = unsigned_rotation(matrix)
        signs = rotation_signs(unsigned, Q)
        true = torch.cat([tail, W.to(dtype).flatten()])
        decoded = _decoded(stored_eigenvalues, matrix, with_signs(unsigned, signs)).cpu()
        stored_eigenvalues, matrix, signs = stored_eigenvalues.cpu(), matrix.cpu(), signs.cpu()
        corrections = encode_corrections(true, decoded, self.threshold)
        parts = {
            MESSAGE: torch.cat([head, stored_eigenvalues]),
            MATRIX: matrix.T,
            SIGNS: as_tensor(pack_bits(signs.long().numpy(), 1)),
            CORRECTIONS: corrections,
        }
        gain = (len(message) - len(parts[MESSAGE]) + zeros.numel()) * dtype.itemsize
        cost = parts[SIGNS].nbytes + corrections.nbytes
        if cost >= gain:
            raise Declined(f"signs and corrections take {cost} bytes, but the rotation saves only {gain} bytes")
        params = {"rank": rank, CORRECTIONS: corrections.nbytes, "sums": sums(apply_corrections(decoded, corrections))}
        n_corrected = len(read_corrections(corrections, dtype)[0])
        return Coded({name: part for name, part in parts.items() if len(part)}, params, n_corrected)

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the tensors of the message and the output matrix in canonical direction, all as 16-bit floats."""
        *message_specs, output = makes
        rank = params["rank"]
        head, eigenvalues = parts[MESSAGE].split([len(parts[MESSAGE]) - rank, rank])
        matrix = parts[MATRIX].T
        signs = torch.from_numpy(unpack_bits(bytes_from(parts[SIGNS], -(-rank // 8)).tobytes(), rank, 1)).bool()
        if not (eigenvalues.isfinite().all() and matrix.isfinite().all()):
            raise ValueError("an eigenvalue or a rotated weight is not finite")
        try:
            decoded = _decoded(eigenvalues, matrix, with_signs(unsigned_rotation(matrix), signs))
        except RuntimeError as error:  # the eigendecomposition did not converge
            raise ValueError(str(error)) from None
        decoded = apply_corrections(decoded, parts.get(CORRECTIONS, torch.empty(0, dtype=torch.uint8)))
        check_sums(decoded, params["sums"])
        n_values = n_values_taken(rank)
        message = torch.cat([head, decoded[:n_values]]).split([spec.numel for spec in message_specs])
        W = decoded[n_values:].reshape(-1, rank)
        zeros = torch.zeros(len(W), output.shape[0] - rank, dtype=W.dtype)
        tensors = [values.reshape(spec.shape) for values, spec in zip(message, message_specs, strict=True)]
        return [*tensors, torch.cat([zeros, W], dim=1).T.contiguous()]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the specs of the message, the rotated matrix, the signs of the rotation, and any corrections."""
        *message_specs, output = makes
        (k, m), rank = output.shape, params["rank"]
        n_values = sum(spec.numel for spec in message_specs)
        if {spec.dtype_name for spec in makes} != {output.dtype_name} or output.dtype_name not in HALF_DTYPES:
            raise ValueError(f"the tensors of the `bits-back` code must be all {' or all '.join(HALF_DTYPES)}")
        if type(rank) is not int or not (0 < rank <= k and n_values >= n_values_taken(rank)):
            raise ValueError(f"a rotation of size {rank!r} does not fit {output} and a message of {n_values} values")
        if not are_sums(params["sums"]):
            raise ValueError(f"the sums must be {N_SUMS} finite floats")
        parts = {
            MESSAGE: TensorSpec(output.dtype_name, (n_values - n_values_taken(rank) + rank,)),
            MATRIX: TensorSpec(output.dtype_name, (rank, m)),
            SIGNS: bytes_spec(-(-rank // 8)),
            CORRECTIONS: bytes_spec(params[CORRECTIONS]),
        }
        return {name: spec for name, spec in parts.items() if spec.n_bytes}


def _decoded(eigenvalues: Tensor, matrix: Tensor, Q: Tensor) -> Tensor:
    """Decode the last values of the message and then the matrix, row by row, without applying corrections.

    The encoder also calls this function, to find the values that need corrections.
    """
    values = values_from_rotation(Q, eigenvalues).to(matrix.dtype)
    rows = [(block.double() @ Q.T).to(matrix.dtype).flatten() for block in matrix.split(_ROWS_AT_ONCE)]
    return torch.cat([values, *rows])


def _rank(W: Tensor, dtype: torch.dtype, threshold: float) -> int:
    """Return the number of columns of `W`, (m, k), that do not vanish.

    A column vanishes if its magnitudes are at most the threshold, and its norm is at most `eps²` of the dtype times the
    largest norm of a column.
    """
    norms = _finite(W, "a weight").norm(dim=0)
    low, high = torch.aminmax(W, dim=0)
    vanishes = (norms <= norms.max() * torch.finfo(dtype).eps ** 2) & (torch.maximum(-low, high) <= threshold)
    # in canonical direction, the norms of columns ascend, so the columns that vanish come first
    rank = W.shape[1] - int(vanishes.int().cumprod(dim=0).sum())
    if rank < 2:
        raise Declined(f"the output matrix has rank {rank}, so a rotation saves nothing")
    return rank


def _finite(values: Tensor, description: str) -> Tensor:
    if not values.isfinite().all():
        raise Declined(f"{description} is not finite or does not fit {values.dtype}")
    return values
