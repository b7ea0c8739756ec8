"""The codes of quantized weights, rounding, and the command `quantize`."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_128_hexdigest

import freebits
from benchmarks.group_rounding import GROUP, round_to_grid
from freebits.codecs import bits, enumeration, integer_stream, normal_tables
from freebits.codecs.hadamard import hadamard, hadamard_inverse
from freebits.codecs.integers import Integers, ScaledIntegers, exponents, scales_of
from freebits.codecs.registry import CODES
from freebits.errors import UsageError
from freebits.evaluation.coarse_activations import round_asymmetric, round_symmetric
from freebits.quantization.error_compensation import compensated_rounding, inverse_factor
from freebits.quantization.pyramids import nearest_points, round_to_pyramids
from freebits.quantization.scales import scaled_integers
from freebits.quantization.trellis import trellis_round
from freebits.types import TensorSpec
from tests import plain_integers
from tests.tiny import VARIANTS, Make, change_tensors, in_float64, random_text


def encoded(matrix: ScaledIntegers, n_states: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], list[TensorSpec]]:
    """Return the parts and params of a matrix in code `integers`, and the specs that it makes."""
    specs = [TensorSpec("F32", (len(matrix.rows), len(matrix.columns)))]
    coded = Integers(n_states).encode([matrix.integers, matrix.rows, matrix.columns], specs)
    return coded.parts, coded.params, specs


def unscaled(integers: NDArray[np.int32]) -> ScaledIntegers:
    """Return a matrix with scales of 1."""
    return ScaledIntegers(torch.from_numpy(integers), *(torch.zeros(n, dtype=torch.int16) for n in integers.shape))


int32_matrices = arrays.arrays(
    np.int32,
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    elements=st.integers(-9, 9) | st.integers(-(2**31), 2**31 - 1),
)


@given(int32_matrices)
def test_integers_of_any_size_come_back_also_from_the_plain_decoder(integers: NDArray[np.int32]) -> None:
    parts, params, specs = encoded(unscaled(integers))
    [decoded] = Integers().chunks(parts, specs, params)
    assert np.array_equal(decoded.integers, integers)
    message = parts["message"].numpy()[: params["bytes"]].tobytes()
    [(plain, *_)] = plain_integers.decode(message, [integers.shape], 0)
    assert plain == integers.tolist()


def normal_integers(n: int, level: int, seed: int = 0) -> Any:
    """Return `n` rounded normal values whose standard deviation is that of the level."""
    return np.round(np.random.default_rng(seed).normal(size=n) * 2 ** (level / 4)).astype(np.int32)


@pytest.mark.parametrize("n", [1 << 17, 1 << 20])
def test_the_coder_needs_little_more_than_the_entropy(n: int) -> None:
    rows = [normal_integers(n // 4, level) for level in (2, 6, 9, 14)]
    entropy = 0.0
    for row in rows:
        p = np.unique(row, return_counts=True)[1] / len(row)
        entropy -= (p * np.log2(p)).sum() * len(row)
    levels = np.array([2, 6, 9, 14], np.int8), np.zeros(n // 4, np.int8)
    bitstream = integer_stream.encode([(np.stack(rows), *levels)], trellis=False)
    assert 0.999 < 16 * len(bitstream) / entropy < 1.004


def test_the_frequency_tables_are_the_same_on_all_machines() -> None:
    frequencies = [normal_tables.frequencies(level, shift) for level in normal_tables.LEVELS for shift in (0.0, -0.5)]
    assert all(counts.sum() == 1 << normal_tables.PRECISION for counts in frequencies)
    content = np.concatenate(frequencies).astype("<u2").tobytes()
    assert f"`{xxh3_128_hexdigest(content)}`" in Path("docs/format.md").read_text(encoding="utf-8")
    for level, shift in ((-12, 0.0), (5, 0.0), (6, -0.5), (24, -0.5)):
        assert normal_tables.frequencies(level, shift).tolist() == plain_integers.table(level, shift)[1]


@given(st.integers(0, 10**6), st.sampled_from([0, 4, 8]))
def test_a_damaged_message_is_refused_or_decoded_without_a_crash(seed: int, n_states: int) -> None:
    generator = np.random.default_rng(seed)
    integers = (
        trellis_round(torch.from_numpy(generator.normal(size=(20, 30)) * 3), n_states)
        if n_states
        else (torch.from_numpy(normal_integers(600, 4, seed).reshape(20, 30)))
    )
    parts, params, specs = encoded(unscaled(integers.numpy()), n_states)
    message = parts["message"].clone()
    message[generator.integers(4, params["bytes"])] ^= int(generator.integers(1, 256))
    try:
        [decoded] = Integers().chunks({"message": message}, specs, params)
    except ValueError:
        return
    assert decoded.integers.shape == (20, 30)


def test_a_message_that_is_cut_off_is_refused() -> None:
    parts, params, specs = encoded(unscaled(normal_integers(5000, 4).reshape(50, 100)))
    for n_bytes in (3, 100, params["bytes"] - 2):
        with pytest.raises(ValueError, match="cut off"):
            Integers().decode(
                {"message": bits.as_tensor(parts["message"].numpy().tobytes()[:n_bytes])}, specs, {"bytes": n_bytes}
            )


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.sampled_from([3, 300, 3e5]))
def test_code_integers_restores_matrices_exactly(n: int, m: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = (torch.randn(n, m, generator=generator) * 10 ** torch.rand(n, 1, generator=generator) * size).round()
    other = torch.zeros(m, n)
    tensors, specs = [], []
    for integers in (matrix, other):
        rows, columns = (torch.randint(-200, 200, (size,), generator=generator).short() for size in integers.shape)
        tensors += [integers.int(), rows, columns]
        specs.append(TensorSpec("F32", tuple(integers.shape)))
    coded = CODES["integers"].encode(tensors, specs)
    decoded = CODES["integers"].decode(coded.parts, specs, coded.params)
    assert torch.equal(decoded[0], ScaledIntegers(*tensors[:3]).floats(torch.float32))
    assert torch.equal(decoded[1], other)


@pytest.mark.parametrize("octaves", [3, 6, 8, 10, 14])
def test_large_integers_need_little_more_than_their_entropy(octaves: int) -> None:
    integers = (torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)) * 2**octaves).round().int()
    tensors = [integers, *(torch.zeros(size, dtype=torch.int16) for size in integers.shape)]
    coded = CODES["integers"].encode(tensors, [TensorSpec("F32", (256, 1024))])
    bits = 8 * len(coded.parts["message"]) / integers.numel()
    assert abs(bits - octaves - math.log2(2 * math.pi * math.e) / 2) < 0.05


def test_scales_are_rounded_to_powers_of_the_sixteenth_root_of_two() -> None:
    scales = torch.tensor([1e-6, 0.5, 1.0, 3.0, 1e4])
    assert torch.allclose(scales_of(exponents(scales)), scales, rtol=2 ** (1 / 32) - 1 + 1e-6)
    assert torch.equal(scales_of(torch.tensor([0, 16, -32]).short()), torch.tensor([1.0, 2.0, 0.25]))


def all_points(size: int, pulses: int) -> list[tuple[int, ...]]:
    """Return all integer vectors whose absolute values sum to `pulses`."""
    values = range(-pulses, pulses + 1)
    return [y for y in itertools.product(values, repeat=size) if sum(map(abs, y)) == pulses]


@pytest.mark.parametrize(("size", "pulses"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 3), (3, 5)])
def test_points_of_a_pyramid_are_numbered_without_gaps(size: int, pulses: int) -> None:
    points = np.array(all_points(size, pulses))
    assert sorted(enumeration.rank(points).tolist()) == list(range(len(points)))
    assert np.array_equal(enumeration.unrank(enumeration.rank(points), size, pulses), points)
    assert enumeration.n_bits(size, pulses) == (len(points) - 1).bit_length()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(16, 12), (16, 48), (16, 58), (64, 40), (128, 84)]), st.integers(0, 100))
def test_points_of_large_pyramids_are_restored_from_their_numbers(shape: tuple[int, int], seed: int) -> None:
    points = nearest_points(torch.randn(20, shape[0], generator=torch.Generator().manual_seed(seed)), shape[1])
    integers = points.long().numpy()
    assert np.array_equal(np.abs(integers).sum(1), np.full(20, shape[1]))
    assert np.array_equal(enumeration.unrank(enumeration.rank(integers), *shape), integers)


def test_the_search_finds_a_point_nearly_as_close_as_the_nearest() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    candidates = torch.tensor(all_points(4, 3)).float()
    best = (x @ candidates.T / candidates.norm(dim=1)).amax(1)
    points = nearest_points(x, 3)
    assert ((x * points).sum(1) / points.norm(dim=1) / best).mean() > 0.995


@pytest.mark.parametrize("n", [1, 2, 7, 12, 36, 96, 100, 172, 576, 1536])
def test_a_hadamard_rotation_is_orthogonal_and_has_an_inverse(n: int) -> None:
    Q = hadamard(torch.eye(n, dtype=torch.float64), seed=3)
    assert torch.allclose(Q @ Q.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(hadamard_inverse(hadamard(x, 3), 3), x, atol=1e-12)


@pytest.mark.parametrize("n", [4, 12, 36, 576, 1536])
def test_no_entry_of_a_hadamard_rotation_is_much_larger_than_others(n: int) -> None:
    Q = hadamard(torch.eye(n, dtype=torch.float64), seed=1)
    odd = n // (n & -n)
    assert (Q.abs() <= (2 / n if odd > 1 else 1 / n) ** 0.5 + 1e-12).all()


def weights_and_gram(n: int = 24, m: int = 32) -> tuple[Tensor, Tensor]:
    """Return a random matrix `W`, (n, m), and the Gram matrix of correlated inputs, (m, m)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * m, m, generator=generator) @ torch.randn(m, m, generator=generator)
    return torch.randn(n, m, generator=generator), (x.T @ x / len(x)).double()


