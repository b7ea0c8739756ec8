"""Estimates of sizes from a config, compared with files and with Table 1 of the paper."""

import json
import re
import shutil
from pathlib import Path

import pytest

import freebits
from freebits.cli.main import main
from freebits.codecs.triangles import n_lower_values
from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from tests.tiny import VARIANTS, Make, change_config

CONFIGS = Path(__file__).parent.parent / "benchmarks" / "configs"
SPARSITIES = (0.20, 0.25, 0.30)
AFTER_SLICING = {
    "opt-1.3b": ("-9.53", "-14.84", "-20.53"),
    "opt-2.7b": ("-9.19", "-15.07", "-20.88"),
    "opt-6.7b": ("-9.29", "-15.16", "-21.18"),
    "opt-13b": ("-9.18", "-15.27", "-21.29"),
    "llama-2-7b": ("-9.38", "-15.34", "-21.45"),
}
AFTER_BITS_BACK = {
    "opt-1.3b": (-13.77, -18.61, -23.81),
    "opt-2.7b": (-13.84, -19.09, -24.43),
    "opt-6.7b": (-14.07, -19.29, -24.84),
    "opt-13b": (-14.01, -19.51, -24.97),
    "llama-2-7b": (-14.13, -19.53, -25.09),
}
"""Changes of the size in percent at `SPARSITIES` (paper, Table 1). After bits-back, they include corrections."""


@pytest.mark.parametrize("model", AFTER_SLICING)
def test_the_estimates_agree_with_table_1_of_the_paper(model: str) -> None:
    changes = [freebits.estimate(CONFIGS / f"{model}.json", s)["change_vs_dense_untied"] for s in SPARSITIES]
    assert tuple(f"{change['sliced']:.2f}" for change in changes) == AFTER_SLICING[model]
    for change, paper in zip(changes, AFTER_BITS_BACK[model], strict=True):
        assert paper - 0.5 < change["bits_back"] <= paper
        assert change["canonical"] < change["bits_back"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_estimates_agree_with_the_contents_of_the_files(
    variant: str, save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    dense = save_tiny(hidden_size=64, intermediate_size=160, **VARIANTS[variant])
    estimate = freebits.estimate(dense, 0.25)
    sliced = slice_tiny(dense, untie=True)
    freebits.pack(sliced, tmp_path / "packed", codec="bits-back", entropy="none", threshold=1e9)
    norms = {name for name in Checkpoint(dense).specs if "norm" in name}
    head_bias = 96 if "opt" in variant else 0  # the paper does not count the bias of the final norm
    counts = {
        "dense": sum(spec.numel for name, spec in Checkpoint(dense).specs.items() if name not in norms),
        "sliced": sum(spec.numel for spec in Checkpoint(sliced).specs.values()) - head_bias,
    }
    assert counts == {form: estimate["params"][form] for form in counts}
    assert estimate["bytes"]["dense"] == sum(spec.n_bytes for spec in Checkpoint(dense).specs.values())
    assert estimate["bytes"]["sliced"] == sum(spec.n_bytes for spec in Checkpoint(sliced).specs.values())
    stored = PackedFolder(tmp_path / "packed").stored.items()
    n_values = sum(spec.numel for name, spec in stored if not name.endswith(".signs")) - head_bias
    n_sign_values = 6 * 8 // 2  # the signs of each site take 8 bytes, the size of four 16-bit values
    if "narrow" not in variant:  # a matrix without full rank takes fewer values than estimated
        assert n_values + n_sign_values == estimate["params"]["bits_back"]

    forms = {"canonical": sliced, "dense_canonical": dense}
    if estimate["params"]["canonical_tied"] is not None:
        forms["canonical_tied"] = slice_tiny(dense, "tied")
    for form, folder in forms.items():
        freebits.pack(folder, tmp_path / form, entropy="none")
        packed = PackedFolder(tmp_path / form)
        n_values = sum(spec.numel for name, spec in packed.stored.items() if name not in norms)
        ranks = [rank for rank in packed.config.get("shortcut_ranks", []) if rank]
        # the estimate assumes that all shortcut factors have rank 16
        n_overestimated = sum(n_lower_values(48, 16) - n_lower_values(48, rank) for rank in ranks)
        assert n_values - (head_bias if form == "canonical" else 0) + n_overestimated == estimate["params"][form]


def test_only_a_model_with_a_tied_head_has_a_tied_canonical_form() -> None:
    tied, untied = (freebits.estimate(CONFIGS / f"{name}.json", 0.2)["params"] for name in ("opt-1.3b", "llama-2-7b"))
    assert tied["dense"] < tied["dense_untied"]
    assert tied["canonical_tied"] < tied["canonical"]
    assert untied["dense"] == untied["dense_untied"]
    assert untied["canonical_tied"] is None


def test_estimate_prints_a_table_or_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", str(CONFIGS / "opt-6.7b.json"), "--sparsity", "0.2"]
    assert main(arguments) == 0
    assert "-14.33 %" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["hidden_size"], result["sliced_size"]) == (4096, 3272)
    forms = ["dense_canonical", "sliced", "bits_back", "canonical", "canonical_tied"]
    assert list(result["params"]) == ["dense", "dense_untied", *forms]
    assert list(result["bytes"]) == [*result["params"], "default"]
    assert result["bytes"]["default"] == round(0.85 * result["bytes"]["canonical_tied"])
    for base in ("change_vs_dense", "change_vs_dense_untied"):
        assert list(result[base]) == forms
    assert round(result["change_vs_dense"]["dense_canonical"], 2) == -0.50


def test_a_config_that_cannot_be_estimated_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        freebits.estimate(tmp_path, 0.2)
    shutil.copy(CONFIGS / "opt-1.3b.json", tmp_path / "config.json")
    change_config(tmp_path, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers.*1000000000"):
        freebits.estimate(tmp_path, 0.2)
    change_config(tmp_path, num_hidden_layers=24, word_embed_proj_dim=512)
    with pytest.raises(UnsupportedModelError, match="word_embed_proj_dim"):
        freebits.estimate(tmp_path, 0.2)


@pytest.mark.parametrize("sparsity", [0.9, 0.92, 0.99])
@pytest.mark.parametrize("model", ["opt-1.3b", "llama-2-7b"])
def test_at_high_sparsity_no_form_is_estimated_larger_than_the_sliced_model(model: str, sparsity: float) -> None:
    params = freebits.estimate(CONFIGS / f"{model}.json", sparsity)["params"]
    assert max(params["canonical"], params["bits_back"]) <= params["sliced"]


def test_a_config_too_large_for_any_machine_is_refused(tmp_path: Path) -> None:
    shutil.copy(CONFIGS / "llama-2-7b.json", tmp_path / "config.json")
    change_config(tmp_path, intermediate_size=2**40, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        freebits.estimate(tmp_path, 0.2)
