"""Pairs of matrices whose basis can be chosen freely, and packing that uses this freedom."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import freebits
from freebits import CheckpointError
from freebits.models.architecture import Architecture
from freebits.models.free_bases import find_pairs
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from freebits.transforms.pivoting import act, pivot_bases, pivot_rows
from tests.test_symmetry import folded_state, unsliced
from tests.tiny import FAMILIES, Make, change_tensors, in_float64, tiny_config, tiny_model

N_PAIRS = {
    "SmolLM3": (1, 1, 2),
    "Phi-3": (1, 1, 1),
    "DeepSeek V3": (0, 0, 0),
    **dict.fromkeys(("StableLM", "StableLM, parallel", "Phi-2", "Pythia", "GPT-NeoX, sequential"), (2, 2, 2)),
    **dict.fromkeys(("Falcon RW", "GPT-2", "OPT", "OPT without biases"), (2, 2, 2)),
}
"""Family → number of pairs of values and of queries in each of three blocks; (1, 1, 1) if the family is not listed."""


def random_bases(size: int, n_spaces: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n_spaces, size, size, generator=generator, dtype=torch.float64) + 2 * torch.eye(size)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_dense_model_computes_the_same_in_any_basis_of_its_pairs(name: str, report: Callable[[str], None]) -> None:
    model, generator = tiny_model(**FAMILIES[name]), torch.Generator().manual_seed(1)
    architecture = Architecture.of(tiny_config(**FAMILIES[name]).to_dict())
    tokens = torch.randint(96, (2, 40), generator=generator)
    expected = in_float64(model)(tokens).logits
    state = dict(model.state_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    pairs_by_part = [find_pairs(architecture, part, shapes, dense=True) for part in architecture.parts]
    assert [len(pairs) for pairs in pairs_by_part] == [0, *N_PAIRS.get(name, (1, 1, 1)), 0]
    for pair in (pair for pairs in pairs_by_part for pair in pairs):
        changed = act(state, pair, random_bases(pair.size, pair.n_spaces, generator))
        assert all((changed[key] - state[key]).abs().max() > 1e-2 for key in changed)
        state |= changed
    model.load_state_dict(state)
    difference = (model(tokens).logits - expected).abs().max().item()
    report(f"{name}: logits in other bases differ by {difference:.1e}")
    is_routed = any(weight.ndim == 3 for weight in architecture.weights.values())
    assert difference < (1e-5 if is_routed else 1e-9) < expected.std()


@pytest.mark.parametrize("name", ["Llama 3", "GPT-2", "OPT", "Falcon 40B"])
@torch.no_grad()
def test_a_folded_model_computes_the_same_in_any_basis_of_its_pairs(name: str) -> None:
    config, generator = tiny_config(**FAMILIES[name]), torch.Generator().manual_seed(1)
    architecture, model = Architecture.of(config.to_dict()), tiny_model(**FAMILIES[name])
    tokens = torch.randint(96, (2, 40), generator=generator)
    state = folded_state(model, architecture)
    expected = unsliced(config, architecture, state)(tokens).logits
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for part in architecture.parts:
        for pair in find_pairs(architecture, part, shapes, dense=False):
            state |= act(state, pair, random_bases(pair.size, pair.n_spaces, generator))
    assert (unsliced(config, architecture, state)(tokens).logits - expected).abs().max() < 1e-9


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), r=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_the_other_rows_have_small_entries_in_the_basis_of_the_pivots(n: int, r: int, seed: int) -> None:
    A = torch.randn(n, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = pivot_rows(A)
    if n < r:
        assert rows is None
        return
    assert rows is not None
    assert rows.tolist() == sorted(set(rows.tolist()))
    T = A @ torch.linalg.inv(A[rows])
    assert torch.allclose(T[rows], torch.eye(r, dtype=torch.float64), atol=1e-6)
    assert T.abs().max() <= 1.11


def test_a_matrix_without_full_rank_or_finite_entries_has_no_pivots() -> None:
    A = torch.ones(8, 3, dtype=torch.float64)
    assert pivot_rows(A) is None
    assert pivot_rows(torch.full((8, 3), torch.inf)) is None


def test_every_head_contains_the_identity_in_its_pivot_basis() -> None:
    architecture = Architecture.of(tiny_config(num_key_value_heads=2).to_dict())
    state = tiny_model(num_key_value_heads=2).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    [pair] = find_pairs(architecture, architecture.parts[1], shapes, dense=True)
    result = pivot_bases(state, pair)
    assert result is not None
    pivot_basis, pivots = result
    values = act(state, pair, pivot_basis)[pair.writes[0].name]
    for head, columns in enumerate(pivots):
        block = values[8 * head : 8 * head + 8, columns]
        assert torch.allclose(block, torch.eye(8, dtype=torch.float64), atol=1e-12)


def n_stored_values(folder: Path) -> int:
    return sum(spec.numel for name, spec in PackedFolder(folder).stored.items() if not name.endswith(".pivots"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "DeepSeek V3"])
@torch.no_grad()
def test_packing_a_dense_model_saves_the_free_values_of_its_pairs(name: str, save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(**FAMILIES[name], dtype=torch.float32)
    facts = freebits.pack(dense, tmp_path / "out", entropy="none")
    assert (facts["kind"], facts["codec"], facts["sites"]) == ("packed", "canonical", [])
    checkpoint = Checkpoint(dense)
    architecture = Architecture.of(checkpoint.config)
    shapes = {key: spec.shape for key, spec in checkpoint.specs.items()}
    pairs = [pair for part in architecture.parts for pair in find_pairs(architecture, part, shapes, dense=True)]
    n_free = sum(pair.n_spaces * pair.size**2 for pair in pairs)
    n_saved = sum(spec.numel for spec in checkpoint.specs.values()) - n_stored_values(tmp_path / "out")
    assert n_saved == n_free > 0
    tokens = torch.arange(40)[None]
    expected = freebits.load(dense)(tokens).logits
    assert (freebits.load(tmp_path / "out")(tokens).logits - expected).abs().max() < 1e-3 < expected.std()
    freebits.unpack(tmp_path / "out", tmp_path / "plain")
    assert freebits.inspect(tmp_path / "plain")["kind"] == "dense"
    assert Checkpoint(tmp_path / "plain").specs == checkpoint.specs


def test_a_head_without_full_rank_is_stored_unchanged(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(num_hidden_layers=1, dtype=torch.float16)
    name = "model.layers.0.self_attn.v_proj.weight"
    change_tensors(dense, **{name.replace(".", "__"): lambda tensor: tensor.index_fill(0, torch.tensor([1]), 0.0)})
    freebits.pack(dense, tmp_path / "out", entropy="none")
    assert torch.equal(PackedFolder(tmp_path / "out")[name], Checkpoint(dense)[name])
    assert name in PackedFolder(tmp_path / "out").stored


def test_codecs_that_do_not_suit_a_dense_model_are_refused(save_tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="`codec`"):
        freebits.pack(save_tiny(**FAMILIES["DeepSeek V3"]), tmp_path / "out")
    with pytest.raises(CheckpointError, match="bits-back"):
        freebits.pack(save_tiny("llama"), tmp_path / "out", codec="bits-back")


@pytest.mark.parametrize("name", ["Llama 3", "OPT", "GPT-2"])
def test_a_sliced_model_is_packed_with_pivots(name: str, save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(save_tiny(**FAMILIES[name], dtype=torch.float32), force=True)
    freebits.pack(sliced, tmp_path / "out", entropy="none")
    pivots = [key for key in PackedFolder(tmp_path / "out").stored if key.endswith(".pivots")]
    n_in_first_block = {"Llama 3": 1, "OPT": 1, "GPT-2": 0}[name]  # the other pairs are in the matrix of site 0
    n_per_block = {"Llama 3": 1, "OPT": 2, "GPT-2": 1}[name]
    assert len(pivots) == n_in_first_block + 2 * n_per_block
    tokens = torch.arange(40)[None]
    difference = freebits.load(tmp_path / "out")(tokens).logits - freebits.load(sliced)(tokens).logits
    assert difference.abs().max() < 1e-3
