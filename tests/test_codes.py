"""Every code decodes what it encoded. Further tests cover the properties of each code."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from freebits.codecs.base import Code, Coded, Declined
from freebits.codecs.bits import as_tensor, bytes_from, pack_bits, unpack_bits
from freebits.codecs.bits_back import BitsBack
from freebits.codecs.corrections import apply_corrections, encode_corrections, read_corrections
from freebits.codecs.pivots import Pivots
from freebits.codecs.registry import CODES
from freebits.codecs.rotation_values import (
    canonical_direction,
    n_values_taken,
    rotation_from_values,
    rotation_signs,
    unsigned_rotation,
    values_from_rotation,
    with_signs,
)
from freebits.codecs.triangles import Lower, Symmetric, n_lower_values
from freebits.types import TensorSpec, bytes_of

DTYPES = (torch.float16, torch.bfloat16)
seeds = st.integers(0, 2**32)


def site(seed: int, dtype: torch.dtype, rows: int, size: int, spare: int = 40) -> tuple[Tensor, Tensor]:
    """Return a message of 16-bit values and a matrix in canonical direction whose columns differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    message = (0.05 * torch.randn(n_values_taken(size) + spare, generator=generator)).to(dtype)
    W = torch.randn(rows, size, generator=generator, dtype=torch.float64) * torch.linspace(1, 3, size)
    return message, W @ canonical_direction(W)


def round_trip(code: Code, tensors: list[Tensor], makes: list[TensorSpec]) -> tuple[Coded, list[Tensor]]:
    """Encode and decode tensors. Check the specs of the parts and of the decoded tensors."""
    coded = code.encode(tensors, makes)
    assert {part: TensorSpec.of(tensor) for part, tensor in coded.parts.items()} == code.parts(makes, coded.params)
    decoded = code.decode(coded.parts, makes, coded.params)
    assert [TensorSpec.of(tensor) for tensor in decoded] == makes
    return coded, decoded


def coded_site(message: Tensor, W: Tensor, threshold: float) -> tuple[Coded, Tensor, Tensor]:
    """Encode and decode a site. Return the result of encoding, the decoded message and the decoded matrix."""
    makes = [TensorSpec.of(message), TensorSpec.of(W.T.to(message.dtype))]
    coded, (values, matrix) = round_trip(BitsBack(threshold), [message, W.T], makes)
    return coded, values, matrix.T


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    size=st.integers(24, 64),
    ratio=st.floats(0.6, 4),
    threshold=st.sampled_from([0.0, 0.005, 0.01, 0.1]),
)
def test_decoding_restores_every_value_within_the_threshold(
    seed: int, dtype: torch.dtype, size: int, ratio: float, threshold: float
) -> None:
    message, W = site(seed, dtype, int(ratio * size), size)
    try:
        coded, values, matrix = coded_site(message, W, threshold)
    except Declined:  # the corrections take more bytes than the rotation saves
        assume(False)
    rank = coded.params["rank"]
    assert len(coded.parts["message"]) == len(message) - rank * (rank - 1) // 2
    n_unchanged = len(message) - n_values_taken(rank)
    assert torch.equal(values[:n_unchanged], message[:n_unchanged])
    true = torch.cat([message[n_unchanged:], W[:, size - rank :].to(dtype).flatten()])
    decoded = torch.cat([values[n_unchanged:], matrix[:, size - rank :].flatten()])
    positions, _ = read_corrections(coded.parts.get("corrections", torch.empty(0, dtype=torch.uint8)), dtype)
    assert len(positions) == coded.corrected
    assert torch.equal(decoded[positions], true[positions])
    assert ((decoded.double() - true.double()).abs() <= threshold).all()
    assert not matrix[:, : size - rank].any()


def test_bits_back_saves_the_bytes_that_the_formula_predicts() -> None:
    message, W = site(0, torch.float16, 256, 64)
    coded, _, _ = coded_site(message, W, threshold=0.1)
    before = message.nbytes + W.numel() * 2
    after = sum(part.nbytes for part in coded.parts.values())
    assert before - after == 64 * 63 // 2 * 2 - 8 - coded.params["corrections"]