def loss(W: Tensor, rounded: Tensor, gram: Tensor) -> float:
    error = (W - rounded).double()
    return torch.trace(error @ gram @ error.T).item()


@pytest.mark.parametrize("group", [1, 4])
def test_error_compensation_has_the_loss_of_the_theory_and_less_than_plain_rounding(group: int) -> None:
    W, gram = weights_and_gram()
    U = inverse_factor(gram, 0.0)
    compensated: dict[int, Tensor] = {}

    def round_group(w: Tensor, start: int) -> Tensor:
        compensated[start] = w.clone()
        return w.round()

    rounded = compensated_rounding(W, U, round_group, group)
    inverses = [torch.linalg.inv(U.double()[start : start + group, start : start + group]) for start in compensated]
    expected = sum(
        ((w - w.round()).double() @ inverse).square().sum().item()
        for w, inverse in zip(compensated.values(), inverses, strict=True)
    )
    assert math.isclose(loss(W, rounded, gram), expected, rel_tol=1e-3)
    assert loss(W, rounded, gram) < 0.7 * loss(W, W.round(), gram)


def test_every_weight_adds_the_same_loss_relative_to_the_scale_of_its_row() -> None:
    W, gram = weights_and_gram(400, 32)
    U, rows, c = inverse_factor(gram, 0.0), torch.linspace(0.5, 2, 400), 0.3
    error = (W - scaled_integers(W, U, rows, U.diagonal(), c).floats(torch.float32)).double()
    per_row = torch.einsum("ri,ij,rj->r", error, gram, error) / rows.square()
    assert math.isclose(per_row.mean().item(), 32 * c * c / 12, rel_tol=0.05)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grids_and_pyramids_are_decoded_with_a_loss_that_falls_with_the_bits(bits: int) -> None:
    W, gram = weights_and_gram(24, 96)
    U = inverse_factor(gram, 0.01)
    spec = [TensorSpec("F32", tuple(W.shape))]
    compensated, nearest = round_to_grid(W, U, bits), round_to_grid(W, None, bits)
    losses = []
    for tensors, code in (
        ((*compensated, torch.tensor([bits, GROUP])), "grid"),
        ((*nearest, torch.tensor([bits, GROUP])), "grid"),
        (round_to_pyramids(W, U, min(bits, 4)), "pyramid"),
    ):
        coded = CODES[code].encode(tensors, spec)
        part_specs = {name: TensorSpec.of(part) for name, part in coded.parts.items()}
        assert part_specs == CODES[code].parts(spec, coded.params)
        [decoded] = CODES[code].decode(coded.parts, spec, coded.params)
        losses.append(loss(W, decoded, gram) / loss(W, torch.zeros_like(W), gram))
    assert losses[0] < losses[1] < 8 * 4.0**-bits
    assert losses[2] < 2 * 4.0 ** -min(bits, 4)


