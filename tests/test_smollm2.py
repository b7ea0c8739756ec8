"""A real model reaches the figures in the README; the tests report the measured figures."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import freebits
from examples.demo import PROMPT, generate
from freebits.codecs import bits_back as bitsback
from freebits.codecs.registry import CODES
from freebits.packed.reader import PackedFolder
from freebits.packed.recipe import Recipe
from tests.conftest import DemoRun
from tests.tiny import tensors_of

Report = Callable[[str], None]

pytestmark = pytest.mark.smollm2

THRESHOLD = 0.01


def saved_points(packed: Path) -> float:
    """Return how much packing saves after slicing, with all files counted, in percent of the dense untied size."""
    sizes = freebits.inspect(packed)["bytes"]
    on_disk = (packed / name for name in ("packed.safetensors", "config.json", "freebits.json"))
    assert sizes["packed"] == sum(file.stat().st_size for file in on_disk)
    return 100 * (sizes["sliced"] - sizes["packed"]) / sizes["dense_untied"]


def test_slicing_raises_perplexity_by_less_than_half(demo_run: DemoRun, report: Report) -> None:
    perplexity = freebits.evaluate(demo_run.sliced, limit=2)["perplexity"]
    [step] = freebits.inspect(demo_run.sliced)["history"]
    measured = step["perplexity"]
    report(f"sliced: perplexity {perplexity:.3f} on held-out topics; {measured} on held-out windows")
    assert perplexity < 26
    assert 1 < measured["sliced"] / measured["dense"] < 1.5


def test_bits_back_saves_three_and_a_half_points_beyond_slicing(demo_run: DemoRun, report: Report) -> None:
    points = saved_points(demo_run.bits_back)
    report(f"bits-back: saved {points:.3f} points of dense untied beyond slicing")
    assert points >= 3.5


def test_canonical_saves_more_and_is_smaller_than_the_dense_file(demo_run: DemoRun, report: Report) -> None:
    points = saved_points(demo_run.canonical)
    sizes = freebits.inspect(demo_run.canonical)["bytes"]
    reduction = 100 * (1 - sizes["packed"] / sizes["dense"])
    report(f"canonical: saved {points:.3f} points beyond slicing; {reduction:.2f} % smaller than the dense file")
    assert points >= 5.8
    assert reduction >= 13.5


def test_the_bits_back_model_predicts_nearly_as_the_sliced_one(demo_run: DemoRun, report: Report) -> None:
    result = freebits.verify(demo_run.bits_back, against=demo_run.sliced, limit=1)
    ratio = result["perplexity"]["packed"] / result["perplexity"]["reference"]
    report(f"bits-back: perplexity ratio {ratio:.5f}, mean KL {result['mean_kl']:.2e} nats per token")
    assert result["ok"]
    assert ratio <= 1.01
    assert result["mean_kl"] < 0.01


def test_the_canonical_model_predicts_as_the_sliced_one(demo_run: DemoRun, report: Report) -> None:
    result = freebits.verify(demo_run.canonical, against=demo_run.sliced, limit=1)
    ratio = result["perplexity"]["packed"] / result["perplexity"]["reference"]
    difference = result["max_abs_logit_diff"]
    report(f"canonical: perplexity ratio {ratio:.5f}, mean KL {result['mean_kl']:.2e}, max |Δlogit| {difference:.3f}")
    assert abs(ratio - 1) <= 1e-3
    assert result["mean_kl"] < 1e-4


def test_the_unpacked_model_writes_a_sentence(demo_run: DemoRun) -> None:
    sentence = generate(demo_run.unpacked, PROMPT)
    assert sentence.startswith(PROMPT)
    assert len(re.findall(r"[a-z]{3,}", sentence.removeprefix(PROMPT))) >= 5


def test_every_value_is_within_the_threshold_and_every_corrected_value_exact(
    demo_run: DemoRun, tmp_path: Path, report: Report
) -> None:
    packed = PackedFolder(demo_run.bits_back)
    notes = packed.manifest.notes
    assert [note["reason"] for note in notes if "code" not in note] == [
        "no output matrix writes to it",
        "the tied head fixes its basis",
    ]
    # With threshold 0 no site becomes smaller, so all sites are stored unchanged.
    freebits.pack(demo_run.sliced, tmp_path / "exact", codec="bits-back", entropy="none", threshold=0)
    exact = PackedFolder(tmp_path / "exact")
    assert not exact.manifest.recipes
    n_corrected = n_other = 0
    for recipe in packed.manifest.recipes:
        uncorrected = _without_corrections(packed, recipe)
        for name, tensor in next(packed.decoded(recipe.makes)).items():
            error = (tensor.double() - exact[name].double()).abs()
            wrong = (uncorrected[name].double() - exact[name].double()).abs() > THRESHOLD
            assert error.max() <= THRESHOLD
            assert torch.equal(tensor[wrong], exact[name][wrong])
            n_corrected += int(wrong.sum())
            n_other += int((error > 0).sum())
    assert n_corrected == sum(note.get("corrections", 0) for note in notes) > 0
    report(f"{n_corrected} values corrected exactly; {n_other} others differ, none by more than {THRESHOLD}")


def _without_corrections(packed: PackedFolder, recipe: Recipe) -> dict[str, Tensor]:
    stored = load_file(packed.path / "packed.safetensors")
    parts = {part: stored[name] for part, name in recipe.takes.items() if part != "corrections"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsback, "check_sums", lambda *_: None)  # the sums are those of the corrected values
        tensors = CODES[recipe.code].decode(parts, list(recipe.makes.values()), recipe.params)
    return dict(zip(recipe.makes, tensors, strict=True))


ENVIRONMENT = {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
"""Environment variables of a process with two threads and with other kernels."""
PROGRAM = """
import sys, torch, freebits

