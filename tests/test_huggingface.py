"""Sliced and packed models work with transformers: Auto classes, generation, saving and trusted code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaForCausalLM,
    pipeline,
)

import freebits
from freebits.errors import CheckpointError
from freebits.integrations.loading import load
from freebits.storage.safetensors_files import WeightsFile
from tests.tiny import VARIANTS, Make


@pytest.fixture(params=["sliced", "bits-back", "canonical", "canonical tied", "none"])
def folder(request: pytest.FixtureRequest, save_tiny: Make, slice_tiny: Make, pack_tiny: Make, tmp_path: Path) -> Path:
    """A folder with a sliced model, either plain or packed with one of the codecs."""
    form, _, tied = str(request.param).partition(" ")
    dense = save_tiny(hidden_size=64, intermediate_size=160, num_key_value_heads=2, tie_word_embeddings=bool(tied))
    sliced = slice_tiny(dense)
    if form != "sliced":
        pack_tiny(sliced, form, codec=form)
    return tmp_path / form


def from_pretrained(path: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


TOKENS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))


def test_auto_classes_load_sliced_and_packed_models(folder: Path) -> None:
    model = from_pretrained(folder)
    assert type(model).__name__ == "SlicedLlamaForCausalLM"
    assert model.config.site_sizes == [48] * 6 + [64]
    assert model.dtype == torch.float16
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert type(model.model.layers[0]).__name__ == "ResidualLlamaDecoderLayer" in model._no_split_modules
    assert model.model.layers[0].self_attn.q_proj.in_features == 48


@torch.no_grad()
def test_a_saved_model_gives_the_same_logits_when_loaded_again(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert [file.name for file in (tmp_path / "again").glob("*.*s")] == ["model.safetensors"]
    assert (tmp_path / "again" / "modeling_freebits.py").exists()
    assert AutoConfig.from_pretrained(tmp_path / "again").model_type == "sliced_llama"
    again = from_pretrained(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    trusted = from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(trusted(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_generation_is_the_same_with_and_without_cache(folder: Path) -> None:
    model = from_pretrained(folder, dtype=torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(TOKENS, use_cache=True, **options)
    assert cached.shape == (2, 24)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))


@torch.no_grad()
def test_padding_on_the_left_does_not_change_the_logits(folder: Path) -> None:
    model = from_pretrained(folder, dtype=torch.float32)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), TOKENS], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(TOKENS)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(TOKENS).logits
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    assert (logits - expected).abs().max() < 1e-4


def test_every_parameter_gets_a_gradient(folder: Path) -> None:
    model = from_pretrained(folder, dtype=torch.float32).train()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    assert gradients.keys() & {f"model.layers.0.attention_shortcut.{name}" for name in ("weight", "factor")}


@torch.no_grad()
def test_hidden_states_and_attentions_are_returned(folder: Path) -> None:
    output = from_pretrained(folder, attn_implementation="eager")(
        TOKENS, output_hidden_states=True, output_attentions=True
    )
    assert [state.shape[-1] for state in output.hidden_states] == [48, 48, 48, 64]
    assert len(output.attentions) == 3


def test_a_pipeline_generates_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = pipeline("text-generation", model=from_pretrained(folder), tokenizer=tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert generator("w1 w2", **options)[0]["generated_text"].startswith("w1 w2")


def test_a_model_created_from_a_config_runs(folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert model(TOKENS).logits.shape == (2, 12, 96)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_and_unpacked_models_generate_the_same_tokens(
    variant: str, save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(**VARIANTS[variant]))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for codec, threshold in (("bits-back", 0.3), ("canonical", None)):
        packed, unpacked = tmp_path / codec, tmp_path / f"{codec} unpacked"
        freebits.pack(sliced, packed, codec=codec, threshold=threshold)
        freebits.unpack(packed, unpacked)
        outputs = [freebits.load(path, dtype=torch.float64).generate(TOKENS, **options) for path in (packed, unpacked)]
        assert torch.equal(*outputs)


WAYS = {
    "trusted code": ("", "trust_remote_code=True"),
    "freebits imported": ("import freebits", ""),
    "freebits imported after the Auto classes": ("import transformers.models.auto.modeling_auto, freebits", ""),
    "freebits imported, then AutoConfig": ("import freebits, transformers; transformers.AutoConfig", ""),
    "freebits imported, then a model class": ("import freebits, transformers; transformers.LlamaForCausalLM", ""),
    "neither": ("", ""),
}
"""Way to load → the first statements of a program, and the option of `from_pretrained`."""
PROGRAM = """
import sys
{statement}
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, {option})
    except ValueError as error:
        print("trust_remote_code=True" in str(error))
    else:
        model.save_pretrained(folder + " saved")
        print(type(model).__module__, type(model).__name__)
