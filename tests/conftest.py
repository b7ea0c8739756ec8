"""Fixtures: copies of tiny random models, and a SmolLM2 that is sliced, packed and unpacked once per test run."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # because spinning threads slow each other down on a busy machine
if "PYTEST_XDIST_WORKER" in os.environ:  # test processes and their children use one core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
import transformers

import freebits
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text
from tests.tiny import Make, random_text, tiny_model, tiny_tokenizer

transformers.logging.disable_progress_bar()
hypothesis.settings.register_profile("untimed", deadline=None)  # compiling a function takes seconds
hypothesis.settings.load_profile("untimed")

SLOW_FILES = ("test_smollm2", "test_smollm2_quantized", "test_work", "test_packed", "test_huggingface", "test_attacks")
Build = Callable[[Path], object]


@pytest.fixture(scope="session")
def cached_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[object, Build], Path]:
    """Return a function that returns the folder for a key, built at the first call. To change the folder, copy it."""
    parent = tmp_path_factory.mktemp("cached")
    folders: dict[str, Path] = {}

    def get(key: object, build: Build) -> Path:
        if repr(key) not in folders:
            folder = parent / str(len(folders))
            build(folder)
            folders[repr(key)] = folder
        return folders[repr(key)]

    return get


def content(folder: Path) -> str:
    """Return a digest of the names and contents of the files in a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(bytes(file.relative_to(folder)) + file.read_bytes() for file in files)).hexdigest()


@pytest.fixture
def save_tiny(tmp_path: Path, cached_folder: Callable[[object, Build], Path]) -> Make:
    """Return a function that saves a tiny dense model with a tokenizer of words, and returns its folder."""

    def save(name: str = "dense", dtype: torch.dtype = torch.float16, shard: str = "1GB", **changes: Any) -> Path:
        def build(folder: Path) -> None:
            tiny_model(dtype=dtype, **changes).save_pretrained(folder, max_shard_size=shard)
            tiny_tokenizer().save_pretrained(folder)

        shutil.copytree(cached_folder(("dense", dtype, shard, sorted(changes.items())), build), tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def slice_tiny(tmp_path: Path, cached_folder: Callable[[object, Build], Path]) -> Make:
    """Return a function that slices a tiny dense model and returns the sliced folder."""

    def slice_(dense: Path, name: str = "sliced", sparsity: float = 0.25, **changes: Any) -> Path:
        options: dict[str, Any] = {"calibration": random_text(600), "samples": 8, "seq_len": 32} | changes
        sliced = cached_folder(
            ("sliced", content(dense), sparsity, sorted(options.items())),
            lambda folder: freebits.slice_model(dense, folder, sparsity=sparsity, **options),
        )
        shutil.copytree(sliced, tmp_path / name)
        return tmp_path / name

    return slice_


@pytest.fixture
def pack_tiny(tmp_path: Path, cached_folder: Callable[[object, Build], Path]) -> Make:
    """Return a function that packs a tiny model and returns the packed folder."""

    def pack(model: Path, name: str = "packed", **options: Any) -> Path:
        packed = cached_folder(
            ("packed", content(model), sorted(options.items())), lambda folder: freebits.pack(model, folder, **options)
        )
        shutil.copytree(packed, tmp_path / name)
        return tmp_path / name

    return pack


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Return a function that shows a measured figure at the end of the test run, whether the test passes or not."""
    return lambda figure: record_property("measured", figure)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    for name, figure in (item for report in reports for item in report.user_properties):
        terminalreporter.write_line(f"{name}: {figure}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the files that take longest to the front, because each file runs in one process."""
    items.sort(key=lambda item: SLOW_FILES.index(item.path.stem) if item.path.stem in SLOW_FILES else len(SLOW_FILES))


@dataclass(frozen=True)
class DemoRun:
    """Folders of SmolLM2 in float16: dense, sliced by 20 %, packed with two codecs, and unpacked."""

    dense: Path
    sliced: Path
    bits_back: Path
    canonical: Path
    unpacked: Path


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """Slice, pack and unpack SmolLM2 once per test run."""
    folder = tmp_path_factory.mktemp("demo")
    run = DemoRun(demo_model(), *(folder / name for name in ("sliced", "bits-back", "canonical", "unpacked")))
    freebits.slice_model(run.dense, run.sliced, sparsity=0.2, calibration=embedded_text()[0], samples=16)
    freebits.pack(run.sliced, run.bits_back, codec="bits-back", entropy="none", threshold=0.01)
    freebits.pack(run.sliced, run.canonical, entropy="none")
    freebits.unpack(run.canonical, run.unpacked)
    return run