options = {"entropy": "none"} if sys.argv[1] == "pack" else {}
getattr(freebits, sys.argv[1])(sys.argv[2], sys.argv[3], parallel=freebits.Parallel(jobs=1), **options)
print(torch.get_num_threads())
"""


def run_in_environment(command: str, source: Path, out: Path) -> dict[str, Tensor]:
    """Run a command in a process with other threads and kernels, and return the tensors that the process writes."""
    program = [sys.executable, "-c", PROGRAM, command, str(source), str(out)]
    result = subprocess.run(program, env=os.environ | ENVIRONMENT, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == ENVIRONMENT["OMP_NUM_THREADS"]
    return load_file(out / ("packed.safetensors" if command == "pack" else "model.safetensors"))


def test_other_threads_and_kernels_decode_nearly_the_same_values(
    demo_run: DemoRun, tmp_path: Path, report: Report
) -> None:
    reference = tensors_of(demo_run.bits_back)
    n_values = sum(tensor.numel() for tensor in reference.values())
    decoded = run_in_environment("unpack", demo_run.bits_back, tmp_path / "unpacked")
    assert decoded.keys() == reference.keys()
    differences = [(decoded[name].double() - reference[name].double()).abs() for name in reference]
    n_different = sum(int((difference > 0).sum()) for difference in differences)
    largest = max(difference.max().item() for difference in differences)
    report(f"bits-back: {n_different} of {n_values} values differ, by at most {largest:.1e}")
    assert largest <= THRESHOLD
    assert n_different <= n_values // 10_000


def test_other_threads_and_kernels_pack_nearly_the_same_canonical_values(
    demo_run: DemoRun, tmp_path: Path, report: Report
) -> None:
    reference = load_file(demo_run.canonical / "packed.safetensors")
    n_values = sum(tensor.numel() for tensor in reference.values())
    packed = run_in_environment("pack", demo_run.sliced, tmp_path / "packed")
    assert packed.keys() == reference.keys()
    n_different = 0
    for name, expected in reference.items():
        assert packed[name].shape == expected.shape
        larger = torch.maximum(packed[name].double().abs(), expected.double().abs())
        rounding = (larger * torch.finfo(torch.float16).eps).clamp(min=2**-24)  # the spacing of float16
        difference = (packed[name].double() - expected.double()).abs()
        assert (difference <= rounding).all(), name
        n_different += int((difference > 0).sum())
    report(f"canonical: {n_different} of {n_values} values differ, each by one rounding")
    assert n_different <= n_values // 100_000
