"""For every row of the architecture table, the symmetry holds, and all commands work on a tiny model."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import freebits
from benchmarks.families_page import families_page
from freebits.models.architecture import Architecture
from freebits.models.families import FAMILIES as ROWS
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from freebits.transforms.orthogonal import random_orthogonal, rotate
from tests.test_symmetry import folded_state, unsliced
from tests.tiny import FAMILIES, Make, in_float64, random_text, tiny_config, tiny_model

MAX_DIFFERENCE = 0.1
MAX_ROUTED_DIFFERENCE = 1e-5
"""Largest difference of logits for models with routers, because routers always compute in float32."""


def test_every_row_has_a_tiny_model() -> None:
    assert {Architecture.of(tiny_config(**changes).to_dict()).family for changes in FAMILIES.values()} == {*ROWS}


def test_the_families_page_is_generated_from_the_table() -> None:
    page = Path(__file__).parent.parent / "docs" / "families.md"
    assert page.read_text(encoding="utf-8") == families_page()  # otherwise run python -m benchmarks.families


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_folded_and_randomly_rotated_model_equals_the_original(name: str, report: Callable[[str], None]) -> None:
    config = tiny_config(**FAMILIES[name])
    architecture = Architecture.of(config.to_dict())
    original = tiny_model(**FAMILIES[name])
    generator = torch.Generator().manual_seed(1)
    rotations = {site: random_orthogonal(config.hidden_size, generator) for site in architecture.free_sites}
    folded = folded_state(original, architecture)
    state = {key: rotate(tensor, architecture.weights[key].axes, rotations) for key, tensor in folded.items()}
    rotated = unsliced(config, architecture, state)
    tokens = torch.randint(config.vocab_size, (2, 40), generator=generator)
    expected = in_float64(original)(tokens).logits
    difference = (rotated(tokens).logits - expected).abs().max().item()
    report(f"{name}: folded and rotated differs by {difference:.1e}")
    is_routed = any(weight.ndim == 3 for weight in architecture.weights.values())
    assert difference < (MAX_ROUTED_DIFFERENCE if is_routed else 1e-9) < expected.std()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_can_be_sliced_packed_and_unpacked(
    name: str, save_tiny: Make, slice_tiny: Make, pack_tiny: Make
) -> None:
    dense = save_tiny(**FAMILIES[name], dtype=torch.float16)
    sliced = slice_tiny(dense, force=True)
    expected = logits_of(sliced)
    for codec in freebits.options.CODECS:
        packed = pack_tiny(sliced, name=codec, codec=codec)
        assert differs(logits_of(packed), expected) < MAX_DIFFERENCE, codec
        unpacked = packed.parent / f"unpacked from {codec}"
        freebits.unpack(packed, unpacked)
        assert differs(logits_of(unpacked), expected) < MAX_DIFFERENCE, codec


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_of_a_model_is_quantized(name: str, save_tiny: Make) -> None:
    dense = save_tiny(**FAMILIES[name], dtype=torch.float16)
    expected = logits_of(dense)
    for rotation in freebits.options.ROTATIONS:
        out = dense.parent / rotation
        text = random_text(600)
        freebits.quantize(dense, out, target_kl=1e-6, calibration=text, samples=8, seq_len=32, rotate=rotation)
        assert differs(logits_of(out), expected) < MAX_DIFFERENCE
        freebits.unpack(out, dense.parent / f"unpacked from {rotation}")
        assert differs(logits_of(dense.parent / f"unpacked from {rotation}"), expected) < MAX_DIFFERENCE
    folder = PackedFolder(out)
    recipes = {tensor: recipe for recipe in folder.manifest.recipes for tensor in recipe.makes}
    unquantized = []
    for tensor, spec in Checkpoint(dense).specs.items():
        recipe = recipes.get(tensor)
        while recipe and recipe.code in ("transposed", "hadamard"):
            recipe = recipes.get(next(iter(recipe.takes.values())))
        if len(spec.shape) > 1 and (recipe is None or recipe.code == "entropy"):
            unquantized.append(tensor)
    n_routers_and_positions = 4
    assert len(unquantized) <= n_routers_and_positions, unquantized


@pytest.mark.parametrize("name", ["Granite", "Phi-3", "Qwen3", "Mixtral", "Qwen3-MoE", "DeepSeek V3"])
def test_a_rotated_model_computes_the_same_function(name: str, save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(**FAMILIES[name], dtype=torch.float32)
    freebits.rotate_model(dense, tmp_path / "rotated")
    assert differs(logits_of(tmp_path / "rotated"), logits_of(dense)) < 1e-4


def test_tensor_names_of_old_checkpoints_are_understood_and_restored(
    save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    dense = save_tiny(model_type="gpt2", dtype=torch.float16)
    expected = logits_of(dense)
    state = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(dense / "model.safetensors").items()
    }
    state |= {f"h.{block}.attn.bias": torch.ones(1, 1, 64, 64).tril() for block in range(3)}  # no model reads these
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    sliced = slice_tiny(dense, force=True)
    assert differs(logits_of(sliced), expected) < 1
    freebits.quantize(dense, tmp_path / "out", target_kl=1e-6, calibration=random_text(600), samples=8, seq_len=32)
    freebits.unpack(tmp_path / "out", tmp_path / "back")
    for folder in ("out", "back"):
        assert differs(logits_of(tmp_path / folder), expected) < MAX_DIFFERENCE
    assert {*Checkpoint(tmp_path / "back").specs} == {*state}


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2", "olmo3", "cohere"])
def test_a_model_that_cannot_be_sliced_can_be_quantized(model_type: str, save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(model_type=model_type, num_key_value_heads=2, dtype=torch.float16)
    with pytest.raises(freebits.UnsupportedModelError, match=f"{model_type!r}.*quantize"):
        freebits.slice_model(dense, tmp_path / "sliced", sparsity=0.2)
    freebits.quantize(dense, tmp_path / "out", target_kl=1e-6, calibration=random_text(600), samples=8, seq_len=32)
    assert differs(logits_of(tmp_path / "out"), logits_of(dense)) < MAX_DIFFERENCE


def differs(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the mean difference of logits relative to their spread.

    The largest difference is not meaningful, because a small error may route a token to other experts.
    """
    return ((logits - expected).abs().mean() / expected.std()).item()


@torch.no_grad()
def logits_of(folder: Any) -> torch.Tensor:
    model: Any = freebits.load(folder, dtype=torch.float32)
    tokens = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] == 28
    logits: torch.Tensor = model(tokens).logits
    assert logits.isfinite().all()
    return logits
