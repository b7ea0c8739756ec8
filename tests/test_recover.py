"""Recovery trains a compressed model, and keeps its specs, recipes and integers."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freebits
from freebits.api import recover as recover_checkpoint
from freebits.api.recover import _trainable
from freebits.cli.main import main
from freebits.errors import CheckpointError, UsageError
from freebits.integrations.loading import load
from freebits.integrations.trainable_adapters import LoraAdapters, ScaleAdapters
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from tests.tiny import Make, random_text

TOKENS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(3))
CALIBRATED: dict[str, Any] = {"calibration": random_text(600), "samples": 4, "seq_len": 32}
OPTIONS: dict[str, Any] = {"samples": 80, "seq_len": 32}


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    result: Tensor = load(folder, dtype=torch.float32)(TOKENS).logits
    return result


def quantized(dense: Path, out: Path, **options: Any) -> Path:
    freebits.quantize(dense, out, **{"bits": 3, **CALIBRATED, **options})
    return out


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list to which each training adds the logits of the trained model, before the model is written."""
    recorded_logits: list[Tensor] = []
    original_train = recover_checkpoint.train

    def train(trainable: Any, *arguments: Any) -> None:
        trainable.rate = 0.01  # high enough that scales of tiny models change by at least one grid point
        original_train(trainable, *arguments)
        with torch.no_grad():
            recorded_logits.append(trainable.model(TOKENS).logits)

    monkeypatch.setattr(recover_checkpoint, "train", train)
    return recorded_logits


@pytest.mark.parametrize("variant", [{}, {"model_type": "gpt2"}, {"model_type": "opt"}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("entropy", ["auto", "none"])
def test_scales_and_norms_of_a_quantized_folder_are_trained_and_its_integers_stay(
    tmp_path: Path, save_tiny: Make, trained: list[Tensor], variant: dict[str, Any], entropy: str
) -> None:
    dense = save_tiny(dtype=torch.float32, **variant)
    before = quantized(dense, tmp_path / "three", entropy=entropy, bits=4 if variant.get("model_type") == "opt" else 3)
    facts = freebits.recover(before, tmp_path / "out", against=dense, **OPTIONS)
    assert facts["kl"]["after"] < 0.95 * facts["kl"]["before"]
    assert [step["transform"] for step in facts["history"]] == ["integers", "recover"]
    assert (facts["codec"], facts["entropy"]) == ("integers", entropy)
    old, new = PackedFolder(before), PackedFolder(tmp_path / "out")
    assert old.specs == new.specs
    n_changed_rows = 0
    for old_recipe, new_recipe in zip(old.manifest.recipes, new.manifest.recipes, strict=True):
        assert (old_recipe.code, old_recipe.makes) == (new_recipe.code, new_recipe.makes)
        if old_recipe.code == "integers":
            chunks = (folder.integer_chunks(recipe) for folder, recipe in ((old, old_recipe), (new, new_recipe)))
            for old_matrix, new_matrix in zip(*chunks, strict=True):
                assert (old_matrix.integers == new_matrix.integers).all()
                assert torch.equal(old_matrix.columns, new_matrix.columns)
                n_changed_rows += int((old_matrix.rows != new_matrix.rows).sum())
    assert n_changed_rows > 100
    torch.testing.assert_close(logits(tmp_path / "out"), trained[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["sliced", "low rank", "dense"])
def test_linear_layers_of_a_plain_folder_are_trained_by_lora(
    tmp_path: Path, save_tiny: Make, slice_tiny: Make, trained: list[Tensor], form: str
) -> None:
    dense = save_tiny(dtype=torch.float32, shard="40KB")
    before = tmp_path / "before"
    if form == "sliced":
        before = slice_tiny(dense, force=True)
    elif form == "low rank":
        freebits.lowrank(dense, before, budget=0.6, **CALIBRATED)
    else:
        freebits.unpack(quantized(dense, tmp_path / "three"), before)
    facts = freebits.recover(before, tmp_path / "out", against=dense, rank=4, **OPTIONS)
    assert facts["kl"]["after"] < 0.95 * facts["kl"]["before"]
    assert facts["history"][-1]["trained"] == "LoRA of rank 4"
    old, new = Checkpoint(before), Checkpoint(tmp_path / "out")
    assert old.specs == new.specs
    assert len(old.weights) == len(new.weights)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(old[embedding], new[embedding])
    torch.testing.assert_close(logits(tmp_path / "out"), trained[0], rtol=1e-4, atol=1e-4)
    if form == "sliced":
        freebits.pack(tmp_path / "out", tmp_path / "packed")
        torch.testing.assert_close(logits(tmp_path / "packed"), trained[0], rtol=1e-3, atol=1e-3)


def test_a_run_with_the_same_seed_and_text_writes_the_same_file(tmp_path: Path, save_tiny: Make) -> None:
    dense = save_tiny()
    before = quantized(dense, tmp_path / "three")
    (tmp_path / "text").write_text(random_text(64 * 16))
    options = ["--against", str(dense), "--calibration", str(tmp_path / "text"), "--samples", "40", "--seq-len", "16"]
    for out in ("first", "second"):
        assert main(["recover", str(before), str(tmp_path / out), *options, "--quiet"]) == 0
    files = [(tmp_path / out / "packed.safetensors").read_bytes() for out in ("first", "second")]
    assert files[0] == files[1]
    assert freebits.inspect(tmp_path / "first")["history"][-1]["text"] == "given"


def test_matrices_that_were_rounded_in_a_rotated_basis_keep_their_scales(tmp_path: Path, save_tiny: Make) -> None:
    dense = save_tiny()
    before = PackedFolder(quantized(dense, tmp_path / "rotated", rotate="hadamard"))
    trainable = _trainable(before, load(before.path, dtype=torch.float32), 4, 0)
    assert isinstance(trainable, ScaleAdapters)
    assert not trainable.exponent_changes()
    assert trainable.description == "norms, biases"
    freebits.recover(before.path, tmp_path / "out", against=dense, force=True, samples=8, seq_len=32)
    after = PackedFolder(tmp_path / "out")
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("variant", "form", "count"),
    [
        ({"model_type": "gpt2"}, "plain", 12),
        ({"model_type": "falcon", "parallel_attn": False, "bias": True, "alibi": True}, "sliced", 18),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 2}, "plain", 12),
    ],
)
def test_lora_trains_all_linear_layers_and_nothing_else(
    tmp_path: Path, save_tiny: Make, slice_tiny: Make, variant: dict[str, Any], form: str, count: int
) -> None:
    dense = save_tiny(dtype=torch.float32, **variant)
    before = slice_tiny(dense, force=True) if form == "sliced" else quantized_and_unpacked(dense, tmp_path)
    trainable = _trainable(Checkpoint(before), load(before), 4, 0)
    assert len(trainable.tensors) == count
    freebits.recover(before, tmp_path / "out", against=dense, force=True, samples=4, seq_len=16)
    old, new = Checkpoint(before), Checkpoint(tmp_path / "out")
    assert {name for name in old.specs if not torch.equal(old[name], new[name])} == trainable.tensors.keys()


