"""Every Auto class loads the same model from a packed folder as from the original folder."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    pipeline,
)

import freebits
from freebits.cli.main import main
from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.integrations.packed_models import AUTO_CLASSES, PackedConfig, auto_class
from tests.tiny import tiny_config, tiny_tokenizer

TOKENS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))


def save(auto: Any, folder: Path, config: PreTrainedConfig) -> Path:
    """Save a tiny random model and a tokenizer, and return the folder."""
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def class_and_output(auto: Any, folder: Path, **options: Any) -> Any:
    model = auto.from_pretrained(folder, **options).eval()
    inputs = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return type(model), model(TOKENS, **inputs)[0]


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "an embedding model": (AutoModel, "llama", {}),
    "a classifier": (AutoModelForSequenceClassification, "llama", {"num_labels": 3, "pad_token_id": 1}),
    "a token classifier": (AutoModelForTokenClassification, "qwen2", {"num_labels": 5, "num_key_value_heads": 2}),
    "a question answerer": (AutoModelForQuestionAnswering, "llama", {}),
    "an encoder": (AutoModelForMaskedLM, "bert", {}),
    "an encoder and a decoder": (AutoModelForSeq2SeqLM, "t5", T5),
}


@pytest.mark.parametrize("case", CASES)
def test_an_auto_class_loads_the_same_model_from_a_packed_folder(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto, model_type, changes = CASES[case]
    folder = save(auto, tmp_path / "original", tiny_config(model_type, **changes))
    assert main(["compress", str(folder), str(tmp_path / "packed"), "--lossless"]) == 0
    assert f"{auto.__name__} " in capsys.readouterr().out
    assert f"{auto.__name__}.from_pretrained" in (tmp_path / "packed" / "README.md").read_text()
    (expected_class, expected), (actual_class, actual) = (
        class_and_output(auto, tmp_path / name) for name in ("original", "packed")
    )
    assert actual_class is expected_class
    assert torch.equal(actual, expected)
    assert auto_class(auto.from_pretrained(folder).config.to_dict()) == auto.__name__


def test_automodel_loads_a_model_without_its_head(tmp_path: Path) -> None:
    folder = save(AutoModelForCausalLM, tmp_path / "original", tiny_config())
    freebits.pack(folder, tmp_path / "packed", codec="none")
    (expected_class, expected), (actual_class, actual) = (
        class_and_output(AutoModel, tmp_path / name) for name in ("original", "packed")
    )
    assert actual_class is expected_class
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_missing_head_is_not_initialized_at_random(auto: Any, tmp_path: Path) -> None:
    folder = save(AutoModel, tmp_path / "original", tiny_config(pad_token_id=1))
    freebits.pack(folder, tmp_path / "packed", codec="none")
    with pytest.raises(CheckpointError, match=r"LlamaModel.*\.weight.*AutoModel$"):
        auto.from_pretrained(tmp_path / "packed")
    for path in (folder, tmp_path / "packed"):  # `load` adds no head
        assert type(freebits.load(path)).__name__ == "LlamaModel"


def test_an_unsuitable_auto_class_names_the_suitable_one(tmp_path: Path) -> None:
    folder = save(AutoModelForSeq2SeqLM, tmp_path / "original", tiny_config("t5", **T5))
    freebits.pack(folder, tmp_path / "packed", codec="none")
    with pytest.raises(UnsupportedModelError, match="AutoModelForSeq2SeqLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_every_auto_class_of_models_accepts_packed_folders() -> None:
    assert {AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM} <= {*AUTO_CLASSES}
    assert all(PackedConfig in auto._model_mapping for auto in AUTO_CLASSES)


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModel])
def test_a_vision_language_model_is_loaded_completely(auto: Any, tmp_path: Path) -> None:
    text = {**tiny_config().to_dict(), "num_key_value_heads": 2, "layer_types": ["full_attention"] * 3}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    folder = save(AutoModelForImageTextToText, tmp_path / "original", config)
    freebits.pack(folder, tmp_path / "packed", codec="none")
    expected, actual = (auto.from_pretrained(tmp_path / name) for name in ("original", "packed"))
    assert type(actual) is type(expected)
    state = actual.state_dict()
    assert any("visual" in name for name in state)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_pipeline_classifies_the_same_with_a_packed_model(tmp_path: Path) -> None:
    config = tiny_config(num_labels=3, pad_token_id=1)
    folder = save(AutoModelForSequenceClassification, tmp_path / "original", config)
    freebits.pack(folder, tmp_path / "packed", codec="none")
    expected, actual = (
        pipeline("text-classification", model=str(tmp_path / name))("w1 w2") for name in ("original", "packed")
    )
    assert actual == expected


def test_trust_remote_code_loads_a_classifier_without_importing_freebits(tmp_path: Path) -> None:
    config = tiny_config(num_labels=3, pad_token_id=1)
    folder = save(AutoModelForSequenceClassification, tmp_path / "original", config)
    freebits.pack(folder, tmp_path / "packed", codec="none")
    program = (
        "import sys; from transformers import AutoModelForSequenceClassification as Auto;"
        "print(type(Auto.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "packed")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.stdout.strip() == "LlamaForSequenceClassification", process.stderr


def test_a_tokenizer_without_tokenizer_config_loads_from_a_packed_folder(tmp_path: Path) -> None:
    folder = tmp_path / "original"
    AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]))
    freebits.pack(folder, tmp_path / "packed", codec="none")
    expected, actual = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("original", "packed"))
    assert type(actual) is type(expected)
    assert actual("hello world").input_ids == expected("hello world").input_ids == [2, 5, 6, 3]