"""


@pytest.mark.parametrize("way", WAYS)
def test_transformers_loads_a_folder_if_freebits_is_imported_or_its_code_is_trusted(
    way: str, save_tiny: Make, slice_tiny: Make, pack_tiny: Make
) -> None:
    sliced = slice_tiny(save_tiny())
    exact = pack_tiny(save_tiny("original"), "exact", codec="none", entropy="none")
    folders = [sliced, pack_tiny(sliced, "canonical"), pack_tiny(sliced, "bits-back", codec="bits-back"), exact]
    statement, option = WAYS[way]
    program = PROGRAM.format(statement=statement, option=option)
    command = [sys.executable, "-W", "error", "-c", program, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if way == "neither":
        assert result.stdout.count("True\n") == 4, result.stdout
        return
    sliced_class = "freebits.models.sliced SlicedLlamaForCausalLM"
    dense_class = "transformers.models.llama.modeling_llama LlamaForCausalLM"
    assert result.stdout.splitlines() == [sliced_class] * 3 + [dense_class], result.stderr
    for folder in folders:
        saved = folder.with_name(f"{folder.name} saved")
        n_lines = {file.name: file.read_text().count("\n") for file in saved.glob("*.py")}
        classes = json.loads((saved / "config.json").read_text()).get("auto_map", {}).values()
        assert n_lines == ({} if folder == exact else {"modeling_freebits.py": 3})
        assert {name.partition(".")[0] for name in classes} == {name.removesuffix(".py") for name in n_lines}


def test_a_class_of_transformers_refuses_a_packed_folder_without_plain_weights(save_tiny: Make, tmp_path: Path) -> None:
    freebits.pack(save_tiny(), tmp_path / "packed", codec="none", entropy="none")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("folder", ["canonical tied"], indirect=True)
def test_a_model_can_be_pickled(folder: Path, tmp_path: Path) -> None:
    # Regression: torch.save(model) failed, because the derived layer class is no attribute of its module.
    model = from_pretrained(folder)
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
        "print(type(model.model.layers[0]).__name__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "ResidualLlamaDecoderLayer", result.stderr


def test_a_sliced_model_that_lacks_a_tensor_is_refused(save_tiny: Make, slice_tiny: Make) -> None:
    sliced = slice_tiny(save_tiny())
    state = load_file(sliced / "model.safetensors")
    del state["model.layers.1.mlp_shortcut.weight"]
    save_file(state, sliced / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp_shortcut\.weight"):
        freebits.load(sliced)


def test_a_model_that_transformers_cannot_load_gives_a_one_line_error(save_tiny: Make) -> None:
    folder = save_tiny()
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}')
    with pytest.raises(CheckpointError, match=re.escape(str(folder))) as caught:
        freebits.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["bits-back", "canonical", "none"], indirect=True)
def test_a_packed_folder_without_its_manifest_is_refused(folder: Path) -> None:
    (folder / "freebits.json").unlink()
    with pytest.raises(CheckpointError, match=r"freebits\.json"):
        from_pretrained(folder)


@torch.no_grad()
def test_all_ways_to_load_give_the_same_model(folder: Path, tmp_path: Path) -> None:
    expected = from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    (tmp_path / "hub").mkdir()
    shutil.copytree(folder, tmp_path / "hub" / "inside")
    ways: list[dict[str, Any]] = [
        {"pretrained_model_name_or_path": folder},
        {"pretrained_model_name_or_path": str(folder), "config": AutoConfig.from_pretrained(folder)},
        {"pretrained_model_name_or_path": tmp_path / "hub", "subfolder": "inside"},
        {"pretrained_model_name_or_path": folder, "use_cache": False},
        {"pretrained_model_name_or_path": folder, "device_map": "cpu"},
    ]
    model_class = type(from_pretrained(folder))
    for way in ways:
        for loader in (AutoModelForCausalLM, model_class) if folder.name == "sliced" else (AutoModelForCausalLM,):
            model: Any = loader.from_pretrained(**way, dtype=torch.float32)
            assert type(model).__name__ == "SlicedLlamaForCausalLM"
            assert torch.equal(model.eval()(TOKENS).logits, expected), way
            assert model.name_or_path == str(way["pretrained_model_name_or_path"])
    counts = []
    thread = Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert counts == [torch.get_num_threads()]


def test_a_file_that_is_truncated_while_it_is_read_is_refused(save_tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, read = save_tiny(), WeightsFile.read

    def truncate_and_read(file: WeightsFile, name: str) -> Any:
        os.truncate(file.path, 5000)
        return read(file, name)

    monkeypatch.setattr(WeightsFile, "read", truncate_and_read)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(dense)


def test_a_model_with_a_nested_config_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    model = load(tmp_path / "model")
    assert type(model) is type(expected)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
