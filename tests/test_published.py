"""Pack, quantize and load checkpoints whose tensors are named and stored as on the hub."""

import json
from pathlib import Path

import pytest
import torch

import freebits
from tests.model_types import random_text
from tests.published import LAYOUTS, auto_of, save_layout

NAMES = {
    "DeepSeek-V3": "FP8 in blocks, a layer for multi-token prediction",
    "gemma-4-26B-A4B-it": "experts parallel to a dense layer, an image-text class",
    "gpt-oss-20b": "stacked experts in MXFP4",
    "Kimi-K2.5": "INT4 in an image-text class",
    "Llama-4-Scout-17B-16E": "a class that transformers cannot run on text without images",
    "Qwen3-0.6B": "a tied head that the file also contains",
    "Qwen3.5-35B-A3B": "stacked experts, multi-token prediction with separate experts, a vision tower",
}
"""Published model → what is special about its checkpoint."""


@pytest.mark.parametrize("name", NAMES)
def test_a_published_layout_is_restored_exactly_and_quantized_nearly_completely(name: str, tmp_path: Path) -> None:
    assert not save_layout(name, tmp_path / "dense")
    freebits.pack(tmp_path / "dense", tmp_path / "packed", codec="none")
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "dense" / file).read_bytes()
    facts = freebits.quantize(
        tmp_path / "dense", tmp_path / "rounded", bits=8, calibration=random_text(700), samples=4, seq_len=32
    )
    assert facts["coverage"]["share"] > 0.9
    assert facts["coverage"]["uncalibrated"] < facts["coverage"]["share"]
    assert "quantization_config" not in json.loads((tmp_path / "rounded" / "config.json").read_text())
    before = freebits.load(tmp_path / "dense", dtype=torch.float32)
    after = auto_of(LAYOUTS[name]).from_pretrained(tmp_path / "rounded", dtype=torch.float32)
    assert type(before) is type(after)
    quantized = after.state_dict()
    for parameter, tensor in before.state_dict().items():
        if tensor.ndim > 1 and tensor.is_floating_point():
            assert (quantized[parameter] - tensor).norm() <= 0.2 * tensor.norm(), parameter


def test_a_model_type_that_transformers_lacks_is_quantized_without_calibration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_layout("Kimi-K2-Instruct", tmp_path / "dense")
    facts = freebits.quantize(tmp_path / "dense", tmp_path / "rounded")
    assert "kimi_k2" in caplog.text
    assert facts["coverage"]["share"] == pytest.approx(facts["coverage"]["uncalibrated"])
