"""The main job on a real model: what the README promises, with the figures printed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import freebits
from freebits.checkpoint import Checkpoint
from freebits.demo import PROMPT, generate
from freebits.packed import PackedCheckpoint, open_packed
from freebits.packed.format import SiteRecord
from freebits.packed.sites.codecs import SITE_CODECS
from tests.conftest import DemoRun

Report = Callable[[str], None]

pytestmark = pytest.mark.smollm2

THRESHOLD = 0.01


def saved(packed: Path) -> float:
    """Points of the dense untied size saved beyond slicing, every file counted."""
    sizes = freebits.inspect(packed)["bytes"]
    on_disk = (packed / name for name in ("model.safetensors", "config.json", "freebits.json"))
    assert sizes["packed"] == sum(file.stat().st_size for file in on_disk)
    return 100 * (sizes["sliced"] - sizes["packed"]) / sizes["dense_untied"]


def test_bits_back_saves_three_and_a_half_points_beyond_slicing(demo_run: DemoRun, report: Report) -> None:
    points = saved(demo_run.bits_back)
    report(f"bits-back: saved {points:.3f} points of dense untied beyond slicing")
    assert points >= 3.5


def test_canonical_saves_more_and_is_smaller_than_the_file_one_had(demo_run: DemoRun, report: Report) -> None:
    points = saved(demo_run.canonical)
    sizes = freebits.inspect(demo_run.canonical)["bytes"]
    smaller = 100 * (1 - sizes["packed"] / sizes["dense"])
    report(f"canonical: saved {points:.3f} points beyond slicing; {smaller:.2f} % smaller than the dense file")
    assert points >= 5.8
    assert smaller >= 13.5


def test_the_bits_back_model_is_as_good_as_the_sliced_one(demo_run: DemoRun, report: Report) -> None:
    verdict = freebits.verify(demo_run.bits_back, against=demo_run.sliced)
    ratio = verdict["perplexity"]["packed"] / verdict["perplexity"]["reference"]
    report(f"bits-back: perplexity ratio {ratio:.5f}, mean KL {verdict['mean_kl']:.2e} nats per token")
    assert verdict["ok"]
    assert ratio <= 1.01
    assert verdict["mean_kl"] < 0.01


def test_the_canonical_model_is_the_sliced_one(demo_run: DemoRun, report: Report) -> None:
    verdict = freebits.verify(demo_run.canonical, against=demo_run.sliced)
    ratio = verdict["perplexity"]["packed"] / verdict["perplexity"]["reference"]
    difference = verdict["max_abs_logit_diff"]
    report(f"canonical: perplexity ratio {ratio:.5f}, mean KL {verdict['mean_kl']:.2e}, max |Δlogit| {difference:.3f}")
    assert abs(ratio - 1) <= 1e-3
    assert verdict["mean_kl"] < 1e-4


def test_it_writes_a_sentence(demo_run: DemoRun) -> None:
    sentence = generate(demo_run.unpacked, PROMPT)
    assert sentence.startswith(PROMPT)
    assert len(re.findall(r"[a-z]{3,}", sentence.removeprefix(PROMPT))) >= 5


def test_every_word_is_within_the_threshold_and_every_corrected_word_exact(
    demo_run: DemoRun, tmp_path: Path, report: Report
) -> None:
    packed = PackedCheckpoint(demo_run.bits_back)
    *coded, last = packed.manifest.sites
    assert {site.codec for site in coded} == {"bits-back"}
    assert last.reason == "the tied head pins it"
    freebits.pack(
        demo_run.sliced, tmp_path / "true", codec="bits-back", entropy="none", threshold=0
    )  # no site gains: all are plain
    true = Checkpoint(tmp_path / "true")
    n_corrected = n_other = 0
    for site in coded:
        decoded, uncorrected = packed.decode_site(site), _without_corrections(packed, site)
        for name, tensor in decoded.items():
            error = (tensor.double() - true[name].double()).abs()
            off = (uncorrected[name].double() - true[name].double()).abs() > THRESHOLD
            assert error.max() <= THRESHOLD
            assert torch.equal(tensor[off], true[name][off])
            n_corrected += int(off.sum())
            n_other += int((error > 0).sum())
    assert n_corrected == sum(site.corrections for site in packed.manifest.sites) > 0
    report(f"{n_corrected} words corrected exactly; {n_other} others differ, none by more than {THRESHOLD}")


def _without_corrections(packed: PackedCheckpoint, site: SiteRecord) -> dict[str, Tensor]:
    parts = {part: packed.read(name) for part, name in packed.parts(site).items() if part != "corrections"}
    return SITE_CODECS[site.codec].decode(site, parts)


MACHINES = {
    "one thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    "default kernels": {"ATEN_CPU_CAPABILITY": "default"},
    "compatible kernels": {"MKL_CBWR": "COMPATIBLE"},
}


def elsewhere(environment: dict[str, str], verb: str, source: Path, out: Path, *options: str) -> dict[str, Tensor]:
    command = [sys.executable, "-m", "freebits.cli", verb, str(source), str(out), "--jobs", "1", *options]
    subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
    return dict(Checkpoint(out).items())


def test_other_threads_and_kernels_decode_the_same_words(demo_run: DemoRun, tmp_path: Path, report: Report) -> None:
    reference = dict(open_packed(demo_run.bits_back).tensors())
    n_words = sum(tensor.numel() for tensor in reference.values())
    for number, (machine, environment) in enumerate(MACHINES.items()):
        decoded = elsewhere(environment, "unpack", demo_run.bits_back, tmp_path / str(number))
        assert decoded.keys() == reference.keys()
        differences = [(decoded[name].double() - reference[name].double()).abs() for name in reference]
        n_different = sum(int((difference > 0).sum()) for difference in differences)
        largest = max(difference.max().item() for difference in differences)
        report(f"bits-back, {machine}: {n_different} of {n_words} words differ, by at most {largest:.1e}")
        assert largest <= THRESHOLD
        assert n_different <= n_words // 10_000


def test_other_threads_and_kernels_pack_the_same_canonical_words(
    demo_run: DemoRun, tmp_path: Path, report: Report
) -> None:
    reference = dict(Checkpoint(demo_run.canonical).items())
    n_words = sum(tensor.numel() for tensor in reference.values())
    for number, (machine, environment) in enumerate(MACHINES.items()):
        packed = elsewhere(environment, "pack", demo_run.sliced, tmp_path / str(number), "--entropy", "none")
        assert packed.keys() == reference.keys()
        n_different = 0
        for name, expected in reference.items():
            assert packed[name].shape == expected.shape
            larger = torch.maximum(packed[name].double().abs(), expected.double().abs())
            rounding = (larger * torch.finfo(torch.float16).eps).clamp(min=2**-24)  # the spacing of float16
            difference = (packed[name].double() - expected.double()).abs()
            assert (difference <= rounding).all(), name
            n_different += int((difference > 0).sum())
        report(f"canonical, {machine}: {n_different} of {n_words} words differ, each by one rounding")
        assert n_different <= n_words // 100_000