def quantized_and_unpacked(dense: Path, tmp_path: Path) -> Path:
    freebits.unpack(quantized(dense, tmp_path / "packed", bits=4), tmp_path / "plain")
    return tmp_path / "plain"


def test_tensor_names_without_the_prefix_of_the_model_are_recognized(tmp_path: Path, save_tiny: Make) -> None:
    dense = save_tiny(model_type="gpt2")
    tensors = load_file(dense / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    before = quantized(dense, tmp_path / "three")
    trainable = _trainable(PackedFolder(before), load(before), 4, 0)
    assert isinstance(trainable, ScaleAdapters)
    assert len(trainable.exponent_changes()) == 12
    freebits.recover(before, tmp_path / "out", against=dense, force=True, samples=4, seq_len=16)
    assert not torch.equal(PackedFolder(tmp_path / "out")["ln_f.weight"], state["ln_f.weight"])


def test_invalid_models_and_options_are_refused(
    tmp_path: Path, save_tiny: Make, slice_tiny: Make, pack_tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = save_tiny(), tmp_path / "out"
    sliced = slice_tiny(dense)
    packed = pack_tiny(sliced)
    with pytest.raises(CheckpointError, match=re.escape(str(packed))):
        freebits.recover(packed, out, against=dense)
    with pytest.raises(UsageError, match="`rank` is 0"):
        freebits.recover(sliced, out, against=dense, rank=0)
    with pytest.raises(UsageError, match="`samples` is 0"):
        freebits.recover(sliced, out, against=dense, samples=0, calibration=random_text(600), seq_len=32)
    with pytest.raises(CheckpointError, match=r"80 tokens.* 96"):
        freebits.recover(sliced, out, against=save_tiny("other", vocab_size=80), **OPTIONS)
    with pytest.raises(UsageError, match="32 tokens"):
        freebits.recover(sliced, out, against=dense, calibration=random_text(40), seq_len=32)
    monkeypatch.setattr(recover_checkpoint, "train", lambda *_: None)
    with pytest.raises(UsageError, match=r"no\.pem"):
        freebits.recover(sliced, out, against=tmp_path / "nowhere", sign_with=tmp_path / "no.pem")
    with pytest.raises(UsageError, match=r"`samples`.*`force`"):
        freebits.recover(sliced, out, against=dense, **OPTIONS)
    assert not out.exists()
    freebits.recover(sliced, out, against=dense, force=True, **OPTIONS)
    assert torch.equal(logits(out), logits(sliced))


def test_without_peft_the_error_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch, save_tiny: Make) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"freebits\[recover\]"):
        LoraAdapters(load(save_tiny()), {}, 4, 0)
