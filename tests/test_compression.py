"""The command `compress`: its plan, its targets, the check of its result, and the model card."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

import freebits
from freebits import CheckpointError
from freebits.cli.main import main
from freebits.evaluation.estimation import TYPICAL_ENTROPY
from freebits.evaluation.folder_sizes import bytes_on_disk
from freebits.storage.checkpoint import Checkpoint
from tests.tiny import Make, random_text

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
HEADER_SLACK = 8192
"""Bytes by which headers may be smaller than planned: negligible for a real model, but not for a tiny one."""
TEXT = random_text(2000)


@pytest.fixture
def dense(save_tiny: Make) -> Path:
    folder = save_tiny(**SIZES)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\ntags: [tiny]\n---\n\n# A tiny model\n")
    return folder


def compress(dense: Path, out: Path, **target: Any) -> dict[str, Any]:
    result: dict[str, Any] = freebits.compress(dense, out, calibration=TEXT, text=TEXT, **target)
    return result


@pytest.mark.parametrize("ratio", [0.6, 0.4])
def test_the_size_is_within_a_percent_of_the_target_and_never_exceeds_it(
    ratio: float, dense: Path, tmp_path: Path
) -> None:
    dense_size = bytes_on_disk(Checkpoint(dense))
    result = compress(dense, tmp_path / "out", target_ratio=ratio, force=True)
    assert 0.99 * ratio * dense_size - HEADER_SLACK <= result["bytes"]["packed"] <= ratio * dense_size


def test_without_a_target_the_mean_kl_stays_below_its_bound(dense: Path, tmp_path: Path) -> None:
    result = compress(dense, tmp_path / "out")
    assert result["plan"]["max_kl"] == 0.05
    assert 0.02 < result["fidelity"]["mean_kl"] <= 0.05
    finer = compress(dense, tmp_path / "finer", max_kl=0.005)
    assert finer["fidelity"]["mean_kl"] <= 0.005
    assert finer["bytes"]["packed"] > result["bytes"]["packed"]


def test_lossless_compression_restores_the_same_files(dense: Path, tmp_path: Path) -> None:
    result = compress(dense, tmp_path / "out", lossless=True)
    assert result["fidelity"]["ok"]
    assert result["bytes"]["packed"] < result["plan"]["bytes"]
    freebits.unpack(tmp_path / "out", tmp_path / "back")
    for file in dense.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in dense.iterdir()} == {file.name for file in (tmp_path / "back").iterdir()}


def test_a_target_that_needs_no_loss_is_met_losslessly(dense: Path, tmp_path: Path) -> None:
    assert compress(dense, tmp_path / "out", target_ratio=0.95)["plan"]["way"] == "lossless"


def test_weights_are_rounded_if_lossless_packing_misses_the_target(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freebits.api.compress.TYPICAL_ENTROPY", dict.fromkeys(TYPICAL_ENTROPY, 0.1))  # too optimistic
    lossless_size = compress(dense, tmp_path / "lossless", lossless=True)["bytes"]["packed"]
    result = compress(dense, tmp_path / "out", target_size=lossless_size - 1)
    assert result["plan"]["way"] == "lossless"
    assert result["bytes"]["packed"] < lossless_size
    assert 0 < result["fidelity"]["mean_kl"] < 1e-3


def test_a_target_that_ruins_the_model_is_refused_without_force(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(freebits.UsageError, match=r"KL \d.*`force`"):
        compress(dense, tmp_path / "out", bits=1.2)
    assert not (tmp_path / "out").exists()
    assert compress(dense, tmp_path / "out", bits=1.2, force=True)["fidelity"]["mean_kl"] > 0.5


def test_a_model_without_a_tokenizer_is_refused_before_any_work_starts(dense: Path, tmp_path: Path) -> None:
    for file in dense.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(freebits.CheckpointError, match="tokenizer"):
        freebits.compress(dense, tmp_path / "out", bits=4, progress=lambda *_: pytest.fail("work has started"))


def test_an_unusual_model_card_is_restored(dense: Path, tmp_path: Path) -> None:
    for card in ("---\ntags: tiny\nlicense: [1]\n---\nA model", "---\n: : [\n---\nx", "\ufeffplain", "---\n- a\n---\n"):
        (dense / "README.md").write_text(card)
        out, back = tmp_path / f"out{len(card)}", tmp_path / f"back{len(card)}"
        freebits.pack(dense, out, codec="none")
        assert "freebits unpack" in (out / "README.md").read_text()
        freebits.unpack(out, back)
        assert (back / "README.md").read_bytes() == (dense / "README.md").read_bytes()


def test_a_dry_run_writes_nothing(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(dense), str(tmp_path / "out"), "--bits", "4", "--dry-run"]) == 0
    assert "4 bits per weight" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_two_targets_cannot_be_combined(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(dense), str(tmp_path / "out"), "--bits", "4", "--lossless"]) == 2
    assert "--lossless" in capsys.readouterr().err


def test_the_card_reports_the_result_and_contains_the_original_card(dense: Path, tmp_path: Path) -> None:
    result = compress(dense, tmp_path / "out", bits=6)
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = metadata_load(tmp_path / "out" / "README.md")
    assert metadata is not None
    assert metadata["license"] == "apache-2.0"
    assert {"tiny", "freebits", "integers"} <= {*metadata["tags"]}
    assert f"{result['bytes']['packed']:,}" in card
    assert f"{result['fidelity']['mean_kl']:.4f} nats" in card
    assert card.index("freebits unpack") < card.index("# A tiny model")
    freebits.unpack(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "README.md").read_text() == (dense / "README.md").read_text()


def test_compress_and_estimate_print_their_results(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    texts = ["--calibration", str(tmp_path / "text"), "--text", str(tmp_path / "text")]
    assert main(["compress", str(dense), str(tmp_path / "out"), "--target-ratio", "0.6", *texts]) == 0
    out = capsys.readouterr().out
    assert "plan: " in out
    assert "mean KL" in out
    assert main(["estimate", str(dense), "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["bytes"]
    assert sizes["dense"] > sizes["lossless"] > sizes["8 bits"] > sizes["3 bits"]
    assert {"sliced 10 %", "sliced 20 %", "sliced 30 %"} <= sizes.keys()


def test_a_model_that_changes_during_compression_is_refused(
    save_tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, verify = save_tiny(), freebits.verify

    def verify_and_change(*arguments: Any, **options: Any) -> dict[str, Any]:
        result = verify(*arguments, **options)
        os.utime(dense / "model.safetensors", (0, 0))  # after everything was read from this file
        return result

    monkeypatch.setattr("freebits.api.compress.verify", verify_and_change)
    with pytest.raises(CheckpointError, match=re.escape(f"{dense} ")):
        freebits.compress(dense, tmp_path / "out", lossless=True)
    assert not (tmp_path / "out").exists()
