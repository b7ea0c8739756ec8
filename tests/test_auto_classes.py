"""Every Auto class loads from a packed folder what it loads from the original."""

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
    """A tiny random model and a tokenizer."""
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def outputs(auto: Any, folder: Path, **options: Any) -> Any:
    model = auto.from_pretrained(folder, **options).eval()
    inputs = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return type(model), model(TOKENS, **inputs)[0]


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "an embedding model": (AutoModel, "llama", {}),
    "a classifier": (AutoModelForSequenceClassification, "llama", {"num_labels": 3, "pad_token_id": 1}),
    "a tagger": (AutoModelForTokenClassification, "qwen2", {"num_labels": 5, "num_key_value_heads": 2}),
    "a reader": (AutoModelForQuestionAnswering, "llama", {}),
    "an encoder": (AutoModelForMaskedLM, "bert", {}),
    "an encoder and a decoder": (AutoModelForSeq2SeqLM, "t5", T5),
}


@pytest.mark.parametrize("case", CASES)
def test_an_auto_class_loads_what_it_loads_from_the_original(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto, model_type, changes = CASES[case]
    folder = save(auto, tmp_path / "original", tiny_config(model_type, **changes))
    assert main(["compress", str(folder), str(tmp_path / "packed"), "--lossless"]) == 0
    assert f"load it with {auto.__name__} after" in capsys.readouterr().out
    assert f"{auto.__name__}.from_pretrained" in (tmp_path / "packed" / "README.md").read_text()
    (spec, expected), (found_kind, found) = (outputs(auto, tmp_path / name) for name in ("original", "packed"))
    assert found_kind is spec
    assert torch.equal(found, expected)
    assert auto_class(auto.from_pretrained(folder).config.to_dict()) == auto.__name__


def test_automodel_of_a_model_with_a_head_is_the_model_below_it(tmp_path: Path) -> None:
    folder = save(AutoModelForCausalLM, tmp_path / "original", tiny_config())
    freebits.pack(folder, tmp_path / "packed", codec="none")
    (spec, expected), (found_kind, found) = (outputs(AutoModel, tmp_path / name) for name in ("original", "packed"))
    assert found_kind is spec
    assert torch.equal(found, expected)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_missing_head_is_not_filled_in_at_random(auto: Any, tmp_path: Path) -> None:
    folder = save(AutoModel, tmp_path / "original", tiny_config(pad_token_id=1))
    freebits.pack(folder, tmp_path / "packed", codec="none")
    with pytest.raises(CheckpointError, match=r"holds a LlamaModel, which has no .*\.weight: load it with AutoModel$"):
        auto.from_pretrained(tmp_path / "packed")
    for path in (folder, tmp_path / "packed"):  # what has no head gets none
        assert type(freebits.load(path)).__name__ == "LlamaModel"


def test_an_auto_class_that_does_not_know_a_model_names_the_one_that_does(tmp_path: Path) -> None:
    folder = save(AutoModelForSeq2SeqLM, tmp_path / "original", tiny_config("t5", **T5))
    freebits.pack(folder, tmp_path / "packed", codec="none")
    with pytest.raises(UnsupportedModelError, match="AutoModelForSeq2SeqLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_every_auto_class_of_models_knows_packed_folders() -> None:
    assert {AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM} <= {*AUTO_CLASSES}
    assert all(PackedConfig in auto._model_mapping for auto in AUTO_CLASSES)


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModel])
def test_a_model_that_sees_is_loaded_whole(auto: Any, tmp_path: Path) -> None:
    text = {**tiny_config().to_dict(), "num_key_value_heads": 2, "layer_types": ["full_attention"] * 3}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    folder = save(AutoModelForImageTextToText, tmp_path / "original", config)
    freebits.pack(folder, tmp_path / "packed", codec="none")
    expected, found = (auto.from_pretrained(tmp_path / name) for name in ("original", "packed"))
    assert type(found) is type(expected)
    state = found.state_dict()
    assert any("visual" in name for name in state)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_pipeline_classifies(tmp_path: Path) -> None:
    config = tiny_config(num_labels=3, pad_token_id=1)
    folder = save(AutoModelForSequenceClassification, tmp_path / "original", config)
    freebits.pack(folder, tmp_path / "packed", codec="none")
    expected, found = (
        pipeline("text-classification", model=str(tmp_path / n))("w1 w2") for n in ("original", "packed")
    )
    assert found == expected


def test_trusted_code_loads_a_classifier_without_an_import(tmp_path: Path) -> None:
    config = tiny_config(num_labels=3, pad_token_id=1)
    folder = save(AutoModelForSequenceClassification, tmp_path / "original", config)
    freebits.pack(folder, tmp_path / "packed", codec="none")
    program = (
        "import sys; from transformers import AutoModelForSequenceClassification as Auto;"
        "print(type(Auto.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "LlamaForSequenceClassification", done.stderr


def test_a_tokenizer_that_only_the_model_type_names_loads_from_a_packed_folder(tmp_path: Path) -> None:
    folder = tmp_path / "original"
    AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]))
    freebits.pack(folder, tmp_path / "packed", codec="none")
    expected, found = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("original", "packed"))
    assert type(found) is type(expected)
    assert found("hello world").input_ids == expected("hello world").input_ids == [2, 5, 6, 3]
