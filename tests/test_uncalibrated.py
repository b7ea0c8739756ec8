"""Models and parts of models that no text uses are rounded, and reported as uncalibrated."""

import json
import shutil
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
AUTO_CLASSES: dict[str, Any] = {
    "encoder and decoder": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
    "base model": AutoModel,
}


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """The name of a model in `MODELS`, and the folder where it is saved."""
    model_class, config = MODELS[request.param]
    torch.manual_seed(0)
    model_class(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


def outputs(model: Any) -> torch.Tensor:
    """Return the first output of a model for some tokens."""
    decoder_inputs = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=TOKENS, **decoder_inputs)[0].float()
    return result


@pytest.mark.parametrize("saved", MODELS, indirect=True)
def test_a_model_that_does_not_generate_text_is_compressed(saved: tuple[str, Path], tmp_path: Path) -> None:
    name, dense = saved
    facts = freebits.compress(dense, tmp_path / "small")
    assert facts["auto_class"] == AUTO_CLASSES[name].__name__
    assert facts["coverage"]["share"] > 0.95
    assert facts["coverage"]["uncalibrated"] == pytest.approx(facts["coverage"]["share"])
    assert 0 < facts["fidelity"]["weight_error"] < 0.05
    before, after = (outputs(AUTO_CLASSES[name].from_pretrained(folder)) for folder in (dense, tmp_path / "small"))
    assert (after - before).norm() < 0.2 * before.norm()
    source, packed = Checkpoint(dense), PackedFolder(tmp_path / "small")
    n_weights = sum(spec.numel for spec in source.specs.values() if len(spec.shape) > 1)
    vector_bytes = sum(spec.n_bytes for spec in source.specs.values() if len(spec.shape) < 2)
    assert sum(spec.n_bytes for spec in packed.stored.values()) < 1.1 * (6 * n_weights / 8 + vector_bytes)


@pytest.mark.parametrize("saved", ["classifier"], indirect=True)
def test_options_that_need_calibration_are_refused(saved: tuple[str, Path], tmp_path: Path) -> None:
    _, dense = saved
    for options in ({"target_kl": 0.01}, {"only": "linear"}, {"method": "pyramid"}):
        with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification"):
            freebits.quantize(dense, tmp_path / "q", **options)
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification"):
        freebits.evaluate(dense)
    with pytest.raises(UsageError, match="`max_kl`"):
        freebits.compress(dense, tmp_path / "q", max_kl=0.05)  # also if it equals the default
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("saved", ["classifier"], indirect=True)
def test_the_target_size_is_nearly_reached_and_not_exceeded(saved: tuple[str, Path], tmp_path: Path) -> None:
    facts = freebits.quantize(saved[1], tmp_path / "q", target_size=90_000)
    assert 85_000 < facts["bytes"]["packed"] <= 90_000


def test_a_vision_tower_is_rounded_without_calibration_or_kept(tmp_path: Path) -> None:
    dense = save_tiny_type("llava", tmp_path / "dense")
    options: dict[str, Any] = {"bits": 8, "calibration": random_text(700), "samples": 4, "seq_len": 32}
    rounded_coverage = freebits.quantize(dense, tmp_path / "rounded", **options, fallback_bits=4)["coverage"]
    kept_coverage = freebits.quantize(dense, tmp_path / "kept", **options, keep=["*vision_tower.*"])["coverage"]
    assert rounded_coverage["share"] > 0.95 > kept_coverage["share"]
    assert rounded_coverage["uncalibrated"] > 0.3
    assert any("keep" in entry["reason"] for entry in kept_coverage["left"])
    before, with_rounded_tower, with_kept_tower = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict()
        for name in ("dense", "rounded", "kept")
    )
    tower = {
        name
        for name, tensor in before.items()
        if "vision_tower" in name and tensor.ndim > 1 and min(tensor.shape) >= 32
    }
    assert tower
    for name in tower:
        assert torch.equal(before[name], with_kept_tower[name])
        error = (with_rounded_tower[name].float() - before[name].float()).norm() / before[name].float().norm()
        assert 0.02 < error < 0.2, name  # 4 bits


def test_a_pattern_that_matches_no_tensor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_tiny_type("llama", tmp_path / "dense")
    assert main(["quantize", str(dense), str(tmp_path / "q"), "--keep", "tower.*"]) == 2
    error = capsys.readouterr().err
    assert "--keep" in error
    assert "tower.*" in error


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 48), (64, 48)), ((4, 64, 48), (256, 48)), ((64, 80, 3), (64, 240)), ((64, 3, 16, 16), (64, 768))],
)
def test_tensors_with_more_dimensions_are_treated_as_matrices(
    shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    assert matrix_shape(shape) == expected


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A diffusion pipeline in the layout of diffusers."""
    folder = tmp_path / "pipeline"
    for name, config, file in (
        ("unet", {"_class_name": "UNet2DConditionModel"}, "diffusion_pytorch_model"),
        ("text_encoder", {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}, "model"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        tensors = {"conv.weight": torch.randn(64, 64, 3, 3), "to_q.weight": torch.randn(96, 64), "bias": torch.randn(9)}
        halves = {key: tensor.half() for key, tensor in tensors.items()}
        save_file(halves, folder / name / f"{file}.safetensors", metadata={"format": "pt"})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def test_a_pipeline_is_restored_byte_for_byte(pipeline: Path, tmp_path: Path) -> None:
    freebits.compress(pipeline, tmp_path / "small", lossless=True)
    freebits.unpack(tmp_path / "small", tmp_path / "back")
    files = {file.relative_to(pipeline) for file in pipeline.rglob("*") if file.is_file()}
    assert files <= {file.relative_to(tmp_path / "back") for file in (tmp_path / "back").rglob("*")}
    for file in files:
        assert (tmp_path / "back" / file).read_bytes() == (pipeline / file).read_bytes()


def test_the_models_of_a_pipeline_are_rounded_to_six_bits_per_weight(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_a_language_model_in_a_pipeline_needs_no_tokenizer(
    pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The text encoders of newer pipelines are language models, whose tokenizer lies in another folder."""
    shutil.rmtree(pipeline / "text_encoder")
    save_tiny_type("llama", pipeline / "text_encoder")
    for file in (pipeline / "text_encoder").glob("*token*"):
        file.unlink()
    facts = freebits.compress(pipeline, tmp_path / "small")["components"]["text_encoder"]
    assert facts["plan"]["bits"] == 6
    assert "has no tokenizer" in caplog.text
    assert facts["coverage"]["share"] > 0.9


def test_custom_code_of_a_model_is_not_run_but_kept_and_mentioned_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
        assert str(folder) in caplog.text
    freebits.unpack(tmp_path / "exact", tmp_path / "back")
    assert (tmp_path / "back" / "modeling_maker.py").read_text() == "raise SystemExit"
