"""The main job on a real model: what the README promises, with the figures printed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

import freebits
from freebits.checkpoint import Checkpoint
from freebits.coding import Coded, decode
from freebits.demo import PROMPT, generate
from freebits.packed import PackedCheckpoint, unpacked_tensors
from freebits.packed.format import SiteRecord
from tests.conftest import DemoRun

Report = Callable[[str], None]

pytestmark = pytest.mark.smollm2

THRESHOLD = 0.01


def test_packing_saves_three_and_a_half_points_beyond_slicing(demo_run: DemoRun, report: Report) -> None:
    sizes = freebits.inspect(demo_run.packed)["bytes"]
    points = 100 * (sizes["sliced"] - sizes["packed"]) / sizes["dense_untied"]
    on_disk = (demo_run.packed / name for name in ("model.safetensors", "config.json", "freebits.json"))
    assert sizes["packed"] == sum(file.stat().st_size for file in on_disk)
    report(f"saved {points:.3f} points of dense untied beyond slicing")
    assert points >= 3.5


def test_the_unpacked_model_is_as_good_as_the_sliced_one(demo_run: DemoRun, report: Report) -> None:
    verdict = freebits.verify(demo_run.packed, against=demo_run.sliced)
    ratio = verdict["perplexity"]["packed"] / verdict["perplexity"]["reference"]
    report(f"perplexity ratio {ratio:.5f}, mean KL {verdict['mean_kl']:.2e} nats per token")
    assert verdict["ok"]
    assert ratio <= 1.01
    assert verdict["mean_kl"] < 0.01


def test_it_writes_a_sentence(demo_run: DemoRun) -> None:
    sentence = generate(demo_run.unpacked, PROMPT)
    assert sentence.startswith(PROMPT)
    assert len(re.findall(r"[a-z]{3,}", sentence.removeprefix(PROMPT))) >= 5


def test_every_word_is_within_the_threshold_and_every_corrected_word_exact(
    demo_run: DemoRun, tmp_path: Path, report: Report
) -> None:
    packed = PackedCheckpoint(demo_run.packed)
    assert {site.codec for site in packed.manifest.sites} == {"bits-back"}
    freebits.pack(demo_run.sliced, tmp_path / "true", threshold=0)  # no site gains: all are rotated and stored plain
    true = Checkpoint(tmp_path / "true")
    n_corrected = n_other = 0
    for site in packed.manifest.sites:
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
    parts = {part: packed.read(name) for part, name in site.parts.items() if part != "corrections"}
    bare = Coded(**parts | {"matrix": parts["matrix"].T, "corrections": torch.empty(0, dtype=torch.uint8)})
    assert site.output is not None
    name, (n_columns, _) = site.output
    message, matrix = decode(bare, n_columns)
    lengths = [prod(shape) for _, shape in site.message]
    words = zip(site.message, message.split_with_sizes(lengths), strict=True)
    return {n: part.reshape(shape) for (n, shape), part in words} | {name: matrix.T}


MACHINES = {
    "one thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    "default kernels": {"ATEN_CPU_CAPABILITY": "default"},
    "compatible kernels": {"MKL_CBWR": "COMPATIBLE"},
}


def decoded_elsewhere(packed: Path, out: Path, environment: dict[str, str]) -> dict[str, Tensor]:
    command = [sys.executable, "-m", "freebits.cli", "unpack", str(packed), str(out), "--jobs", "1"]
    subprocess.run(command, env=os.environ | environment, check=True)
    return dict(Checkpoint(out).items())


def test_other_threads_and_kernels_decode_the_same_words(demo_run: DemoRun, tmp_path: Path, report: Report) -> None:
    reference = dict(unpacked_tensors(demo_run.packed))
    n_words = sum(tensor.numel() for tensor in reference.values())
    for number, (machine, environment) in enumerate(MACHINES.items()):
        decoded = decoded_elsewhere(demo_run.packed, tmp_path / str(number), environment)
        assert decoded.keys() == reference.keys()
        differences = [(decoded[name].double() - reference[name].double()).abs() for name in reference]
        n_different = sum(int((difference > 0).sum()) for difference in differences)
        largest = max(difference.max().item() for difference in differences)
        report(f"{machine}: {n_different} of {n_words} words differ, by at most {largest:.1e}")
        assert largest <= THRESHOLD
        assert n_different <= n_words // 10_000
