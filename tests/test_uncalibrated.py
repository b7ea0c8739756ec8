"""Models and parts of models that no text reaches: rounded by their weights alone, and said to be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import freebits
from freebits.cli.main import main
from freebits.errors import UnsupportedModelError, UsageError
from freebits.packed.reader import PackedFolder
from freebits.quantization.weights_only import matrix_shape
from freebits.storage.checkpoint import Checkpoint
from tests.model_types import random_text, save_tiny_type

TOKENS = torch.arange(3, 23)[None]
_SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[Any, Any]] = {
    "encoder and decoder": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=256,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            architectures=["T5ForConditionalGeneration"],
        ),
    ),
    "classifier": (BertForSequenceClassification, BertConfig(**_SIZES, intermediate_size=128)),
    "base model": (LlamaModel, LlamaConfig(**_SIZES, intermediate_size=128)),
}
AUTO: dict[str, Any] = {
    "encoder and decoder": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
    "base model": AutoModel,
}


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    spec, config = MODELS[request.param]
    torch.manual_seed(0)
    spec(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


def outputs(model: Any) -> torch.Tensor:
    """What a model gives for some tokens."""
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=TOKENS, **more)[0].float()
    return result


@pytest.mark.parametrize("saved", MODELS, indirect=True)
def test_a_model_that_writes_no_text_is_compressed(saved: tuple[str, Path], tmp_path: Path) -> None:
    spec, dense = saved
    made = freebits.compress(dense, tmp_path / "small")
    assert made["auto_class"] == AUTO[spec].__name__
    assert made["coverage"]["share"] > 0.95
    assert made["coverage"]["uncalibrated"] == pytest.approx(made["coverage"]["share"])
    assert 0 < made["fidelity"]["weight_error"] < 0.05
    before, after = (outputs(AUTO[spec].from_pretrained(folder)) for folder in (dense, tmp_path / "small"))
    assert (after - before).norm() < 0.2 * before.norm()
    source, packed = Checkpoint(dense), PackedFolder(tmp_path / "small")
    matrices = sum(of.numel for of in source.specs.values() if len(of.shape) > 1)
    vectors = sum(of.n_bytes for of in source.specs.values() if len(of.shape) < 2)
    assert sum(of.n_bytes for of in packed.stored.values()) < 1.1 * (6 * matrices / 8 + vectors)


@pytest.mark.parametrize("saved", ["classifier"], indirect=True)
def test_what_needs_calibration_is_refused(saved: tuple[str, Path], tmp_path: Path) -> None:
    _, dense = saved
    for options in ({"target_kl": 0.01}, {"only": "linear"}, {"method": "pyramid"}):
        with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification"):
            freebits.quantize(dense, tmp_path / "q", **options)
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification"):
        freebits.evaluate(dense)
    with pytest.raises(UsageError, match="`max_kl`"):
        freebits.compress(dense, tmp_path / "q", max_kl=0.01)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("saved", ["classifier"], indirect=True)
def test_a_size_is_met(saved: tuple[str, Path], tmp_path: Path) -> None:
    made = freebits.quantize(saved[1], tmp_path / "q", target_size=90_000)
    assert 85_000 < made["bytes"]["packed"] <= 90_000


def test_a_tower_is_rounded_by_its_weights_or_kept(tmp_path: Path) -> None:
    dense = save_tiny_type("llava", tmp_path / "dense")
    options: dict[str, Any] = {"bits": 8, "calibration": random_text(700), "samples": 4, "seq_len": 32}
    rounded = freebits.quantize(dense, tmp_path / "rounded", **options, fallback_bits=4)["coverage"]
    kept = freebits.quantize(dense, tmp_path / "kept", **options, keep=["*vision_tower.*"])["coverage"]
    assert rounded["share"] > 0.95 > kept["share"]
    assert rounded["uncalibrated"] > 0.3
    assert any("keep" in left["reason"] for left in kept["left"])
    before, of_rounded, of_kept = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict()
        for name in ("dense", "rounded", "kept")
    )
    tower = {name for name, of in before.items() if "vision_tower" in name and of.ndim > 1 and min(of.shape) >= 32}
    assert tower
    for name in tower:
        assert torch.equal(before[name], of_kept[name])
        error = (of_rounded[name].float() - before[name].float()).norm() / before[name].float().norm()
        assert 0.02 < error < 0.2, name  # 4 bits


def test_a_pattern_that_matches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_tiny_type("llama", tmp_path / "dense")
    assert main(["quantize", str(dense), str(tmp_path / "q"), "--keep", "tower.*"]) == 2
    assert "--keep tower.*" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 48), (64, 48)), ((4, 64, 48), (256, 48)), ((64, 80, 3), (64, 240)), ((64, 3, 16, 16), (64, 768))],
)
def test_tensors_as_matrices(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert matrix_shape(shape) == expected


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A diffusion pipeline as diffusers lays it out."""
    folder = tmp_path / "pipeline"
    for name, config, file in (
        ("unet", {"_class_name": "UNet2DConditionModel"}, "diffusion_pytorch_model"),
        ("text_encoder", {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}, "model"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        tensors = {"conv.weight": torch.randn(64, 64, 3, 3), "to_q.weight": torch.randn(96, 64), "bias": torch.randn(9)}
        halves = {key: of.half() for key, of in tensors.items()}
        save_file(halves, folder / name / f"{file}.safetensors", metadata={"format": "pt"})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def test_a_pipeline_comes_back_byte_for_byte(pipeline: Path, tmp_path: Path) -> None:
    freebits.compress(pipeline, tmp_path / "small", lossless=True)
    freebits.unpack(tmp_path / "small", tmp_path / "back")
    files = {file.relative_to(pipeline) for file in pipeline.rglob("*") if file.is_file()}
    assert files <= {file.relative_to(tmp_path / "back") for file in (tmp_path / "back").rglob("*")}
    for file in files:
        assert (tmp_path / "back" / file).read_bytes() == (pipeline / file).read_bytes()


def test_a_pipeline_is_rounded(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(pipeline), str(tmp_path / "plan"), "--dry-run"]) == 0
    assert main(["compress", str(pipeline), str(tmp_path / "small"), "--keep", "to_q*"]) == 0
    assert capsys.readouterr().out.count("6 bits per weight") == 4
    assert main(["compress", str(pipeline), str(tmp_path / "sized"), "--target-size", "1MB"]) == 2
    freebits.unpack(tmp_path / "small", tmp_path / "back")
    before, after = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (pipeline, tmp_path / "back")
    )
    assert torch.equal(before["to_q.weight"], after["to_q.weight"])
    error = (before["conv.weight"].float() - after["conv.weight"].float()).norm() / before["conv.weight"].float().norm()
    assert 0.005 < error < 0.05


def test_the_makers_code_is_not_run_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense = save_tiny_type("llama", tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_maker.MakerForCausalLM"}
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "modeling_maker.py").write_text("raise SystemExit")
    (dense / "generation_config.json").write_text("{broken")
    freebits.pack(dense, tmp_path / "exact", codec="none")
    for folder in (dense, tmp_path / "exact"):
        caplog.clear()
        assert type(freebits.load(folder)).__name__ == "LlamaForCausalLM"
        assert "maker's code" in caplog.text
    freebits.unpack(tmp_path / "exact", tmp_path / "back")
    assert (tmp_path / "back" / "modeling_maker.py").read_text() == "raise SystemExit"
