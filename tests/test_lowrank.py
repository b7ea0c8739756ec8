"""Layers of low rank: the best of their rank, and models that have them."""

import json
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


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(2, 12), m=st.integers(2, 12), data=st.data())
def test_a_reduced_layer_is_the_best_of_its_rank(seed: int, n: int, m: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(n, m)))
    W, X, information = numbers(seed, n, m), numbers(seed + 1, 40, m), numbers(seed + 2, n).square() + 0.1
    down, up = reduced(W, X.T @ X, rank, information)
    assert (down.shape, up.shape) == ((rank, m), (n, rank))
    roots = information.sqrt()
    loss = ((X @ (up @ down - W).T) * roots).square().sum()
    # the closed form: of all matrices of a rank the nearest in the norm of `F½ · Σ½` drops the smallest singular values
    half = torch.linalg.cholesky(X.T @ X + 1e-9 * torch.eye(m))
    values = torch.linalg.svdvals(roots[:, None] * W @ half)
    assert torch.allclose(loss, values[rank:].square().sum(), rtol=1e-5, atol=1e-6)
    carried = spectrum(W, X.T @ X, information)
    assert torch.allclose(carried[rank:].sum(), values[rank:].square().sum(), rtol=1e-5, atol=1e-6)


@given(n=st.integers(2, 400), m=st.integers(2, 400), budget=st.floats(0.05, 0.99))
def test_a_rank_takes_its_budget_and_no_more(n: int, m: int, budget: float) -> None:
    rank = rank_for(n, m, budget)
    assert 1 <= rank <= min(n, m)
    assert n_low_rank_weights(n, m, rank) <= budget * n * m or rank == 1
    assert rank == min(n, m) or n_low_rank_weights(n, m, rank + 1) > budget * n * m
    plain = rank_for(n, m, budget, paired=False)
    assert plain * (n + m) <= budget * n * m or plain == 1


def test_a_square_layer_cut_by_a_fifth_keeps_more_than_half_its_rank() -> None:
    assert rank_for(1000, 1000, 0.8) / 1000 == pytest.approx(0.553, abs=2e-3)
    assert rank_for(1000, 1000, 0.8, paired=False) / 1000 == pytest.approx(0.4, abs=1e-3)


def test_ranks_go_where_they_are_worth_most() -> None:
    spectra = {"flat": torch.ones(8).double(), "steep": 100 * 0.1 ** torch.arange(8).double()}
    ranks = allocated(spectra, {"flat": (8, 8), "steep": (8, 8)}, 0.8)
    assert ranks["steep"] < (ranks["flat"] or 8)
    taken = sum(n_low_rank_weights(8, 8, rank or 8) for rank in ranks.values())
    assert taken <= 0.8 * 128


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = freebits.load(folder, dtype=torch.float32)(torch.arange(40)[None]).logits
    return result


def expanded(folder: Path, dense: Path) -> Any:
    """The dense model with the product of each pair in its place."""
    reduced_, model = Checkpoint(folder), freebits.load(dense, dtype=torch.float32)
    for layer in reduced_.config["low_ranks"]:
        down, up = (reduced_[f"{layer}.{side}.weight"].float() for side in ("down", "up"))
        weight = model.get_submodule(layer).weight
        weight.data.copy_((up @ down).T if model.config.model_type == "gpt2" else up @ down)
    return model


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("Mixtral", "Qwen3-MoE", "DeepSeek V3")])
def test_a_model_goes_all_the_way(name: str, save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(**FAMILIES[name], dtype=torch.float32)
    facts = freebits.lowrank(dense, tmp_path / "out", budget=0.7, allocate="uniform", **OPTIONS)
    assert facts["history"][-1]["transform"] == "lowrank"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"].startswith("lowrank_")
    assert len(config["low_ranks"]) >= 9  # of three blocks
    expected = logits(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            expanded(tmp_path / "out", dense)(torch.arange(40)[None]).logits, expected, atol=1e-3, rtol=1e-3
        )
    packed = freebits.pack(tmp_path / "out", tmp_path / "packed", entropy="none")
    assert packed["parameters"] == facts["parameters"]
    stored = sum(spec.numel for spec in PackedFolder(tmp_path / "packed").stored.values())
    assert stored < 0.9 * facts["parameters"]
    assert (logits(tmp_path / "packed") - expected).abs().max() < 1e-2 < expected.std()
    pivots = [n for n in PackedFolder(tmp_path / "packed").stored if n.endswith(".down.weight.pivots")]
    assert len(pivots) == len(config["low_ranks"])  # a pair that comes later does not undo those before
    freebits.unpack(tmp_path / "packed", tmp_path / "plain")
    assert Checkpoint(tmp_path / "plain").specs == Checkpoint(tmp_path / "out").specs
    assert (logits(tmp_path / "plain") - expected).abs().max() < 1e-2


def test_columns_of_the_identity_need_not_be_multiplied_by(save_tiny: Make, tmp_path: Path) -> None:
    freebits.lowrank(save_tiny(dtype=torch.float32), tmp_path / "out", **OPTIONS)
    freebits.pack(tmp_path / "out", tmp_path / "packed")
    plain, model = (freebits.load(tmp_path / "packed", keep_pivots=keep) for keep in (False, True))
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)
    ranks = plain.config.low_ranks.values()
    counts = [sum(of.numel() for of in one.parameters()) for one in (plain, model)]
    assert sum(rank**2 for rank in ranks) >= counts[0] - counts[1] > 0.6 * sum(rank**2 for rank in ranks)


