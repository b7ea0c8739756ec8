"""Checkpoints laid out as on the hub: packed, quantized and loaded by the names that are there."""

import json
from pathlib import Path

import pytest
import torch

import freebits
from tests.model_types import random_text
from tests.published import LAYOUTS, auto_of, save_layout

NAMES = {
    # what is special
    "DeepSeek-V3": "FP8 in blocks, a layer that predicts several tokens",
    "gemma-4-26B-A4B-it": "experts beside a dense layer, in an image-text class",
    "gpt-oss-20b": "MXFP4 stacks of experts",
    "Kimi-K2.5": "INT4 inside an image-text class",
    "Llama-4-Scout-17B-16E": "a class that the library cannot run on a text alone",
    "Qwen3-0.6B": "a tied head that is in the file, too",
    "Qwen3.5-35B-A3B": "stacks of experts; multi-token prediction by single experts; a tower",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_published_layout(name: str, tmp_path: Path) -> None:
    assert not save_layout(name, tmp_path / "dense")
    freebits.pack(tmp_path / "dense", tmp_path / "packed", codec="none")
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "dense" / file).read_bytes()
    made = freebits.quantize(
        tmp_path / "dense", tmp_path / "rounded", bits=8, calibration=random_text(700), samples=4, seq_len=32
    )
    assert made["coverage"]["share"] > 0.9
    assert made["coverage"]["uncalibrated"] < made["coverage"]["share"]
    assert "quantization_config" not in json.loads((tmp_path / "rounded" / "config.json").read_text())
    before = freebits.load(tmp_path / "dense", dtype=torch.float32)
    after = auto_of(LAYOUTS[name]).from_pretrained(tmp_path / "rounded", dtype=torch.float32)
    assert type(before) is type(after)
    theirs = after.state_dict()
    for parameter, tensor in before.state_dict().items():
        if tensor.ndim > 1 and tensor.is_floating_point():
            assert (theirs[parameter] - tensor).norm() <= 0.2 * tensor.norm(), parameter


def test_custom_code_of_a_type_that_the_library_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_layout("Kimi-K2-Instruct", tmp_path / "dense")
    made = freebits.quantize(tmp_path / "dense", tmp_path / "rounded")
    assert "kimi_k2" in caplog.text
    assert made["coverage"]["share"] == pytest.approx(made["coverage"]["uncalibrated"])
