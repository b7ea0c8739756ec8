"""PEFT adapters: packed without what their two matrices say twice, and back."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import freebits
from freebits import CheckpointError
from freebits.checkpoint import Checkpoint
from freebits.cli import main
from freebits.packed import PackedFolder
from tests.conftest import content
from tests.tiny import Make, change_tensors, tiny_model

RANK = 4
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of rank 4 on all linear layers, with trained (random) numbers."""
    model: Any = get_peft_model(
        tiny_model(dtype=torch.float32), LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a base model that is on no hub
        model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(tiny_model(), adapter).double().eval()
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(40)[None]).logits
    return result


def test_an_adapter_comes_back_as_the_same_function(
    adapter: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    facts = freebits.pack(adapter, tmp_path / "packed", entropy="none")
    assert freebits.inspect(adapter)["kind"] == "adapter"
    n_layers = 21
    spared = sum(k.numel for k in Checkpoint(adapter).kinds.values()) - sum(
        kind.numel for name, kind in PackedFolder(tmp_path / "packed").stored.items() if not name.endswith(".pivots")
    )
    assert spared == n_layers * RANK**2
    assert facts["bytes"]["dense"] == freebits.inspect(adapter)["bytes"]["dense"]
    assert freebits.verify(tmp_path / "packed", against=adapter)["ok"]
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    assert {file.name for file in (tmp_path / "back").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    expected = logits(adapter)
    base = tiny_model()(torch.arange(40)[None]).logits
    difference = (logits(tmp_path / "back") - expected).norm() / expected.norm()
    report(f"an adapter packed in float32: logits differ by {difference:.1e}")
    assert difference < 1e-6 < (expected - base).abs().max()


def test_an_adapter_comes_back_bit_for_bit(adapter: Path, tmp_path: Path) -> None:
    freebits.pack(adapter, tmp_path / "packed", codec="none")
    assert freebits.verify(tmp_path / "packed", against=adapter)["fidelity"] == "bit-exact"
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes()


def test_a_wrong_adapter_is_noticed(adapter: Path, tmp_path: Path) -> None:
    freebits.pack(adapter, tmp_path / "packed")
    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    change_tensors(adapter, base_model__model__model__layers__1__mlp__up_proj__lora_A__weight=lambda A: A * 1.001)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    result = freebits.verify(tmp_path / "packed", against=adapter)
    assert (result["ok"], result["failed"]) == (False, ["product"])


def test_what_is_no_model_is_not_taken_for_one(
    adapter: Path, tmp_path: Path, save_tiny: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(adapter)
    with pytest.raises(CheckpointError, match="load it with PEFT"):
        freebits.load(adapter)
    freebits.pack(adapter, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="load it with PEFT, on top of its model, once it is unpacked"):
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
    assert "holds no adapter_model.safetensors" in capsys.readouterr().err
    dense = save_tiny()
    (dense / "adapter_config.json").write_text("{}")
    assert main(["pack", str(dense), str(tmp_path / "out")]) == 2
    assert "merge it into the model first" in capsys.readouterr().err
