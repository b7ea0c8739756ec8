"""Low-rank layers are the best of their rank, and models with low-rank layers work in every command."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import freebits
from freebits import CheckpointError, UnsupportedModelError, UsageError
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from freebits.transforms.low_rank import allocated, n_low_rank_weights, rank_for, reduced, spectrum
from tests.conftest import content
from tests.tiny import FAMILIES, Make, random_text

TEXT = random_text(1200)
OPTIONS: dict[str, Any] = {"calibration": TEXT, "samples": 8, "seq_len": 32}
seeds = st.integers(0, 2**32)


def random_matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(2, 12), m=st.integers(2, 12), data=st.data())
def test_a_reduced_layer_has_the_smallest_loss_of_its_rank(seed: int, n: int, m: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(n, m)))
    W, X = random_matrix(seed, n, m), random_matrix(seed + 1, 40, m)
    information = random_matrix(seed + 2, n).square() + 0.1
    down, up = reduced(W, X.T @ X, rank, information)
    assert (down.shape, up.shape) == ((rank, m), (n, rank))
    roots = information.sqrt()
    loss = ((X @ (up @ down - W).T) * roots).square().sum()
    # The smallest possible loss is the sum of the squares of the smallest singular values of `F½ W Σ½`.
    input_root = torch.linalg.cholesky(X.T @ X + 1e-9 * torch.eye(m))
    values = torch.linalg.svdvals(roots[:, None] * W @ input_root)
    assert torch.allclose(loss, values[rank:].square().sum(), rtol=1e-5, atol=1e-6)
    energies = spectrum(W, X.T @ X, information)
    assert torch.allclose(energies[rank:].sum(), values[rank:].square().sum(), rtol=1e-5, atol=1e-6)


@given(n=st.integers(2, 400), m=st.integers(2, 400), budget=st.floats(0.05, 0.99))
def test_a_rank_is_the_largest_within_the_budget(n: int, m: int, budget: float) -> None:
    rank = rank_for(n, m, budget)
    assert 1 <= rank <= min(n, m)
    assert n_low_rank_weights(n, m, rank) <= budget * n * m or rank == 1
    assert rank == min(n, m) or n_low_rank_weights(n, m, rank + 1) > budget * n * m
    unpaired = rank_for(n, m, budget, paired=False)
    assert unpaired * (n + m) <= budget * n * m or unpaired == 1


def test_a_square_layer_reduced_by_a_fifth_keeps_more_than_half_of_its_rank() -> None:
    assert rank_for(1000, 1000, 0.8) / 1000 == pytest.approx(0.553, abs=2e-3)
    assert rank_for(1000, 1000, 0.8, paired=False) / 1000 == pytest.approx(0.4, abs=1e-3)


def test_a_layer_with_a_steep_spectrum_gets_a_lower_rank() -> None:
    spectra = {"flat": torch.ones(8).double(), "steep": 100 * 0.1 ** torch.arange(8).double()}
    ranks = allocated(spectra, {"flat": (8, 8), "steep": (8, 8)}, 0.8)
    assert ranks["steep"] < (ranks["flat"] or 8)
    n_weights = sum(n_low_rank_weights(8, 8, rank or 8) for rank in ranks.values())
    assert n_weights <= 0.8 * 128


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = freebits.load(folder, dtype=torch.float32)(torch.arange(40)[None]).logits
    return result


def expanded(folder: Path, dense: Path) -> Any:
    """Return the dense model with each reduced layer replaced by the product of its low-rank pair."""
    checkpoint, model = Checkpoint(folder), freebits.load(dense, dtype=torch.float32)
    for layer in checkpoint.config["low_ranks"]:
        down, up = (checkpoint[f"{layer}.{side}.weight"].float() for side in ("down", "up"))
        weight = model.get_submodule(layer).weight
        weight.data.copy_((up @ down).T if model.config.model_type == "gpt2" else up @ down)
    return model


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("Mixtral", "Qwen3-MoE", "DeepSeek V3")])
def test_a_model_is_reduced_packed_and_unpacked(name: str, save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(**FAMILIES[name], dtype=torch.float32)
    facts = freebits.lowrank(dense, tmp_path / "out", budget=0.7, allocate="uniform", **OPTIONS)
    assert facts["history"][-1]["transform"] == "lowrank"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"].startswith("lowrank_")
    assert len(config["low_ranks"]) >= 9  # in three blocks
    expected = logits(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            expanded(tmp_path / "out", dense)(torch.arange(40)[None]).logits, expected, atol=1e-3, rtol=1e-3
        )
    packed = freebits.pack(tmp_path / "out", tmp_path / "packed", entropy="none")
    assert packed["parameters"] == facts["parameters"]
    stored = PackedFolder(tmp_path / "packed").stored
    assert sum(spec.numel for spec in stored.values()) < 0.9 * facts["parameters"]
    assert (logits(tmp_path / "packed") - expected).abs().max() < 1e-2 < expected.std()
    pivots = [name for name in stored if name.endswith(".down.weight.pivots")]
    assert len(pivots) == len(config["low_ranks"])  # later pairs do not undo earlier ones
    freebits.unpack(tmp_path / "packed", tmp_path / "plain")
    assert Checkpoint(tmp_path / "plain").specs == Checkpoint(tmp_path / "out").specs
    assert (logits(tmp_path / "plain") - expected).abs().max() < 1e-2


def test_keeping_pivots_saves_parameters_and_keeps_the_logits(save_tiny: Make, tmp_path: Path) -> None:
    freebits.lowrank(save_tiny(dtype=torch.float32), tmp_path / "out", **OPTIONS)
    freebits.pack(tmp_path / "out", tmp_path / "packed")
    plain, model = (freebits.load(tmp_path / "packed", keep_pivots=keep) for keep in (False, True))
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)
    ranks = plain.config.low_ranks.values()
    counts = [sum(weights.numel() for weights in loaded.parameters()) for loaded in (plain, model)]
    assert sum(rank**2 for rank in ranks) >= counts[0] - counts[1] > 0.6 * sum(rank**2 for rank in ranks)


def test_transformers_saves_and_loads_a_reduced_model(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    freebits.lowrank(dense, tmp_path / "out", **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "out"))
    assert "freebits.models.low_rank" in (tmp_path / "again" / "modeling_freebits.py").read_text()


@pytest.mark.parametrize("order", ["slice first", "reduce first"])
@pytest.mark.parametrize("name", ["Llama 3", "OPT"])
def test_reducing_slicing_and_quantizing_can_be_combined(
    name: str, order: str, save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    dense = save_tiny(**FAMILIES[name], dtype=torch.float32)
    out = tmp_path / "out"
    if order == "slice first":
        freebits.lowrank(slice_tiny(dense, force=True), out, **OPTIONS)
    else:
        freebits.lowrank(dense, tmp_path / "reduced", **OPTIONS)
        freebits.slice_model(tmp_path / "reduced", out, sparsity=0.25, force=True, **OPTIONS)
    expected = logits(out)
    facts = freebits.pack(out, tmp_path / "packed")
    assert {transform["transform"] for transform in facts["history"]} == {"slice", "lowrank", "canonical"}
    assert (logits(tmp_path / "packed") - expected).abs().max() < 1e-2
    freebits.unpack(tmp_path / "packed", tmp_path / "plain")
    assert (logits(tmp_path / "plain") - expected).abs().max() < 1e-2
    facts = freebits.quantize(out, tmp_path / "quantized", target_kl=1e-6, **OPTIONS)
    assert len(facts["history"]) == 3
    assert (logits(tmp_path / "quantized") - expected).abs().max() < 0.1 < expected.std()


@pytest.mark.parametrize("allocate", ["uniform", "paper", "slope"])
def test_every_allocation_keeps_the_budget(allocate: str, save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    freebits.lowrank(dense, tmp_path / "out", budget=0.8, allocate=allocate, **OPTIONS)
    before, after = Checkpoint(dense), Checkpoint(tmp_path / "out")
    ranks = after.config["low_ranks"]
    blocks = {name.split(".")[2] for name in ranks}
    assert blocks == ({"2"} if allocate == "paper" else {"0", "1", "2"})
    block_specs = [spec for name, spec in before.specs.items() if name.startswith("model.layers")]
    n_weights = sum(spec.numel for spec in block_specs if len(spec.shape) == 2)
    shapes = {name: before.specs[f"{name}.weight"].shape for name in ranks}
    saved = sum(n * m - n_low_rank_weights(n, m, ranks[name]) for name, (n, m) in shapes.items())
    assert saved >= (0.19 if allocate != "paper" else 0.15) * n_weights


def test_the_target_size_is_nearly_reached_and_not_exceeded(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    dense_size = sum(spec.n_bytes for spec in Checkpoint(dense).specs.values())
    target = int(0.85 * dense_size)
    freebits.lowrank(dense, tmp_path / "out", target_size=target, **OPTIONS)
    size = sum(spec.n_bytes for spec in Checkpoint(tmp_path / "out").specs.values())
    assert 0.97 * target < size <= target


def test_a_stopped_run_is_resumed(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    freebits.lowrank(dense, tmp_path / "uninterrupted", **OPTIONS)

    calls: list[int] = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) in (2, 5, 9):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            freebits.lowrank(dense, tmp_path / "out", progress=stop, **OPTIONS)
    freebits.lowrank(dense, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "uninterrupted")


def test_the_perplexities_are_reported(save_tiny: Make, tmp_path: Path, report: Callable[[str], None]) -> None:
    facts = freebits.lowrank(save_tiny(), tmp_path / "out", budget=0.9, **OPTIONS)
    assert facts["perplexity"]["dense"] > 1
    assert facts["perplexity"]["reduced"] > 1
    report(f"lowrank: perplexities {facts['perplexity']}")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"budget": 1.0}, "`budget` is 1.0"),
        ({"budget": 0.7, "allocate": "paper"}, "`budget` is 0.7"),
        ({"blocks": "last:4"}, "`blocks` is 'last:4'"),
        ({"blocks": "first"}, "`blocks` is 'first'"),
        ({"target_size": 1000}, "`target_size` is 1000"),
        ({"target_size": 1000, "budget": 0.5}, "`budget` and `target_size`"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], facts: str, save_tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=facts):
        freebits.lowrank(save_tiny(), tmp_path / "out", **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_reduced_and_packed_models_are_refused(save_tiny: Make, tmp_path: Path) -> None:
    freebits.lowrank(save_tiny(), tmp_path / "out", **OPTIONS)
    with pytest.raises(UnsupportedModelError, match=re.escape(str(tmp_path / "out"))):
        freebits.lowrank(tmp_path / "out", tmp_path / "twice", **OPTIONS)
    freebits.pack(tmp_path / "out", tmp_path / "packed")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "packed"))):
        freebits.lowrank(tmp_path / "packed", tmp_path / "twice", **OPTIONS)
