"""Read checkpoints that other tools have quantized, with the results of the packages that define the formats."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import freebits
from freebits.dequantization.source import Dequantized
from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.storage.checkpoint import Checkpoint, write_json
from tests.quantized_inputs import MAKERS, fp8_blocks, save_quantized
from tests.tiny import Make, random_text

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
BFLOAT16 = 2.0**-7
"""Tolerance for values in bfloat16, relative to the largest magnitude."""


@pytest.fixture
def dense(save_tiny: Make) -> Path:
    return save_tiny(**SIZES)


@pytest.mark.parametrize("format_", MAKERS)
def test_matrices_are_dequantized_as_the_package_of_the_format_does(format_: str, dense: Path, tmp_path: Path) -> None:
    expected = save_quantized(dense, tmp_path / "q", format_)
    source = Dequantized(tmp_path / "q")
    plain = Checkpoint(dense)
    assert source.specs.keys() == plain.specs.keys()
    assert all(source.specs[name].shape == spec.shape for name, spec in plain.specs.items())
    for name, spec in plain.specs.items():
        actual = source[name].float()
        if name in expected:
            assert (actual - expected[name].float()).abs().max() <= BFLOAT16 * expected[name].abs().max(), name
        assert (actual - plain[name].float()).norm() <= 0.2 * plain[name].float().norm(), name
        assert tuple(actual.shape) == spec.shape


@pytest.mark.parametrize("powers", [False, True])
def test_fp8_blocks_are_dequantized_as_in_transformers(powers: bool, tmp_path: Path) -> None:
    tensors, _ = fp8_blocks(torch.randn(256, 384), powers=powers)
    save_file({f"a.{suffix}": tensor for suffix, tensor in tensors.items()}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"dtype": "float32", "quantization_config": {"quant_method": "fp8"}})
    expected = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    assert torch.equal(Dequantized(tmp_path)["a.weight"], expected)


def test_a_matrix_that_does_not_fill_its_fp8_blocks_is_dequantized(tmp_path: Path) -> None:
    W = torch.randn(200, 300)
    tensors, _ = fp8_blocks(W)
    save_file({f"a.{suffix}": tensor for suffix, tensor in tensors.items()}, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_json(tmp_path / "config.json", {"quantization_config": settings})
    assert (Dequantized(tmp_path)["a.weight"].float() - W).norm() <= 0.05 * W.norm()


def test_stacked_experts_of_gpt_oss_are_dequantized_as_in_transformers(tmp_path: Path) -> None:
    blocks = torch.randint(256, (2, 64, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (2, 64, 3), dtype=torch.uint8)
    tensors = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "mxfp4"}})
    source = Dequantized(tmp_path)
    assert torch.equal(source["experts.gate_up_proj"], convert_moe_packed_tensors(blocks, scales))
    assert not source.config


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(64, 1, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(UnsupportedModelError, match="bitsandbytes"):
        Dequantized(tmp_path)


def test_scales_that_do_not_fit_their_matrix_are_refused(tmp_path: Path) -> None:
    values = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "fp8"}})
    save_file({"a.weight": values, "a.weight_scale": torch.ones(7, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        Dequantized(tmp_path)["a.weight"]


def test_a_quantized_model_can_be_quantized_again_and_verified(dense: Path, tmp_path: Path) -> None:
    save_quantized(dense, tmp_path / "fp8", "FP8, blocks, float32 scales")
    facts = freebits.quantize(
        tmp_path / "fp8", tmp_path / "q", bits=8, calibration=random_text(600), samples=4, seq_len=32
    )
    assert facts["coverage"]["share"] > 0.9
    tokens = torch.arange(2, 34)[None]
    with torch.no_grad():
        expected, actual = (
            freebits.load(tmp_path / name, dtype=torch.float32)(input_ids=tokens).logits for name in ("fp8", "q")
        )
    assert (actual - expected).norm() <= 0.05 * expected.norm()
    assert freebits.verify(tmp_path / "q", against=tmp_path / "fp8", text=random_text(600), seq_len=32)["ok"]


def test_codec_none_restores_the_file_of_a_quantized_model(dense: Path, tmp_path: Path) -> None:
    save_quantized(dense, tmp_path / "nvfp4", "NVFP4, compressed-tensors")
    freebits.pack(tmp_path / "nvfp4", tmp_path / "packed", codec="none")
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "nvfp4" / "model.safetensors"
    ).read_bytes()
