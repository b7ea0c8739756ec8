"""Packing PEFT adapters without the redundancy of their two matrices, and unpacking them."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig

import freebits
from freebits import CheckpointError
from freebits.cli.main import main
from freebits.models.free_bases import unproven_settings
from freebits.packed.manifest import digest_of_file
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from tests.conftest import content
from tests.tiny import Make, change_config, change_tensors, redigest, tiny_model

RANK = 4
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of rank 4 on all linear layers, with random weights in place of trained ones."""
    model: Any = get_peft_model(
        tiny_model(dtype=torch.float32), LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the base model is not on the hub
        model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), adapter).double().eval()
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(40)[None]).logits
    return result


def test_an_unpacked_adapter_computes_the_same_function(
    adapter: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    facts = freebits.pack(adapter, tmp_path / "packed", entropy="none")
    assert freebits.inspect(adapter)["kind"] == "adapter"
    n_layers = 21
    n_saved = sum(spec.numel for spec in Checkpoint(adapter).specs.values()) - sum(
        spec.numel for name, spec in PackedFolder(tmp_path / "packed").stored.items() if not name.endswith(".pivots")
    )
    assert n_saved == n_layers * RANK**2
    assert facts["bytes"]["dense"] == freebits.inspect(adapter)["bytes"]["dense"]
    assert freebits.verify(tmp_path / "packed", against=adapter)["ok"]
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    assert {file.name for file in (tmp_path / "back").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    expected = logits(adapter)
    base = tiny_model()(torch.arange(40)[None]).logits
    difference = (logits(tmp_path / "back") - expected).norm() / expected.norm()
    report(f"an adapter packed in float32: logits differ by {difference:.1e}")
    assert difference < 1e-6 < (expected - base).abs().max()


def test_codec_none_restores_an_adapter_bit_for_bit(adapter: Path, tmp_path: Path) -> None:
    freebits.pack(adapter, tmp_path / "packed", codec="none")
    assert freebits.verify(tmp_path / "packed", against=adapter)["fidelity"] == "bit-exact"
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes()


def test_verify_detects_a_different_adapter(adapter: Path, tmp_path: Path) -> None:
    freebits.pack(adapter, tmp_path / "packed")
    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    change_tensors(adapter, base_model__model__model__layers__1__mlp__up_proj__lora_A__weight=lambda A: A * 1.001)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    result = freebits.verify(tmp_path / "packed", against=adapter)
    assert (result["ok"], result["failed"]) == (False, ["product"])


def test_an_adapter_is_not_accepted_as_a_model(
    adapter: Path, tmp_path: Path, save_tiny: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(adapter)
    with pytest.raises(CheckpointError, match="PEFT"):
        freebits.load(adapter)
    freebits.pack(adapter, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"unpack.*PEFT"):
        freebits.load(tmp_path / "packed")
    for command in (
        ["slice", str(adapter), "out", "--sparsity", "0.2"],
        ["quantize", str(adapter), "out"],
        ["compress", str(adapter), "out"],
        ["rotate", str(adapter), "out"],
        ["lowrank", str(adapter), "out"],
        ["eval", str(adapter)],
        ["pack", str(adapter), "out", "--codec", "bits-back"],
    ):
        assert main(command) == 2, command
        assert capsys.readouterr().err.count("\n") == 1, command
    assert content(adapter) == before
    assert "AutoModel" not in (tmp_path / "packed" / "README.md").read_text()
    (adapter / "adapter_model.safetensors").unlink()
    assert main(["pack", str(adapter), str(tmp_path / "out")]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
    dense = save_tiny()
    (dense / "adapter_config.json").write_text("{}")
    assert main(["pack", str(dense), str(tmp_path / "out")]) == 2
    assert "adapter_config.json" in capsys.readouterr().err


def save_adapter(peft_config: Any, folder: Path, **model_options: Any) -> Path:
    """Save an adapter with random values in every trainable parameter, and return its folder."""
    adapted: Any = get_peft_model(tiny_model(dtype=torch.float32, **model_options), peft_config)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return folder


LORA_OPTIONS: dict[str, Any] = {"r": RANK, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
MIXTURE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BLOCK_DIAGONAL = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
UNPROVEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "target_parameters": (LoraConfig(**LORA_OPTIONS, target_parameters=["mlp.experts.down_proj"]), MIXTURE),
    "peft_type ADALORA": (AdaLoraConfig(init_r=RANK, total_step=9, target_modules=["q_proj"]), {}),
    "peft_type LOHA": (LoHaConfig(r=RANK, target_modules=["q_proj"]), {}),
    "kasa_config": (LoraConfig(**LORA_OPTIONS, kasa_config=KasaConfig()), {}),
    "use_bdlora": (LoraConfig(**LORA_OPTIONS, use_bdlora=BLOCK_DIAGONAL), {}),
    "alora_invocation_tokens": (LoraConfig(**LORA_OPTIONS, alora_invocation_tokens=[1]), {}),
    "layer_replication": (LoraConfig(**LORA_OPTIONS, layer_replication=[(0, 2), (1, 3)]), {}),
    "init_lora_weights mica": (LoraConfig(**LORA_OPTIONS, init_lora_weights="mica"), {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", UNPROVEN)
def test_an_adapter_with_an_unproven_setting_is_packed_bit_for_bit(
    setting: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft_config, model_options = UNPROVEN[setting]
    adapter = save_adapter(peft_config, tmp_path / "adapter", **model_options)
    assert freebits.pack(adapter, tmp_path / "packed")["codec"] == "none"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert setting in caplog.text
    assert freebits.verify(tmp_path / "packed", against=adapter)["fidelity"] == "bit-exact"
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes()


PROVEN: dict[str, Any] = {
    "DoRA": LoraConfig(**LORA_OPTIONS, use_dora=True),
    "biases": LoraConfig(**LORA_OPTIONS, lora_bias=True, bias="lora_only"),
    "ranks": LoraConfig(**LORA_OPTIONS, rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 3}, use_rslora=True),
    "embeddings": LoraConfig(r=RANK, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]),
    "tokens": LoraConfig(**LORA_OPTIONS, trainable_token_indices=[3, 5]),
    "PiSSA": LoraConfig(**LORA_OPTIONS, init_lora_weights="pissa"),
    "OLoRA": LoraConfig(**LORA_OPTIONS, init_lora_weights="olora", layers_to_transform=[0, 2]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROVEN)
def test_an_adapter_with_a_proven_setting_is_packed_canonically(name: str, tmp_path: Path) -> None:
    adapter = save_adapter(PROVEN[name], tmp_path / "adapter")
    assert freebits.pack(adapter, tmp_path / "packed")["codec"] == "canonical"
    assert freebits.verify(tmp_path / "packed", against=adapter)["ok"]
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    expected, base = logits(adapter), tiny_model()(torch.arange(40)[None]).logits
    assert (logits(tmp_path / "back") - expected).norm() < 1e-4 * (expected - base).norm()


def test_a_setting_of_a_later_peft_version_is_unproven_if_it_is_set() -> None:
    assert unproven_settings({"peft_type": "LORA", "r": 8, "use_new_idea": None}) == []
    assert unproven_settings({"peft_type": "LORA", "r": 8, "use_new_idea": {"a": 1}}) == ["use_new_idea"]


def test_the_default_settings_of_this_peft_version_are_proven() -> None:
    defaults: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    assert unproven_settings(defaults | {"peft_type": "LORA"}) == []


@pytest.mark.parametrize("codec", ["canonical", "none"])
def test_verify_compares_the_settings_of_an_adapter(codec: str, adapter: Path, tmp_path: Path) -> None:
    freebits.pack(adapter, tmp_path / "packed", codec=codec)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    assert not freebits.verify(tmp_path / "packed", against=adapter)["ok"]


def test_verify_rejects_the_canonical_form_of_an_unproven_adapter(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    freebits.pack(adapter, tmp_path / "packed")  # earlier versions packed unproven adapters like this
    unproven = config | {"target_parameters": ["mlp.experts.down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(unproven))
    change_config(tmp_path / "packed", model=unproven)
    digest = digest_of_file(tmp_path / "packed" / "config.json")
    redigest(tmp_path / "packed", lambda manifest: manifest.update(config=digest))
    assert not freebits.verify(tmp_path / "packed", against=adapter)["ok"]
