"""Pairs of matrices with a free basis between them."""

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
    # name: pairs in each of three blocks, of values and of queries
    "SmolLM3": (1, 1, 2),
    "Phi-3": (1, 1, 1),
    "DeepSeek V3": (0, 0, 0),
    **dict.fromkeys(("StableLM", "StableLM, parallel", "Phi-2", "Pythia", "GPT-NeoX, sequential"), (2, 2, 2)),
    **dict.fromkeys(("Falcon RW", "GPT-2", "OPT", "OPT without biases"), (2, 2, 2)),
}


def bases(size: int, n_spaces: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n_spaces, size, size, generator=generator, dtype=torch.float64) + 2 * torch.eye(size)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_any_basis_between_a_pair_is_the_same_function(name: str, report: Callable[[str], None]) -> None:
    model, generator = tiny_model(**FAMILIES[name]), torch.Generator().manual_seed(1)
    architecture = Architecture.of(tiny_config(**FAMILIES[name]).to_dict())
    tokens = torch.randint(96, (2, 40), generator=generator)
    expected = in_float64(model)(tokens).logits
    state = dict(model.state_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    found = [find_pairs(architecture, part, shapes, dense=True) for part in architecture.parts]
    assert [len(pairs) for pairs in found] == [0, *N_PAIRS.get(name, (1, 1, 1)), 0]
    for pair in (pair for pairs in found for pair in pairs):
        acted = act(state, pair, bases(pair.size, pair.n_spaces, generator))
        assert all((acted[key] - state[key]).abs().max() > 1e-2 for key in acted)
        state |= acted
    model.load_state_dict(state)
    difference = (model(tokens).logits - expected).abs().max().item()
    report(f"{name}: in other bases it differs by {difference:.1e}")
    is_routed = any(weight.ndim == 3 for weight in architecture.weights.values())
    assert difference < (1e-5 if is_routed else 1e-9) < expected.std()


@pytest.mark.parametrize("name", ["Llama 3", "GPT-2", "OPT", "Falcon 40B"])
@torch.no_grad()
def test_the_same_holds_of_a_folded_model(name: str) -> None:
    config, generator = tiny_config(**FAMILIES[name]), torch.Generator().manual_seed(1)
    architecture, model = Architecture.of(config.to_dict()), tiny_model(**FAMILIES[name])
    tokens = torch.randint(96, (2, 40), generator=generator)
    state = folded_state(model, architecture)
    expected = unsliced(config, architecture, state)(tokens).logits
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for part in architecture.parts:
        for pair in find_pairs(architecture, part, shapes, dense=False):
            state |= act(state, pair, bases(pair.size, pair.n_spaces, generator))
    assert (unsliced(config, architecture, state)(tokens).logits - expected).abs().max() < 1e-9


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), r=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_pivots_make_the_other_rows_small(n: int, r: int, seed: int) -> None:
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


def test_what_has_no_full_rank_has_no_pivots() -> None:
    A = torch.ones(8, 3, dtype=torch.float64)
    assert pivot_rows(A) is None
    assert pivot_rows(torch.full((8, 3), torch.inf)) is None


def test_in_pivot_bases_a_head_has_the_identity() -> None:
    architecture = Architecture.of(tiny_config(num_key_value_heads=2).to_dict())
    state = tiny_model(num_key_value_heads=2).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    [pair] = find_pairs(architecture, architecture.parts[1], shapes, dense=True)
    found = pivot_bases(state, pair)
    assert found is not None
    values = act(state, pair, found[0])[pair.writes[0].name]
    for head, columns in enumerate(found[1]):
        block = values[8 * head : 8 * head + 8, columns]
        assert torch.allclose(block, torch.eye(8, dtype=torch.float64), atol=1e-12)


def numbers_stored(folder: Path) -> int:
    return sum(spec.numel for name, spec in PackedFolder(folder).stored.items() if not name.endswith(".pivots"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "DeepSeek V3"])
@torch.no_grad()
def test_a_dense_model_is_packed_without_the_bits_of_its_pairs(name: str, save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(**FAMILIES[name], dtype=torch.float32)
    facts = freebits.pack(dense, tmp_path / "out", entropy="none")
    assert (facts["kind"], facts["codec"], facts["sites"]) == ("packed", "canonical", [])
    checkpoint = Checkpoint(dense)
    architecture = Architecture.of(checkpoint.config)
    shapes = {key: spec.shape for key, spec in checkpoint.specs.items()}
    pairs = [pair for part in architecture.parts for pair in find_pairs(architecture, part, shapes, dense=True)]
    free = sum(pair.n_spaces * pair.size**2 for pair in pairs)
    spared = sum(spec.numel for spec in checkpoint.specs.values()) - numbers_stored(tmp_path / "out")
    assert spared == free > 0
    tokens = torch.arange(40)[None]
    expected = freebits.load(dense)(tokens).logits
    assert (freebits.load(tmp_path / "out")(tokens).logits - expected).abs().max() < 1e-3 < expected.std()
    freebits.unpack(tmp_path / "out", tmp_path / "plain")
    assert freebits.inspect(tmp_path / "plain")["kind"] == "dense"
    assert Checkpoint(tmp_path / "plain").specs == checkpoint.specs


def test_a_head_without_full_rank_is_left_as_it_is(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(num_hidden_layers=1, dtype=torch.float16)
    name = "model.layers.0.self_attn.v_proj.weight"
    change_tensors(dense, **{name.replace(".", "__"): lambda tensor: tensor.index_fill(0, torch.tensor([1]), 0.0)})
    freebits.pack(dense, tmp_path / "out", entropy="none")
    assert torch.equal(PackedFolder(tmp_path / "out")[name], Checkpoint(dense)[name])
    assert name in PackedFolder(tmp_path / "out").stored


def test_what_has_no_pairs_is_refused(save_tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="`codec` to none"):
        freebits.pack(save_tiny(**FAMILIES["DeepSeek V3"]), tmp_path / "out")
    with pytest.raises(CheckpointError, match="codec bits-back"):
        freebits.pack(save_tiny("llama"), tmp_path / "out", codec="bits-back")


@pytest.mark.parametrize("name", ["Llama 3", "OPT", "GPT-2"])
def test_a_sliced_model_has_pairs_too(name: str, save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(save_tiny(**FAMILIES[name], dtype=torch.float32), force=True)
    freebits.pack(sliced, tmp_path / "out", entropy="none")
    pivots = [key for key in PackedFolder(tmp_path / "out").stored if key.endswith(".pivots")]
    first = {"Llama 3": 1, "OPT": 1, "GPT-2": 0}[name]  # of the first block some are in the matrix of site 0
    assert len(pivots) == first + 2 * {"Llama 3": 1, "OPT": 2, "GPT-2": 1}[name]
    tokens = torch.arange(40)[None]
    difference = freebits.load(tmp_path / "out")(tokens).logits - freebits.load(sliced)(tokens).logits
    assert difference.abs().max() < 1e-3
