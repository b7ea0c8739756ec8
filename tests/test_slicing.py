"""Slicing keeps the principal axes of the residual stream and removes the other directions."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import freebits
from freebits.api import slice as slice_checkpoint
from freebits.api.shared_steps import N_HELD_OUT as HELD_OUT
from freebits.calibration.sliced_runner import FoldedRunner
from freebits.calibration.tokens import split_windows, token_windows
from freebits.errors import CheckpointError, UsageError
from freebits.integrations.loading import load
from freebits.integrations.naming import TransformersView
from freebits.models.architecture import Architecture
from freebits.models.families import MODEL_TYPES
from freebits.storage.checkpoint import Checkpoint
from freebits.transforms.orthogonal import random_orthogonal
from freebits.transforms.slicing import covariance, perplexity, principal_axes, sliced_size
from tests.tiny import VARIANTS, Make, change_config, random_text


@pytest.mark.parametrize(
    ("hidden", "sparsity", "expected"),
    [(576, 0.2, 456), (320, 0.8, 64), (2048, 0.25, 1536), (4096, 0.3, 2864), (100, 0, 100)],
)
def test_sliced_size_is_rounded_down_to_a_multiple_of_eight(hidden: int, sparsity: float, expected: int) -> None:
    assert sliced_size(hidden, sparsity) == expected


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 0.99, float("nan")])
def test_an_invalid_sparsity_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match="`sparsity`"):
        sliced_size(64, sparsity)


def test_principal_axes_are_the_strongest_directions_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    Q = random_orthogonal(12, generator)
    x = torch.randn(9000, 12, generator=generator, dtype=torch.float64) * torch.linspace(6, 1, 12) @ Q.T
    axes = principal_axes(covariance(x.float()), 4)
    assert axes.dtype == torch.float64
    assert ((axes * Q[:, :4]).sum(0).abs() > 0.98).all()


def logits(path: Path, text: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = load(path, dtype=torch.float64)(token_windows(path, text, 32)).logits
    return result


def confine_residual_stream(folder: Path, size: int) -> None:
    """Project all outputs to the residual stream onto one subspace of `size` dimensions."""
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
def test_slicing_away_unused_dimensions_does_not_change_the_logits(
    variant: str, options: dict[str, bool], save_tiny: Make, slice_tiny: Make
) -> None:
    dense = save_tiny(dtype=torch.float64, **VARIANTS[variant])
    confine_residual_stream(dense, size=24)
    sliced = slice_tiny(dense, sparsity=0.25, **options)
    expected = logits(dense, random_text(64, seed=3))
    difference = (logits(sliced, random_text(64, seed=3)) - expected).abs().max()
    assert difference < 1e-3 * expected.std()  # because calibration and the dense norms run in float32


def test_sparsity_zero_does_not_change_the_logits(save_tiny: Make, slice_tiny: Make) -> None:
    dense = save_tiny(dtype=torch.float64)
    sliced = slice_tiny(dense, sparsity=0.0)
    expected = logits(dense, random_text(64, seed=3))
    assert (logits(sliced, random_text(64, seed=3)) - expected).abs().max() < 1e-4  # the dense norms run in float32


def test_the_same_seed_gives_the_same_bytes_and_another_seed_different_ones(save_tiny: Make, slice_tiny: Make) -> None:
    dense = save_tiny()
    options: dict[str, Any] = {"random_orientation": True, "samples": 4}
    files = [
        (slice_tiny(dense, name, seed=seed, **options) / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert files[0] == files[1] != files[2]


def test_a_sliced_checkpoint_has_the_expected_config_and_shapes(save_tiny: Make, slice_tiny: Make) -> None:
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
    [step] = config["freebits"]["history"]
    assert (step["transform"], step["fidelity"], step["sparsity"]) == ("slice", "lossy", 0.25)
    assert step["bytes"]["dense_untied"] - step["bytes"]["dense"] == 96 * 32 * 2


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_tied_embedding_stays_tied_and_unchanged(model_type: str, save_tiny: Make, slice_tiny: Make) -> None:
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


def test_a_sharded_checkpoint_stays_sharded(save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny("dense")
    dense_shards = save_tiny("dense shards", shard="20KB")
    assert len(list(dense_shards.glob("*.safetensors"))) > 2
    sliced, sliced_shards = slice_tiny(dense, "sliced"), slice_tiny(dense_shards, "sliced shards")
    assert len(list(sliced_shards.glob("model-0*-of-0*.safetensors"))) > 2
    freebits.pack(sliced_shards, tmp_path / "packed", codec="bits-back", threshold=0.3)
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert len(list((tmp_path / "unpacked").glob("model-0*-of-0*.safetensors"))) > 2
    text = random_text(64, seed=3)
    assert torch.equal(logits(sliced, text), logits(sliced_shards, text))
    assert torch.equal(logits(tmp_path / "packed", text), logits(tmp_path / "unpacked", text))


def test_too_little_text_is_refused(save_tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\d+ tokens.* 32"):
        freebits.slice_model(save_tiny(), tmp_path / "out", sparsity=0.2, calibration="w1 w2", seq_len=32)
    with pytest.raises(UsageError, match="`samples` is 0"):
        freebits.slice_model(save_tiny("other"), tmp_path / "out", sparsity=0.2, samples=0, seq_len=32)
    assert not (tmp_path / "out").exists()


def test_a_stored_head_is_used_even_if_the_config_ties_it(save_tiny: Make, slice_tiny: Make) -> None:
    dense = save_tiny(tie_word_embeddings=True, dtype=torch.float64)
    state = load_file(dense / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0).clone()
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    sliced = slice_tiny(dense, sparsity=0.0)
    text = random_text(64, seed=3)
    assert (logits(sliced, text) - logits(dense, text)).abs().max() < 1e-4


def test_every_tensor_keeps_its_own_dtype(save_tiny: Make, slice_tiny: Make) -> None:
    # Regression: because of one float32 norm, `slice` wrote all tensors in float32, which doubles the size.
    dense = save_tiny(tie_word_embeddings=True)
    state = load_file(dense / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].float()
    state["model.layers.0.input_layernorm.weight"] = state["model.layers.0.input_layernorm.weight"].float()
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    sliced = slice_tiny(dense)
    assert json.loads((sliced / "config.json").read_text())["dtype"] == "float16"
    wide = {name for name, tensor in load_file(sliced / "model.safetensors").items() if tensor.dtype == torch.float32}
    assert wide == {"model.layers.1.mlp.up_proj.weight"}
    converted = slice_tiny(dense, "converted", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(converted / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_an_unsupported_dtype_of_the_sliced_weights_is_refused(
    dtype: torch.dtype, save_tiny: Make, slice_tiny: Make
) -> None:
    with pytest.raises(UsageError, match=f"`dtype` is {dtype}"):
        slice_tiny(save_tiny(), dtype=dtype)


def test_slicing_reports_the_perplexities_on_held_out_windows(
    save_tiny: Make, caplog: pytest.LogCaptureFixture
) -> None:
    dense = save_tiny()
    facts = freebits.slice_model(
        dense, dense.with_name("out"), sparsity=0.25, calibration=random_text(600), samples=8, seq_len=32
    )
    held_out = split_windows(token_windows(dense, random_text(600), 32), 8, HELD_OUT, 0)[1]
    for name, folder in (("dense", dense), ("sliced", dense.with_name("out"))):
        with torch.no_grad():
            model = load(folder, dtype=torch.float32)
            losses = [model(window[None], labels=window[None]).loss.item() for window in held_out]
        assert facts["perplexity"][name] == pytest.approx(perplexity(losses), rel=2e-3)
    assert freebits.inspect(dense.with_name("out"))["history"][0]["perplexity"] == facts["perplexity"]
    assert not caplog.records


def test_a_slice_that_raises_perplexity_too_much_is_refused_unless_forced(
    save_tiny: Make, slice_tiny: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny()
    monkeypatch.setattr(slice_checkpoint, "WARN", 0.01)
    slice_tiny(dense, "warned", seed=11)
    assert "sparsity of 0.25" in caplog.text
    monkeypatch.setattr(slice_checkpoint, "REFUSE", 0.01)
    with pytest.raises(UsageError, match="`force`"):
        slice_tiny(dense, "refused", seed=12)
    assert not dense.with_name("refused").exists()
    slice_tiny(dense, "forced", seed=12, force=True)


@pytest.mark.parametrize(("n", "samples", "calibrated", "held_out"), [(18, 8, 8, 4), (10, 64, 9, 1), (1, 64, 1, 0)])
def test_held_out_windows_are_not_used_for_calibration(n: int, samples: int, calibrated: int, held_out: int) -> None:
    windows = torch.arange(2 * n).reshape(n, 2)
    parts = split_windows(windows, samples, HELD_OUT, seed=0)
    assert [len(part) for part in parts] == [calibrated, held_out]
    assert len({*parts[0][:, 0].tolist(), *parts[1][:, 0].tolist()}) == calibrated + held_out


def test_windows_with_more_tokens_than_the_model_has_positions_are_refused(save_tiny: Make, slice_tiny: Make) -> None:
    with pytest.raises(UsageError, match=r"65.*64"):
        slice_tiny(save_tiny(model_type="opt"), seq_len=65)


def test_every_block_runs_with_its_own_attention_mask(save_tiny: Make) -> None:
    # Regression: every block ran with the mask of layer 0, which is wrong if layers differ.
    dense = save_tiny(dtype=torch.float32)
    change_config(
        dense,
        model_type="qwen2",
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=4,
        use_sliding_window=True,
        max_window_layers=0,
        architectures=["Qwen2ForCausalLM"],
    )
    architecture = Architecture(MODEL_TYPES["qwen2"], 32, 3, tied=False)
    tensors = dict(Checkpoint(dense).items())
    attention = [read for sub in architecture.sublayers if sub.group == "attention" for read in sub.reads]
    tensors |= {read.bias: torch.zeros(len(tensors[read.weight])) for read in attention}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(dense), dtype=torch.float32)
    model.load_state_dict(tensors)
    tokens = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(tokens, output_hidden_states=True).hidden_states
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(dense)
    runner = FoldedRunner(TransformersView(Checkpoint(dense), config), config, architecture, torch.device("cpu"))
    inputs: dict[int, Tensor] = {}

    def at_site(site: int, x: Tensor) -> Tensor:
        inputs[site] = x.clone()
        return x

    with torch.no_grad():
        losses = runner.losses(tokens, at_site, 1)
    assert sorted(inputs) == list(range(7))
    for block in range(3):  # not the last site, which transformers returns only after the final norm
        assert (inputs[2 * block] - expected[block]).abs().max() < 1e-4
    logits = model(tokens[1:]).logits[0, :-1]
    assert math.isclose(losses[0], torch.nn.functional.cross_entropy(logits, tokens[1, 1:]).item(), rel_tol=1e-4)


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
def test_a_tensor_that_contradicts_the_config_is_refused(
    name: str, tensor: Tensor, save_tiny: Make, slice_tiny: Make
) -> None:
    dense = save_tiny()
    state = load_file(dense / "model.safetensors") | {name: tensor}
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {re.escape(name)} "):
        slice_tiny(dense, dtype=torch.float16)