def test_the_zero_columns_of_a_matrix_without_full_rank_are_not_stored() -> None:
    message, W = site(0, torch.float16, rows=40, size=64)
    coded, _, matrix = coded_site(message, W, threshold=0.05)
    assert coded.parts["matrix"].shape == (40, 40)
    assert (matrix.double() - W).abs().max() < 0.05 + 0.01


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda message, W: (message.index_fill(0, torch.tensor([60]), float("nan")), W), "message"),
        (lambda message, W: (message, W.index_fill(0, torch.tensor([3]), float("inf"))), "weight"),
        (lambda message, W: (torch.full_like(message, 60000), W), "eigenvalue"),
        (lambda message, W: (message, W * 1e6), "rotated weight"),
        (lambda message, W: (message[:500], W), " 500 "),
        (lambda message, W: (message, W * 0), "rank 0"),
    ],
)
def test_a_site_with_unsuitable_values_is_declined(spoil: Any, fact: str) -> None:
    message, W = spoil(*site(0, torch.float16, 128, 32))
    with pytest.raises(Declined, match=fact):
        coded_site(message, W, threshold=0.01)


def test_a_site_that_needs_too_many_corrections_is_declined() -> None:
    message, W = site(0, torch.bfloat16, 32, 32)
    with pytest.raises(Declined, match="corrections"):
        coded_site(message, W, threshold=0.0)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=st.integers(2, 40))
def test_a_rotation_restores_the_values_that_it_encodes(seed: int, size: int) -> None:
    values = torch.randn(n_values_taken(size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q, eigenvalues = rotation_from_values(values, size)
    assert torch.allclose(values_from_rotation(Q, eigenvalues), values, atol=1e-12)
    _, W = site(seed, torch.float16, 4 * size, size)
    unsigned = unsigned_rotation(W @ Q)
    recovered = with_signs(unsigned, rotation_signs(unsigned, Q))
    assert torch.allclose(recovered, Q, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(width=16), max_size=60),
    wrong=st.sets(st.integers(0, 59)),
    dtype=st.sampled_from(DTYPES),
)
def test_corrections_repair_exactly_the_wrong_values(values: list[float], wrong: set[int], dtype: torch.dtype) -> None:
    true = torch.tensor(values, dtype=dtype)
    decoded = true.clone()
    for position in wrong & set(range(len(values))):
        decoded[position] = float("nan")
    corrections = encode_corrections(true, decoded, threshold=0.01)
    corrected = apply_corrections(decoded, corrections)
    assert torch.equal(corrected.view(torch.int16), true.view(torch.int16))
    positions, _ = read_corrections(corrections, dtype)
    not_finite = {index for index, value in enumerate(true.tolist()) if not np.isfinite(value)}
    assert set(positions.tolist()) == (wrong & set(range(len(values)))) | not_finite
    assert len(corrections) % 8 == 0
    assert bool(len(corrections)) == bool(len(positions))


def test_truncated_corrections_and_corrections_of_other_values_are_refused() -> None:
    true = torch.arange(50, dtype=torch.float16)
    corrections = encode_corrections(true, true + 1, threshold=0.5)
    with pytest.raises(ValueError, match=r"\b16\b.*\b50\b"):
        apply_corrections(true, corrections[:16])
    with pytest.raises(ValueError, match=r"\b49\b.*\b20\b"):
        apply_corrections(true[:20], corrections)


@given(values=st.lists(st.integers(0, 2**40), max_size=30))
def test_unpacking_bits_restores_the_packed_values(values: list[int]) -> None:
    n_bits = max(values, default=0).bit_length()
    content = pack_bits(np.array(values, dtype=np.int64), n_bits)
    assert unpack_bits(content, len(values), n_bits).tolist() == values


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(0, 9), seed=seeds)
def test_lower_and_symmetric_matrices_are_restored(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).half()
    coded, [lower] = round_trip(Lower(), [matrix], [TensorSpec.of(matrix)])
    assert torch.equal(lower, matrix.tril())
    assert coded.parts["words"].numel() == n_lower_values(rows, columns)
    symmetric = matrix @ matrix.T
    _, [square] = round_trip(Symmetric(), [symmetric], [TensorSpec.of(symmetric)])
    assert torch.equal(square, symmetric)


def test_code_symmetric_refuses_a_matrix_that_is_not_square() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        Symmetric().parts([TensorSpec("F16", (3, 4))], {})