def quantized(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"calibration": random_text(600), "samples": 8, "seq_len": 32}
    return freebits.quantize(model, out, **(defaults | options))


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"model_type": "opt"}, {"model_type": "gpt2"}], ids=str
)
def test_a_model_is_quantized_loaded_and_unpacked(changes: dict[str, Any], save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(**changes)
    facts = quantized(dense, tmp_path / "out", bits=8)
    assert facts["bytes"]["packed"] < 0.95 * facts["bytes"]["dense"]
    result = freebits.verify(tmp_path / "out", against=dense, text=random_text(200), seq_len=32, limit=4)
    assert result["mean_kl"] < 0.02
    freebits.unpack(tmp_path / "out", tmp_path / "plain")
    plain, packed = (freebits.load(tmp_path / name).state_dict() for name in ("plain", "out"))
    assert plain.keys() == packed.keys()
    assert all(torch.equal(plain[name], packed[name]) for name in plain)


@pytest.mark.parametrize("method", ["pyramid", "gptq", "rtn"])
@pytest.mark.parametrize("rotate", ["none", "hadamard"])
def test_models_of_all_methods_and_rotations_can_be_verified_and_loaded(
    method: str, rotate: str, save_tiny: Make, tmp_path: Path
) -> None:
    dense = save_tiny()
    quantized(dense, tmp_path / "out", bits=4, method=method, rotate=rotate, only="linear")
    result = freebits.verify(tmp_path / "out", against=dense, text=random_text(200), seq_len=32, limit=4)
    assert result["mean_kl"] < 0.6  # because random weights need more than 4 bits
    weights = [dict(freebits.load(path).named_parameters()) for path in (dense, tmp_path / "out")]
    for name, weight in weights[0].items():
        error = (weights[1][name] - weight).norm()
        assert error < 0.4 * weight.norm(), name  # error compensation changes weights more than rounding does
    history = freebits.inspect(tmp_path / "out")["history"]
    assert (history[-1]["transform"], history[-1]["rotate"], history[-1]["fidelity"]) == (method, rotate, "lossy")


def test_the_target_size_is_nearly_reached_and_not_exceeded(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(hidden_size=64, intermediate_size=256)
    target = 190_000
    facts = quantized(dense, tmp_path / "out", target_size=target)
    assert 0.97 * target < facts["bytes"]["packed"] <= target


def test_the_kl_divergence_is_near_its_target(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    for target in (0.003, 0.03):
        quantized(dense, tmp_path / str(target), target_kl=target)
        result = freebits.verify(tmp_path / str(target), against=dense, text=random_text(300), seq_len=32, limit=8)
        assert target / 4 < result["mean_kl"] < 4 * target


def test_a_model_that_overflows_is_refused(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    change_tensors(dense, model__layers__1__mlp__up_proj__weight=lambda weight: weight.fill_(torch.inf))
    with pytest.raises(freebits.CheckpointError, match=r"model\.layers\.1\.mlp\."):
        quantized(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_sliced_and_canonical_models_are_quantized(
    tied: bool, save_tiny: Make, slice_tiny: Make, pack_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(tie_word_embeddings=tied))
    for name, model in (("sliced", sliced), ("canonical", pack_tiny(sliced))):
        quantized(model, tmp_path / f"{name}-4", bits=8)
        result = freebits.verify(tmp_path / f"{name}-4", against=model, text=random_text(200), seq_len=32, limit=4)
        assert result["ok"], result
        assert result["mean_kl"] < 0.02
        freebits.unpack(tmp_path / f"{name}-4", tmp_path / f"{name}-plain")


def test_without_a_text_the_model_generates_the_same_calibration_data_each_time(
    save_tiny: Make, tmp_path: Path
) -> None:
    dense = save_tiny()
    facts = freebits.quantize(dense, tmp_path / "out", samples=4, seq_len=16, bits=6)
    assert facts["history"][-1]["text"] == "its own"
    again = freebits.quantize(dense, tmp_path / "again", samples=4, seq_len=16, bits=6)
    assert (tmp_path / "again/freebits.json").read_bytes() == (tmp_path / "out/freebits.json").read_bytes()
    assert again == facts


@pytest.mark.parametrize(
    "options",
    [{"bits": 4, "target_size": 10**6}, {"bits": 0.5}, {"bits": float("nan")}, {"target_size": 3000},
     {"method": "gptq", "bits": 4.5}, {"method": "rtn", "target_size": 10**6}, {"method": "magic"}, {"rotate": "left"},
     {"only": "norms"}, {"target_kl": -1.0}],
    ids=str,
)  # fmt: skip
def test_invalid_options_are_refused(options: dict[str, Any], save_tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        quantized(save_tiny(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_rounded_activations_have_few_values_and_smaller_errors_in_a_rotated_basis() -> None:
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 40
    for function, n_values in ((round_symmetric, 15), (round_asymmetric, 16)):
        assert all(len(row.unique()) <= n_values for row in function(x, 4))
        rotated = hadamard_inverse(function(hadamard(x, 0), 4), 0)
        assert (rotated - x)[:, :7].norm() < 0.7 * (function(x, 4) - x)[:, :7].norm()


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_rounding_activations_or_the_cache_changes_perplexity_less_with_more_bits(
    model_type: str, save_tiny: Make
) -> None:
    dense, text = save_tiny(model_type=model_type), random_text(300)

    def perplexity(**options: Any) -> float:
        result: float = freebits.evaluate(dense, text=text, seq_len=32, limit=4, **options)["perplexity"]
        return result

    exact = perplexity()
    for option in ("activations", "kv"):
        assert math.isclose(perplexity(**{option: 16}), exact, rel_tol=0.15)  # because the largest values are clipped
        assert math.isclose(perplexity(**{option: 16}, rotate="hadamard"), exact, rel_tol=0.15)
        assert not math.isclose(perplexity(**{option: 2}), perplexity(**{option: 16}), rel_tol=1e-3)
    with pytest.raises(UsageError, match="`activations` is 1"):
        perplexity(activations=1)


@pytest.mark.parametrize("variant", ["llama tied", "llama untied", "llama gqa", "llama biases", "llama narrow heads"])
def test_a_rotated_model_computes_the_same(variant: str, save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(dtype=torch.float64, **VARIANTS[variant])
    freebits.rotate_model(dense, tmp_path / "rotated")
    tokens = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (
            in_float64(freebits.load(path))(input_ids=tokens).logits for path in (dense, tmp_path / "rotated")
        )
    assert (before - after).abs().max() < 1e-9 * before.abs().max()
    norms = [tensor for name, tensor in freebits.load(tmp_path / "rotated").named_parameters() if "norm" in name]
    assert all((norm == 1).all() for norm in norms)


def test_a_model_whose_norms_subtract_the_mean_is_not_rotated(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(model_type="opt")
    with pytest.raises(freebits.UnsupportedModelError, match=re.escape(str(dense))):
        freebits.rotate_model(dense, tmp_path / "out")
