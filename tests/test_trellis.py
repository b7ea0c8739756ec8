"""Trellis-coded quantization: the trellises, the search for the best path, the code, and `quantize --trellis`."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import freebits
from freebits.codecs import integer_stream
from freebits.codecs.integers import Integers, exponents
from freebits.codecs.registry import CODES
from freebits.codecs.trellis import POLYNOMIALS, transitions
from freebits.errors import CheckpointError, UsageError
from freebits.quantization.scales import scaled_integers
from freebits.quantization.trellis import GAINS, trellis_round
from freebits.types import TensorSpec
from tests import plain_integers
from tests.plain_integers import half_steps
from tests.tiny import Make, random_text, redigest

OPTIONS: dict[str, Any] = {"calibration": random_text(3000), "samples": 32, "seq_len": 32}


def symbols_of(values: torch.Tensor) -> NDArray[np.int32]:
    symbols: NDArray[np.int32] = np.ascontiguousarray((values >> 1).numpy())
    return symbols


@pytest.mark.parametrize("n_states", POLYNOMIALS)
def test_the_error_is_smaller_by_the_stated_gain(n_states: int) -> None:
    targets = 4 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = trellis_round(targets, n_states)
    error = 12 * (targets - values / 2).square().mean().item()
    assert error == pytest.approx(GAINS[n_states], rel=0.03)
    assert (half_steps(symbols_of(values), n_states) == values.numpy()).all()


@pytest.mark.parametrize("n_states", POLYNOMIALS)
def test_every_state_has_two_predecessors_and_two_successors(n_states: int) -> None:
    following = transitions(n_states)
    assert following.shape == (n_states, 2)
    assert np.bincount(following.reshape(-1)).tolist() == [2] * n_states
    assert (following[:, 0] != following[:, 1]).all()


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=5))
def test_no_path_is_closer_than_the_one_that_is_found(column: list[float]) -> None:
    targets = torch.tensor(column, dtype=torch.float64)[:, None]
    found = (targets - trellis_round(targets, 4) / 2).square().sum().item()
    near = [[int(np.floor(value)) + offset for offset in (-1, 0, 1)] for value in column]
    paths = np.array(list(product(*near)), np.int32).T
    values = half_steps(paths, 4) / 2
    assert found <= np.square(targets.numpy() - values).sum(0).min() + 1e-9


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 40), st.sampled_from([4, 32, 256]))
def test_paths_can_be_decoded_in_pieces_and_by_the_plain_decoder(n: int, m: int, cut: int, n_states: int) -> None:
    symbols = np.random.default_rng(n).integers(-9, 10, (n, m), dtype=np.int32)
    values = half_steps(symbols, n_states).astype(np.int32)
    levels = np.full(n, 7, np.int8), np.full(m, 3, np.int8)
    bitstream = integer_stream.encode([(values, *levels)], trellis=True)
    decoder, states = integer_stream.Decoder(bitstream, m, n_states), np.zeros(m, np.uint8)
    decoded = np.empty((n, m), np.int32)
    for rows in (slice(0, cut), slice(cut, n)):
        if len(decoded[rows]):
            none = np.empty((0, m), np.float32), *np.empty((2, 0), np.float32)
            decoder.decode(levels[0][rows], levels[1], states, decoded[rows], *none)
    decoder.finish()
    assert (decoded == values).all()
    plain = plain_integers.integers(
        plain_integers.Lanes(bitstream.tolist()), levels[0].tolist(), levels[1].tolist(), n_states
    )
    assert plain == values.tolist()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 50), (700, 300)])
def test_a_matrix_comes_back_and_takes_the_bits_of_its_symbols(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(1)
    W, rows = torch.randn(n, m, generator=generator), torch.linspace(0.5, 2, n)
    matrix = scaled_integers(W, None, rows, torch.ones(m), 0.2, 8)
    specs = [TensorSpec("F32", (n, m))]
    coded = Integers(8).encode([matrix.integers, matrix.rows, matrix.columns], specs)
    assert coded.params["trellis"] == 8
    [decoded] = CODES["integers"].decode(coded.parts, specs, coded.params)
    assert torch.equal(decoded, matrix.floats(torch.float32))
    if n * m > 10**5:
        assert ((decoded - W) / (0.2 * rows[:, None])).square().mean() < 0.8 / 12
        plain = scaled_integers(W, None, rows, torch.ones(m), 0.2)
        n_plain = CODES["integers"].encode([plain.integers, plain.rows, plain.columns], specs).params["bytes"]
        assert coded.params["bytes"] < 1.004 * n_plain
    [chunk] = Integers().chunks(coded.parts, specs, coded.params)
    assert (chunk.integers == matrix.integers.numpy()).all()


def test_scales_are_halved_so_that_half_steps_are_integers() -> None:
    matrix = scaled_integers(torch.eye(4), None, torch.ones(4), torch.ones(4), 0.5, 4)
    assert torch.equal(matrix.rows, exponents(torch.full((4,), 0.5)))
    assert torch.equal(matrix.columns, exponents(torch.full((4,), 0.5)))


def test_the_divergence_is_smaller_at_the_same_size(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(hidden_size=128, intermediate_size=256, tie_word_embeddings=True)
    divergences, sizes = [], []
    for n_states in (0, 8):
        out = tmp_path / f"{n_states} states"
        facts = freebits.quantize(dense, out, bits=4, trellis=n_states, **OPTIONS)
        sizes.append(facts["bytes"]["packed"])
        options: dict[str, Any] = {"text": random_text(900), "seq_len": 32, "limit": 16}
        divergences.append(freebits.verify(out, against=dense, **options)["mean_kl"])
    assert sizes[1] < 1.002 * sizes[0]
    assert divergences[1] < 0.92 * divergences[0]
    assert freebits.inspect(out)["history"][-1]["trellis"] == 8
    freebits.unpack(out, tmp_path / "plain")
    weights = [freebits.load(path).state_dict() for path in (out, tmp_path / "plain")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    tokens = torch.arange(8)[None]
    logits = [freebits.load(out, keep_integers=kept)(tokens).logits.float() for kept in (False, True)]
    assert (logits[0] - logits[1]).abs().max() < 0.02 * logits[0].abs().max()


def test_compress_rounds_along_a_trellis_too(save_tiny: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": random_text(3000), "text": random_text(600), "force": True}
    facts = freebits.compress(save_tiny(), tmp_path / "out", bits=5, trellis=4, **options)
    assert facts["history"][-1]["trellis"] == 4
    recipes = json.loads((tmp_path / "out" / "freebits.json").read_text())["recipes"]
    assert {recipe["params"]["trellis"] for recipe in recipes if recipe["code"] == "integers"} == {4}


def test_scales_of_a_trellis_are_trained_too(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    freebits.quantize(dense, tmp_path / "small", bits=3, trellis=4, **OPTIONS)
    facts = freebits.recover(tmp_path / "small", tmp_path / "better", against=dense, samples=8, seq_len=32, force=True)
    assert facts["bytes"]["packed"] < 1.1 * freebits.inspect(tmp_path / "small")["bytes"]["packed"]
    assert freebits.load(tmp_path / "better")(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("options", [{"trellis": 7}, {"trellis": -4}])
def test_a_trellis_that_does_not_exist_is_refused(options: dict[str, Any], save_tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trellis"):
        freebits.quantize(save_tiny(), tmp_path / "out", **options)


@pytest.mark.parametrize("n_states", [6, 4.0, True, "4", [4], None, 10**30])
def test_a_manifest_with_another_trellis_is_refused(n_states: object, save_tiny: Make, tmp_path: Path) -> None:
    freebits.quantize(save_tiny(), tmp_path / "small", bits=4, trellis=4, **OPTIONS)

    def damage(manifest: dict[str, Any]) -> None:
        next(recipe for recipe in manifest["recipes"] if recipe["code"] == "integers")["params"]["trellis"] = n_states

    redigest(tmp_path / "small", damage)
    with pytest.raises(CheckpointError, match="trellis"):
        freebits.load(tmp_path / "small")
