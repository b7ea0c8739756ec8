"""Recovery: what a lossy step left is trained, and not a byte of its form changes."""

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
from freebits.codecs.integers import Integers
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
    """The logits of what was trained, as it was before it was written."""
    found: list[Tensor] = []
    theirs = recover_checkpoint.train

    def train(student: Any, *arguments: Any) -> None:
        student.rate = 0.01  # tiny models learn fast, and their steps should come to the next
        theirs(student, *arguments)
        with torch.no_grad():
            found.append(student.model(TOKENS).logits)

    monkeypatch.setattr(recover_checkpoint, "train", train)
    return found


@pytest.mark.parametrize("variant", [{}, {"model_type": "gpt2"}, {"model_type": "opt"}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("entropy", ["auto", "none"])
def test_steps_and_norms_of_a_quantized_folder_are_trained_and_its_integers_stay(
    tmp_path: Path, save_tiny: Make, trained: list[Tensor], variant: dict[str, Any], entropy: str
) -> None:
    dense = save_tiny(dtype=torch.float32, **variant)
    before = quantized(dense, tmp_path / "three", entropy=entropy, bits=4 if variant.get("model_type") == "opt" else 3)
    facts = freebits.recover(before, tmp_path / "out", against=dense, **OPTIONS)
    assert facts["kl"]["after"] < 0.95 * facts["kl"]["before"]
    assert [transform["transform"] for transform in facts["history"]] == ["integers", "recover"]
    assert (facts["codec"], facts["entropy"]) == ("integers", entropy)
    old, new = PackedFolder(before), PackedFolder(tmp_path / "out")
    assert old.specs == new.specs
    code, grown = Integers(), 0
    for recipe, again in zip(old.manifest.recipes, new.manifest.recipes, strict=True):
        assert (recipe.code, recipe.makes) == (again.code, again.makes)
        if recipe.code == "integers":
            for one, other in zip(old.matrices(recipe, code), new.matrices(again, code), strict=True):
                assert torch.equal(one.integers, other.integers)
                assert torch.equal(one.columns, other.columns)
                grown += int((one.rows != other.rows).sum())
    assert grown > 100
    torch.testing.assert_close(logits(tmp_path / "out"), trained[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["sliced", "narrow", "dense"])
def test_linear_layers_of_a_plain_folder_are_trained_by_lora(
    tmp_path: Path, save_tiny: Make, slice_tiny: Make, trained: list[Tensor], form: str
) -> None:
    dense = save_tiny(dtype=torch.float32, shard="40KB")
    before = tmp_path / "before"
    if form == "sliced":
        before = slice_tiny(dense, force=True)
    elif form == "narrow":
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


def test_the_same_seed_trains_the_same_and_a_text_can_be_given(tmp_path: Path, save_tiny: Make) -> None:
    dense = save_tiny()
    before = quantized(dense, tmp_path / "three")
    (tmp_path / "text").write_text(random_text(64 * 16))
    options = ["--against", str(dense), "--calibration", str(tmp_path / "text"), "--samples", "40", "--seq-len", "16"]
    for out in ("one", "other"):
        assert main(["recover", str(before), str(tmp_path / out), *options, "--quiet"]) == 0
    assert (tmp_path / "one" / "packed.safetensors").read_bytes() == (
        tmp_path / "other" / "packed.safetensors"
    ).read_bytes()
    assert freebits.inspect(tmp_path / "one")["history"][-1]["text"] == "given"


def test_matrices_that_were_rounded_rotated_keep_their_steps(tmp_path: Path, save_tiny: Make) -> None:
    dense = save_tiny()
    before = PackedFolder(quantized(dense, tmp_path / "turned", rotate="hadamard"))
    student = _trainable(before, load(before.path, dtype=torch.float32), 4, 0)
    assert isinstance(student, ScaleAdapters)
    assert not student.steps()
    assert student.what == "norms"
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
def test_all_linear_layers_are_found_and_nothing_else(
    tmp_path: Path, save_tiny: Make, slice_tiny: Make, variant: dict[str, Any], form: str, count: int
) -> None:
    dense = save_tiny(dtype=torch.float32, **variant)
    before = slice_tiny(dense, force=True) if form == "sliced" else quantized_then_plain(dense, tmp_path)
    student = _trainable(Checkpoint(before), load(before), 4, 0)
    assert len(student.tensors) == count
    freebits.recover(before, tmp_path / "out", against=dense, force=True, samples=4, seq_len=16)
    old, new = Checkpoint(before), Checkpoint(tmp_path / "out")
    assert {name for name in old.specs if not torch.equal(old[name], new[name])} == student.tensors.keys()


def quantized_then_plain(dense: Path, tmp_path: Path) -> Path:
    freebits.unpack(quantized(dense, tmp_path / "packed", bits=4), tmp_path / "plain")
    return tmp_path / "plain"


def test_names_may_lack_the_models_prefix(tmp_path: Path, save_tiny: Make) -> None:
    dense = save_tiny(model_type="gpt2")
    state = {name.removeprefix("transformer."): of for name, of in load_file(dense / "model.safetensors").items()}
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    before = quantized(dense, tmp_path / "three")
    student = _trainable(PackedFolder(before), load(before), 4, 0)
    assert isinstance(student, ScaleAdapters)
    assert len(student.steps()) == 12
    freebits.recover(before, tmp_path / "out", against=dense, force=True, samples=4, seq_len=16)
    assert not torch.equal(PackedFolder(tmp_path / "out")["ln_f.weight"], state["ln_f.weight"])


def test_what_cannot_be_recovered_gets_one_line(
    tmp_path: Path, save_tiny: Make, slice_tiny: Make, pack_tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = save_tiny(), tmp_path / "out"
    sliced = slice_tiny(dense)
    with pytest.raises(CheckpointError, match="packed but not quantized"):
        freebits.recover(pack_tiny(sliced), out, against=dense)
    with pytest.raises(UsageError, match="`rank` is 0"):
        freebits.recover(sliced, out, against=dense, rank=0)
    with pytest.raises(UsageError, match="samples"):
        freebits.recover(sliced, out, against=dense, samples=0, calibration=random_text(600), seq_len=32)
    with pytest.raises(CheckpointError, match=r"80 tokens.* 96"):
        freebits.recover(sliced, out, against=save_tiny("other", vocab_size=80), **OPTIONS)
    with pytest.raises(UsageError, match="one window of 32 tokens"):
        freebits.recover(sliced, out, against=dense, calibration=random_text(40), seq_len=32)
    monkeypatch.setattr(recover_checkpoint, "train", lambda *_: None)
    with pytest.raises(UsageError, match="cannot sign"):
        freebits.recover(sliced, out, against=tmp_path / "nowhere", sign_with=tmp_path / "no.pem")
    with pytest.raises(UsageError, match="training did not help"):
        freebits.recover(sliced, out, against=dense, **OPTIONS)
    assert not out.exists()
    freebits.recover(sliced, out, against=dense, force=True, **OPTIONS)
    assert torch.equal(logits(out), logits(sliced))


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, save_tiny: Make) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"freebits\[recover\]"):
        LoraAdapters(load(save_tiny()), {}, 4, 0)