def test_a_reduced_model_is_saved_and_loaded_by_the_library(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    freebits.lowrank(dense, tmp_path / "out", **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "out"))
    assert "freebits.models.low_rank" in (tmp_path / "again" / "modeling_freebits.py").read_text()


@pytest.mark.parametrize("order", ["slice first", "reduce first"])
@pytest.mark.parametrize("name", ["Llama 3", "OPT"])
def test_reducing_slicing_and_quantizing_compose(
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
def test_budgets_are_kept(allocate: str, save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    freebits.lowrank(dense, tmp_path / "out", budget=0.8, allocate=allocate, **OPTIONS)
    before, after = Checkpoint(dense), Checkpoint(tmp_path / "out")
    ranks = after.config["low_ranks"]
    blocks = {name.split(".")[2] for name in ranks}
    assert blocks == ({"2"} if allocate == "paper" else {"0", "1", "2"})
    matrices = [k.shape for n, k in before.specs.items() if n.startswith("model.layers") and len(k.shape) == 2]
    numbers_ = sum(n * m for n, m in matrices)
    shapes = {name: before.specs[f"{name}.weight"].shape for name in ranks}
    spared = sum(n * m - n_low_rank_weights(n, m, ranks[name]) for name, (n, m) in shapes.items())
    assert spared >= (0.19 if allocate != "paper" else 0.15) * numbers_


def test_a_target_size_is_kept(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    whole = sum(spec.n_bytes for spec in Checkpoint(dense).specs.values())
    target = int(0.85 * whole)
    freebits.lowrank(dense, tmp_path / "out", target_size=target, **OPTIONS)
    size = sum(spec.n_bytes for spec in Checkpoint(tmp_path / "out").specs.values())
    assert 0.97 * target < size <= target


def test_a_stopped_run_is_gone_on_with(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    freebits.lowrank(dense, tmp_path / "at once", **OPTIONS)

    calls: list[int] = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) in (2, 5, 9):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            freebits.lowrank(dense, tmp_path / "out", progress=stop, **OPTIONS)
    freebits.lowrank(dense, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "at once")


def test_the_cost_is_told(save_tiny: Make, tmp_path: Path, report: Callable[[str], None]) -> None:
    facts = freebits.lowrank(save_tiny(), tmp_path / "out", budget=0.9, **OPTIONS)
    assert facts["perplexity"]["dense"] > 1
    assert facts["perplexity"]["reduced"] > 1
    report(f"lowrank: perplexities {facts['perplexity']}")


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"budget": 1.0}, "`budget` is 1.0"),
        ({"budget": 0.7, "allocate": "paper"}, "`budget` is 0.7"),
        ({"blocks": "last:4"}, "`blocks` is 'last:4'"),
        ({"blocks": "first"}, "`blocks` is 'first'"),
        ({"target_size": 1000}, "`target_size` is 1000"),
        ({"target_size": 1000, "budget": 0.5}, "`budget` and `target_size`"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], finding: str, save_tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=finding):
        freebits.lowrank(save_tiny(), tmp_path / "out", **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_reduced_is_refused(save_tiny: Make, tmp_path: Path) -> None:
    freebits.lowrank(save_tiny(), tmp_path / "out", **OPTIONS)
    with pytest.raises(UnsupportedModelError, match="already has low-rank layers"):
        freebits.lowrank(tmp_path / "out", tmp_path / "twice", **OPTIONS)
    freebits.pack(tmp_path / "out", tmp_path / "packed")
    with pytest.raises(CheckpointError, match="is packed"):
        freebits.lowrank(tmp_path / "packed", tmp_path / "twice", **OPTIONS)
