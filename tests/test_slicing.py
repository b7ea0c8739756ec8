"""Slicing: the principal axes, kept; the rest, gone."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freebits
from freebits.checkpoint import Checkpoint
from freebits.errors import CheckpointError, UsageError
from freebits.huggingface import load, token_windows
from freebits.slicing import principal_axes, sliced_size
from freebits.symmetry import random_orthogonal
from tests.tiny import VARIANTS, random_text

Save = Callable[..., Path]


@pytest.mark.parametrize(
    ("hidden", "sparsity", "expected"),
    [(576, 0.2, 456), (320, 0.8, 64), (2048, 0.25, 1536), (4096, 0.3, 2864), (100, 0, 100)],
)
def test_sliced_size_is_rounded_down_to_a_multiple_of_eight(hidden: int, sparsity: float, expected: int) -> None:
    assert sliced_size(hidden, sparsity) == expected


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 0.99, float("nan")])
def test_a_senseless_sparsity_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match="sparsity"):
        sliced_size(64, sparsity)


def test_principal_axes_are_the_strongest_directions_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    Q = random_orthogonal(12, generator)
    x = torch.randn(9000, 12, generator=generator, dtype=torch.float64) * torch.linspace(6, 1, 12) @ Q.T
    axes = principal_axes(x.float(), 4)
    assert axes.dtype == torch.float64
    assert ((axes * Q[:, :4]).sum(0).abs() > 0.98).all()


def logits(path: Path, text: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = load(path, dtype=torch.float64)(token_windows(path, text, 32)).logits
    return result


def confine(folder: Path, size: int) -> None:
    """Let every producer of the residual stream write into one subspace of `size` dimensions only."""
    state = load_file(folder / "model.safetensors")
    basis = random_orthogonal(32, torch.Generator().manual_seed(5))[:, :size]
    projector = basis @ basis.T
    for name, tensor in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            state[name] = projector @ tensor
        elif name.endswith(("o_proj.bias", "down_proj.bias", "out_proj.bias", "fc2.bias")) or "embed" in name:
            state[name] = tensor @ projector
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"random_orientation": True}, {"untie": True}])
def test_slicing_away_what_is_empty_changes_nothing(
    variant: str, options: dict[str, bool], save_tiny: Save, slice_tiny: Save
) -> None:
    dense = save_tiny(dtype=torch.float64, **VARIANTS[variant])
    confine(dense, size=24)
    sliced = slice_tiny(dense, sparsity=0.25, **options)
    expected = logits(dense, random_text(64, seed=3))
    difference = (logits(sliced, random_text(64, seed=3)) - expected).abs().max()
    assert difference < 1e-3 * expected.std()  # the calibration runs in float32, the dense norm too


def test_sparsity_zero_keeps_the_function(save_tiny: Save, slice_tiny: Save) -> None:
    dense = save_tiny(dtype=torch.float64)
    sliced = slice_tiny(dense, sparsity=0.0)
    expected = logits(dense, random_text(64, seed=3))
    assert (logits(sliced, random_text(64, seed=3)) - expected).abs().max() < 1e-4  # float32 in the dense norm


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(save_tiny: Save, slice_tiny: Save) -> None:
    dense = save_tiny()
    options: dict[str, Any] = {"random_orientation": True, "samples": 4}
    files = [
        (slice_tiny(dense, name, seed=seed, **options) / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert files[0] == files[1] != files[2]


def test_config_and_shapes_of_a_sliced_checkpoint(save_tiny: Save, slice_tiny: Save) -> None:
    dense = save_tiny(tie_word_embeddings=True, dtype=torch.bfloat16)
    sliced = slice_tiny(dense, untie=True)
    config = json.loads((sliced / "config.json").read_text())
    assert config["site_sizes"] == [24] * 6 + [32]
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == "bfloat16"
    state = load_file(sliced / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert state["model.layers.0.attention_shortcut.weight"].shape == (24, 24)
    assert state["model.layers.2.mlp_shortcut.weight"].shape == (32, 24)
    assert state["lm_head.weight"].shape == (96, 32)
    assert not [name for name in state if "norm" in name]
    untied = config["slicing"]["bytes"]["dense_untied"] - config["slicing"]["bytes"]["dense"]
    assert untied == 96 * 32 * 2


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_tie_is_kept_bit_for_bit(model_type: str, save_tiny: Save, slice_tiny: Save) -> None:
    dense = save_tiny(model_type=model_type, tie_word_embeddings=True)
    sliced = slice_tiny(dense)
    embedding = "model.decoder.embed_tokens" if model_type == "opt" else "model.embed_tokens"
    before, after = load_file(dense / "model.safetensors"), load_file(sliced / "model.safetensors")
    assert json.loads((sliced / "config.json").read_text())["tie_word_embeddings"] is True
    assert torch.equal(after[f"{embedding}.weight"], before[f"{embedding}.weight"])
    assert after[f"{embedding}.factor"].shape == (32, 24)
    assert "lm_head.weight" not in after
    model = load(sliced)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_shards_stay_shards(save_tiny: Save, slice_tiny: Save, tmp_path: Path) -> None:
    whole = save_tiny("whole")
    sharded = save_tiny("sharded", shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = slice_tiny(whole, "one"), slice_tiny(sharded, "many")
    assert len(list(many.glob("model-0*-of-0*.safetensors"))) > 2
    freebits.pack(many, tmp_path / "packed", codec="bits-back", threshold=0.3)
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert len(list((tmp_path / "unpacked").glob("model-0*-of-0*.safetensors"))) > 2
    text = random_text(64, seed=3)
    assert torch.equal(logits(one, text), logits(many, text))
    assert torch.equal(logits(tmp_path / "packed", text), logits(tmp_path / "unpacked", text))


def test_too_little_text_is_refused(save_tiny: Save, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="less than one window"):
        freebits.slice_model(save_tiny(), tmp_path / "out", sparsity=0.2, calibration="w1 w2", seq_len=32)
    with pytest.raises(UsageError, match="at least one window"):
        freebits.slice_model(save_tiny("again"), tmp_path / "out", sparsity=0.2, samples=0)
    assert not (tmp_path / "out").exists()


def test_a_head_that_differs_from_the_tied_embedding_is_the_head(save_tiny: Save, slice_tiny: Save) -> None:
    dense = save_tiny(tie_word_embeddings=True, dtype=torch.float64)
    state = load_file(dense / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0).clone()
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    sliced = slice_tiny(dense, sparsity=0.0)
    text = random_text(64, seed=3)
    assert (logits(sliced, text) - logits(dense, text)).abs().max() < 1e-4


def test_the_dtype_is_wide_enough_for_every_weight(save_tiny: Save, slice_tiny: Save) -> None:
    dense = save_tiny()
    state = load_file(dense / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].float()
    state["model.norm.weight"] = state["model.norm.weight"].double()  # a norm is folded, not stored
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((slice_tiny(dense) / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.1.self_attn.q_proj.weight", torch.ones(1, 32)),  # torch would broadcast it
        ("model.norm.weight", torch.ones(1)),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(32)),
        ("model.embed_tokens.weight", torch.ones(95, 32)),
        ("model.layers.1.self_attn.q_proj.weight", torch.ones(32, 32, dtype=torch.int8)),
        ("model.embed_tokens.weight", torch.ones(32)),
    ],
)
def test_a_tensor_that_the_config_contradicts_is_refused(
    name: str, tensor: Tensor, save_tiny: Save, slice_tiny: Save
) -> None:
    dense = save_tiny()
    state = load_file(dense / "model.safetensors") | {name: tensor}
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {re.escape(name)} "):
        slice_tiny(dense, dtype=torch.float16)


def test_an_index_cannot_lead_out_of_the_folder(save_tiny: Save, slice_tiny: Save) -> None:
    dense = save_tiny(shard="20KB")
    index = json.loads((dense / "model.safetensors.index.json").read_text())
    for file in ("../outside.safetensors", str(dense / "model.safetensors"), 5):
        changed = index | {"weight_map": index["weight_map"] | {"model.norm.weight": file}}
        (dense / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="no file beside it"):
            slice_tiny(dense)


def test_a_single_file_goes_before_an_index_as_in_transformers(save_tiny: Save) -> None:
    whole, sharded = save_tiny("whole", seed=1), save_tiny("sharded", shard="20KB", seed=2)
    for file in sharded.glob("model*"):
        shutil.copy(file, whole)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(Checkpoint(whole)[name], load(whole).state_dict()[name])