def test_a_rotation_that_this_machine_decodes_differently_is_detected() -> None:
    message, W = site(0, torch.float16, 128, 32)
    makes = [TensorSpec.of(message), TensorSpec.of(W.T.half())]
    code = BitsBack(0.05)
    coded = code.encode([message, W.T], makes)
    values, _ = code.decode(coded.parts, makes, coded.params)
    rounded = values.clone()
    rounded[len(message) // 2] *= 1 + 2**-10  # as if another machine rounded this value differently
    sums = [value + float(rounded.double().sum() - values.double().sum()) for value in coded.params["sums"]]
    code.decode(coded.parts, makes, {**coded.params, "sums": sums})
    signs = coded.parts["signs"].clone()
    signs[0] ^= 0x10  # flips one row of the rotation; another order of close eigenvalues changes two rows or more
    with pytest.raises(ValueError, match="sums"):
        code.decode(coded.parts | {"signs": signs}, makes, coded.params)


@pytest.mark.parametrize("part", ["message", "matrix"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stored_value_that_is_not_finite_is_refused(part: str, value: float) -> None:
    # Regression: `torch.linalg.eigh` raised LinAlgError, and the command ended with a traceback.
    message, W = site(0, torch.float16, 128, 32)
    makes = [TensorSpec.of(message), TensorSpec.of(W.T.half())]
    coded = BitsBack(0.05).encode([message, W.T], makes)
    forged = coded.parts[part].clone()
    forged[-1] = value
    with pytest.raises(ValueError, match="finite"):
        BitsBack().decode(coded.parts | {part: forged}, makes, coded.params)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": 33},
        {"rank": 12.0},
        {"rank": "12"},
        {"corrections": -8},
        {"corrections": 2.5},
        {"sums": [1.0]},
        {"sums": [1.0, 2.0, 3.0, float("nan")]},
        {"sums": ["1", "2", "3", "4"]},
    ],
)
def test_invalid_parameters_are_refused(change: dict[str, Any]) -> None:
    makes = [TensorSpec("F16", (600,)), TensorSpec("F16", (32, 128))]
    sound = {"rank": 32, "corrections": 0, "sums": [0.0] * 4}
    assert CODES["bits-back"].parts(makes, sound).keys() == {"message", "matrix", "signs"}
    with pytest.raises(ValueError, match=r"rotation|bytes|sums"):
        CODES["bits-back"].parts(makes, sound | change)


@given(data=st.binary(max_size=40))
def test_bytes_are_restored_from_the_tensor_that_stores_them(data: bytes) -> None:
    tensor = as_tensor(data)
    assert len(tensor) % 8 == 0
    assert bytes_from(tensor, len(data)).tobytes() == data
    assert bytes_of(tensor).tobytes().startswith(data)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    dtype=st.sampled_from((*DTYPES, torch.float32)),
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=4),
    columns=st.integers(6, 20),
    dim=st.sampled_from([0, 1]),
)
def test_a_matrix_is_restored_without_storing_its_pivot_columns(
    seed: int, dtype: torch.dtype, sizes: list[tuple[int, int]], columns: int, dim: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spaces, end = [], 0
    for gap, size in sizes:
        spaces.append((end + gap, size))
        end += gap + size
    matrix = torch.randn(end + 2, columns, generator=generator).to(dtype)
    for start, size in spaces:
        pivots = torch.randperm(columns, generator=generator)[:size].sort().values
        matrix[start : start + size, pivots] = torch.eye(size, dtype=dtype)
    tensor = matrix.movedim(0, dim).contiguous()
    coded, [decoded] = round_trip(Pivots(spaces, dim), [tensor], [TensorSpec.of(tensor)])
    assert torch.equal(decoded, tensor)
    assert coded.parts["words"].numel() == tensor.numel() - sum(size**2 for _, size in spaces)


def test_a_matrix_without_pivots_is_declined() -> None:
    matrix = torch.randn(4, 8).half()
    with pytest.raises(Declined):
        Pivots([(0, 2)]).encode([matrix], [TensorSpec.of(matrix)])
    matrix[:2, [5, 3]] = torch.eye(2).half()  # not ascending
    with pytest.raises(Declined):
        Pivots([(0, 2)]).encode([matrix], [TensorSpec.of(matrix)])


@pytest.mark.parametrize(
    ("spaces", "dim"),
    [
        ([[0, 2], [1, 2]], 0),  # overlap
        ([[3, 2]], 0),  # beyond the last row
        ([[-1, 2]], 0),
        ([], 0),
        ([[0, 0]], 0),
        ([[0, 2]], 2),
        ([[True, 2]], 0),
        ([[0, 5]], 1),
        ([[0]], 0),
        (0, 0),
    ],
)
def test_invalid_spaces_are_refused(spaces: object, dim: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        CODES["pivots"].parts([TensorSpec("F16", (4, 8))], {"spaces": spaces, "dim": dim})


@pytest.mark.parametrize("pivots", [[1, 1], [2, 1], [1, 8], [-1, 2], [1, 2**31 - 1]])
def test_pivots_that_are_not_ascending_column_numbers_are_refused(pivots: list[int]) -> None:
    spec, params = TensorSpec("F16", (4, 8)), {"spaces": [[1, 2]], "dim": 0}
    parts = {"pivots": torch.tensor(pivots, dtype=torch.int32), "words": torch.zeros(28).half()}
    with pytest.raises(ValueError, match="pivots"):
        CODES["pivots"].decode(parts, [spec], params)
