"""The canonical form stores fewer values, but computes the same function."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import freebits
from freebits import UsageError
from freebits.models.architecture import Architecture
from freebits.models.layout import Layout
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from freebits.transforms.dense_shortcuts import DenseShortcutView
from freebits.transforms.orthogonal import random_orthogonal
from freebits.transforms.polar import carried_rotation, polar_form, shortcut_from_factor, trapezoid, triangular_rotation
from tests.test_packed import without_history
from tests.tiny import VARIANTS, Make, change_config, change_tensors, in_float64, tensors_of, tiny_config

TOKENS = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(0))
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32)


def sliced_shortcut(width: int, before: int, after: int, seed: int) -> Tensor:
    """Return a shortcut (before, after) as slicing produces it from random rotations of a stream of this width."""
    generator = torch.Generator().manual_seed(seed)
    Q_before, Q_after = (random_orthogonal(width, generator) for _ in range(2))
    return Q_before[:, :before].T @ Q_after[:, :after]


@settings(max_examples=60, deadline=None)
@given(before=sizes, added=st.integers(0, 4), removed=st.integers(0, 12), seed=seeds)
def test_the_carried_rotation_makes_a_shortcut_identity_minus_a_low_rank_matrix(
    before: int, added: int, removed: int, seed: int
) -> None:
    after = before + added
    A = sliced_shortcut(after + removed, before, after, seed)
    G = random_orthogonal(before, torch.Generator().manual_seed(seed + 1))
    shortcut = polar_form(A, 1e-9)
    carried = carried_rotation(G, shortcut.rotation)
    assert torch.allclose(carried.T @ carried, torch.eye(after, dtype=torch.float64), atol=1e-9)
    rotated = G.T @ A @ carried
    assert torch.allclose(rotated[:, before:], torch.zeros(before, added, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(rotated[:, :before], rotated[:, :before].T, atol=1e-9)
    if shortcut.factor is None:  # no singular value is 1
        assert removed >= before
        return
    M = trapezoid(G.T @ shortcut.factor)
    assert M.shape[1] <= removed
    assert torch.equal(M.triu(1), torch.zeros_like(M))
    assert torch.allclose(shortcut_from_factor(M, after).T, rotated, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 16), columns=sizes, seed=seeds)
def test_the_triangular_rotation_makes_a_matrix_lower_trapezoidal(rows: int, columns: int, seed: int) -> None:
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    G = triangular_rotation(W)
    rotated = W @ G
    assert torch.allclose(G.T @ G, torch.eye(columns, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(rotated, rotated.tril(), atol=1e-10)
    assert (rotated.diagonal() >= -1e-12).all()


def test_only_a_matrix_with_a_singular_value_of_one_has_a_factor() -> None:
    identity = torch.eye(4, dtype=torch.float64)
    assert polar_form(1.1 * identity, 1e-3).factor is None
    assert polar_form(0.5 * identity, 1e-3).factor is None
    factor = polar_form(identity, 1e-3).factor
    assert factor is not None
    assert factor.shape == (4, 0)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        result: Tensor = in_float64(freebits.load(folder, dtype=torch.float64))(TOKENS).logits
    return result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("untie", [False, True])
def test_in_float64_the_canonical_and_the_sliced_model_agree(
    variant: str, untie: bool, save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(dtype=torch.float64, **VARIANTS[variant]), untie=untie)
    facts = freebits.pack(sliced, tmp_path / "packed")
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    expected = logits(sliced)
    assert (logits(tmp_path / "packed") - expected).abs().max() < 1e-9 < expected.std()
    assert (logits(tmp_path / "unpacked") - expected).abs().max() < 1e-9
    plain = {site["site"]: site["reason"] for site in facts["sites"] if "code" not in site}
    tied = json.loads((sliced / "config.json").read_text())["tie_word_embeddings"]
    assert [*plain] == ([6] if tied else [])
    assert all("head" in reason for reason in plain.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packing_changes_logits_by_no_more_than_rounding_to_the_dtype(
    dtype: torch.dtype, save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(dtype=dtype, hidden_size=64, intermediate_size=160))
    facts = freebits.pack(sliced, tmp_path / "packed")
    assert facts["bytes"]["packed"] < facts["bytes"]["sliced"]
    expected = logits(sliced)
    error = (logits(tmp_path / "packed") - expected).std() / expected.std()
    assert 0 < error < 8 * torch.finfo(dtype).eps


def test_an_unpacked_model_has_the_specs_and_config_of_the_sliced_model(
    save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(shard="20KB"))
    freebits.pack(sliced, tmp_path / "packed")
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    before, after = Checkpoint(sliced), Checkpoint(tmp_path / "unpacked")
    assert after.specs == before.specs
    assert without_history(after.config) == without_history(before.config)


def test_a_loaded_model_that_transformers_saved_can_be_packed_again(
    save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(dtype=torch.float64, tie_word_embeddings=True))
    freebits.pack(sliced, tmp_path / "packed")
    freebits.load(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    name = "model.layers.1.mlp_shortcut.factor"  # after this rotation, it is not trapezoidal
    state[name] = state[name] @ random_orthogonal(state[name].shape[1], torch.Generator().manual_seed(0))
    save_file(state, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    expected = logits(sliced)
    for name in ("first", "second"):
        freebits.pack(tmp_path / "saved", tmp_path / name)
        assert (logits(tmp_path / name) - expected).abs().max() < 1e-9


def test_a_shortcut_without_a_low_rank_factor_is_stored_as_a_symmetric_matrix(
    save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(dtype=torch.float64))
    change_tensors(sliced, model__layers__1__attention_shortcut__weight=lambda A: 1.5 * A)
    facts = freebits.pack(sliced, tmp_path / "packed")
    codecs = {site["site"]: site["code"] for site in facts["sites"]}
    assert codecs == {0: "lower", 1: "lower", 2: "lower", 3: "symmetric", 4: "lower", 5: "lower", 6: "lower"}
    config = PackedFolder(tmp_path / "packed").config
    assert [rank is None for rank in config["shortcut_ranks"]] == [False, False, True, False, False, False]
    expected = logits(sliced)
    assert (logits(tmp_path / "packed") - expected).abs().max() < 1e-9
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert (logits(tmp_path / "unpacked") - expected).abs().max() < 1e-9


def test_a_site_with_an_unsound_weight_is_stored_plain_with_the_reason(
    save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny())
    change_tensors(
        sliced,
        model__layers__1__self_attn__o_proj__weight=lambda W: W.fill_(float("nan")),
        model__embed_tokens__weight=lambda E: E.index_fill(0, torch.tensor([3]), 65504),
    )
    facts = freebits.pack(sliced, tmp_path / "packed")
    plain = {site["site"]: site["reason"] for site in facts["sites"] if "code" not in site}
    assert {site: reason.split()[0] for site, reason in plain.items()} == {
        0: "model.embed_tokens.weight",
        3: "model.layers.1.self_attn.o_proj.weight",
    }
    unpacked = tensors_of(tmp_path / "packed")
    assert unpacked["model.layers.1.self_attn.o_proj.weight"].isnan().all()
    assert torch.equal(
        unpacked["model.embed_tokens.weight"], load_file(sliced / "model.safetensors")["model.embed_tokens.weight"]
    )


def test_a_site_is_stored_plain_only_if_the_stream_narrows_there(
    save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(dtype=torch.float64))
    cut_sites(sliced, widths=[16, 16, 20, 20, 24, 20, 32])
    facts = freebits.pack(sliced, tmp_path / "packed")
    assert [site["site"] for site in facts["sites"] if "code" not in site] == [5]
    expected = logits(sliced)
    assert (logits(tmp_path / "packed") - expected).abs().max() < 1e-9


def cut_sites(sliced: Path, widths: list[int]) -> None:
    """Cut the sites of a sliced model to these widths."""
    checkpoint = Checkpoint(sliced)
    rows = Architecture.of(checkpoint.config).weights
    state = dict(checkpoint.items())
    for name in state:
        for axis in rows[name].axes:
            state[name] = state[name].narrow(axis.dim, 0, widths[axis.site]).contiguous()
    save_file(state, sliced / "model.safetensors", metadata={"format": "pt"})
    (sliced / "config.json").write_text(json.dumps(checkpoint.config | {"site_sizes": widths}))


@pytest.mark.parametrize("ranks", [5, [4], ["4"] * 6, [-1] * 6, [3] * 6, [4.0] * 6, [True] * 6, [None] * 6])
def test_invalid_ranks_are_refused(ranks: Any, save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> None:
    freebits.pack(slice_tiny(save_tiny()), tmp_path / "packed")
    freebits.load(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    change_config(tmp_path / "saved", shortcut_ranks=ranks)
    with pytest.raises(freebits.CheckpointError):
        freebits.pack(tmp_path / "saved", tmp_path / "again")


@pytest.mark.parametrize("change", [{"shortcut_ranks": [3] * 6}, {"site_sizes": [24.0] * 6 + [32]}])
def test_a_config_with_wrong_ranks_or_widths_is_refused(
    change: dict[str, Any], save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny())
    change_config(sliced, **change)
    with pytest.raises(freebits.CheckpointError):
        freebits.pack(sliced, tmp_path / "packed")


def test_shortcuts_are_symmetric_matrices_at_high_sparsity(save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(save_tiny(dtype=torch.float64, tie_word_embeddings=True), sparsity=0.75)
    facts = freebits.pack(sliced, tmp_path / "packed")
    assert {site["code"] for site in facts["sites"][1:-1]} == {"symmetric"}
    assert (logits(tmp_path / "packed") - logits(sliced)).abs().max() < 1e-9


def test_every_tensor_can_be_read_separately(save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> None:
    freebits.pack(slice_tiny(save_tiny()), tmp_path / "packed")
    packed, everything = PackedFolder(tmp_path / "packed"), tensors_of(tmp_path / "packed")
    assert packed.specs.keys() == everything.keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in everything.items())


def test_an_embedding_factor_that_could_overflow_is_not_rotated(
    save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(tie_word_embeddings=True))
    change_tensors(sliced, model__embed_tokens__factor=lambda F: F.index_fill(0, torch.tensor([3]), 65504))
    facts = freebits.pack(sliced, tmp_path / "packed")
    assert facts["sites"][0]["reason"].startswith("model.embed_tokens.factor ")
    assert torch.equal(
        tensors_of(tmp_path / "packed")["model.embed_tokens.factor"],
        load_file(sliced / "model.safetensors")["model.embed_tokens.factor"],
    )


def test_a_forged_shortcut_that_does_not_fit_in_memory_is_refused(save_tiny: Make, slice_tiny: Make) -> None:
    # Regression: a factor of rank 0 has no bytes, but expands to a matrix of any size. This raised RuntimeError.
    sliced = slice_tiny(save_tiny())
    change_config(sliced, site_sizes=[24] * 6 + [2**30], shortcut_ranks=[None] * 5 + [0])
    state = load_file(sliced / "model.safetensors")
    del state["model.layers.2.mlp_shortcut.weight"]
    save_file(state, sliced / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(freebits.CheckpointError, match="site 6"):
        freebits.pack(sliced, sliced.with_name("packed"))
    forged = DenseShortcutView.__new__(DenseShortcutView)
    forged._weight_of_factor = {"f": "w"}
    forged._sublayers = {"w": Architecture.of(tiny_config().to_dict()).sublayers[0]}
    forged._layout = Layout((2**20, 2**20), (0,))
    with pytest.raises(freebits.CheckpointError, match=r"tensor f\b"):
        forged.expand("f", torch.empty(2**20, 0))


@pytest.mark.parametrize("codec", ["canonical", "bits-back"])
def test_packing_accepts_a_device_name_and_refuses_an_unknown_one(
    codec: str, save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny())
    for number, device in enumerate(("cpu", "cpu:0")):
        freebits.pack(sliced, tmp_path / str(number), codec=codec, device=device)
    other = tensors_of(tmp_path / "1")
    assert all(torch.equal(tensor, other[name]) for name, tensor in tensors_of(tmp_path / "0").items())
    with pytest.raises(UsageError, match="nowhere"):
        freebits.pack(sliced, tmp_path / "out", codec=codec, device="nowhere")
    assert not (tmp_path / "out").exists()
