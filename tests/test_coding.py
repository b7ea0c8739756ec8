"""The bits-back code of one site: every word comes back."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from freebits.coding import Declined, canonical_direction, decode, encode, message_length
from freebits.coding.bits import pack_bits, unpack_bits
from freebits.coding.corrections import apply_corrections, encode_corrections, read_corrections
from freebits.coding.rotation import (
    n_words_taken,
    recovered_rotation,
    rotation_from_words,
    rotation_signs,
    words_from_rotation,
)

DTYPES = (torch.float16, torch.bfloat16)
seeds = st.integers(0, 2**32)


def site(seed: int, dtype: torch.dtype, rows: int, size: int, spare: int = 40) -> tuple[Tensor, Tensor]:
    """A message of words and a matrix in canonical direction, with a spectrum that decays as in real models."""
    generator = torch.Generator().manual_seed(seed)
    message = (0.05 * torch.randn(n_words_taken(size) + spare, generator=generator)).to(dtype)
    W = torch.randn(rows, size, generator=generator, dtype=torch.float64) * torch.linspace(1, 3, size)
    return message, W @ canonical_direction(W)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    size=st.integers(24, 64),
    ratio=st.floats(0.6, 4),
    threshold=st.sampled_from([0.0, 0.005, 0.01, 0.1]),
)
def test_decoding_returns_every_word(seed: int, dtype: torch.dtype, size: int, ratio: float, threshold: float) -> None:
    message, W = site(seed, dtype, int(ratio * size), size)
    try:
        coded = encode(message, W, threshold)
    except Declined:  # the corrections outweigh the gain; see test_a_costly_site_is_declined
        assume(False)
    rank = coded.matrix.shape[1]
    words, matrix = decode(coded, size)
    assert len(coded.message) == message_length(len(message), rank) == len(message) - rank * (rank - 1) // 2
    kept = len(message) - n_words_taken(rank)
    assert torch.equal(words[:kept], message[:kept])
    true = torch.cat([message[kept:], W[:, size - rank :].to(dtype).flatten()])
    decoded = torch.cat([words[kept:], matrix[:, size - rank :].flatten()])
    corrected, _ = read_corrections(coded.corrections, dtype)
    assert torch.equal(decoded[corrected], true[corrected])
    assert ((decoded.double() - true.double()).abs() <= threshold).all()
    assert not matrix[:, : size - rank].any()


def test_a_site_saves_what_the_formula_says() -> None:
    message, W = site(0, torch.float16, 256, 64)
    coded = encode(message, W, threshold=0.1)
    before = message.nbytes + W.numel() * 2
    after = sum(part.nbytes for part in (coded.message, coded.matrix, coded.signs, coded.corrections))
    assert before - after == 64 * 63 // 2 * 2 - 8 - coded.corrections.nbytes


def test_a_matrix_of_less_than_full_rank_stores_no_zero_columns() -> None:
    message, W = site(0, torch.float16, rows=40, size=64)
    coded = encode(message, W, threshold=0.05)
    assert coded.matrix.shape == (40, 40)
    _, matrix = decode(coded, n_columns=64)
    assert (matrix.double() - W).abs().max() < 0.05 + 0.01


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda message, W: (message.index_fill(0, torch.tensor([60]), float("nan")), W), "word of the message"),
        (lambda message, W: (message, W.index_fill(0, torch.tensor([3]), float("inf"))), "a weight"),
        (lambda message, W: (torch.full_like(message, 60000), W), "an eigenvalue"),
        (lambda message, W: (message, W * 1e6), "a rotated weight"),
        (lambda message, W: (message[:500], W), "the rotation takes"),
        (lambda message, W: (message, W * 0), "rank 0"),
    ],
)
def test_a_site_whose_numbers_fail_is_declined(spoil: Any, reason: str) -> None:
    message, W = spoil(*site(0, torch.float16, 128, 32))
    with pytest.raises(Declined, match=reason):
        encode(message, W, threshold=0.01)


def test_a_costly_site_is_declined() -> None:
    message, W = site(0, torch.bfloat16, 32, 32)
    with pytest.raises(Declined, match="more than the"):
        encode(message, W, threshold=0.0)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=st.integers(2, 40))
def test_rotation_and_words_are_inverse(seed: int, size: int) -> None:
    words = torch.randn(n_words_taken(size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q, eigenvalues = rotation_from_words(words, size)
    assert torch.allclose(words_from_rotation(Q, eigenvalues), words, atol=1e-12)
    _, W = site(seed, torch.float16, 4 * size, size)
    recovered = recovered_rotation(W @ Q, rotation_signs(W @ Q, Q))
    assert torch.allclose(recovered, Q, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.floats(width=16), max_size=60),
    wrong=st.sets(st.integers(0, 59)),
    dtype=st.sampled_from(DTYPES),
)
def test_corrections_mend_exactly_what_is_wrong(words: list[float], wrong: set[int], dtype: torch.dtype) -> None:
    true = torch.tensor(words, dtype=dtype)
    decoded = true.clone()
    for position in wrong & set(range(len(words))):
        decoded[position] = float("nan")
    corrections = encode_corrections(true, decoded, threshold=0.01)
    mended = apply_corrections(decoded, corrections)
    assert torch.equal(mended.view(torch.int16), true.view(torch.int16))
    positions, _ = read_corrections(corrections, dtype)
    unusable = {index for index, word in enumerate(true.tolist()) if not np.isfinite(word)}
    assert set(positions.tolist()) == (wrong & set(range(len(words)))) | unusable
    assert len(corrections) % 8 == 0
    assert bool(len(corrections)) == bool(len(positions))


def test_corrections_cut_off_are_an_error() -> None:
    true = torch.arange(50, dtype=torch.float16)
    corrections = encode_corrections(true, true + 1, threshold=0.5)
    with pytest.raises(ValueError, match="do not hold"):
        apply_corrections(true, corrections[:16])
    with pytest.raises(ValueError, match="a correction for word"):
        apply_corrections(true[:20], corrections)


@given(values=st.lists(st.integers(0, 2**40), max_size=30))
def test_bits_round_trip(values: list[int]) -> None:
    n_bits = max(values, default=0).bit_length()
    content = pack_bits(np.array(values, dtype=np.int64), n_bits)
    assert unpack_bits(content, len(values), n_bits).tolist() == values
