"""Commands can be stopped and resumed, and their work can run on Ray."""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import freebits
from freebits import Parallel
from freebits.cli.main import main
from freebits.codecs.rotation_values import canonical_direction
from freebits.execution.executor import threads
from freebits.execution.serialization import read, save
from freebits.execution.work_store import Work, WorkStore
from freebits.transforms.polar import PolarForm
from tests.tiny import Make, random_text

TEXT = random_text(600)
SLICE: dict[str, Any] = {"sparsity": 0.25, "calibration": TEXT, "samples": 8, "seq_len": 32, "force": True}
QUANTIZE: dict[str, Any] = {"target_kl": 0.01, "calibration": TEXT, "samples": 8, "seq_len": 32}
Command = Callable[..., Any]


@pytest.fixture
def dense(save_tiny: Make) -> Path:
    return save_tiny(num_hidden_layers=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def commands(dense: Path, sliced: Path) -> dict[str, tuple[Command, Path, dict[str, Any]]]:
    """Return name of a command → its function, its model, and its options."""
    return {
        "slice": (freebits.slice_model, dense, SLICE),
        "canonical": (freebits.pack, sliced, {"codec": "canonical"}),
        "bits-back": (freebits.pack, sliced, {"codec": "bits-back"}),
        "none": (freebits.pack, dense, {"codec": "none"}),
        "quantize": (freebits.quantize, dense, QUANTIZE),
        "lowrank": (freebits.lowrank, dense, {"calibration": TEXT, "samples": 8, "seq_len": 32}),
    }


simple_values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
tensors = st.lists(st.integers(0, 200), max_size=4).map(lambda values: torch.tensor(values, dtype=torch.uint8))
trees = st.recursive(
    simple_values | tensors,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=8,
)


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return type(left) is type(right) and bool(left == right)


@settings(max_examples=60, deadline=None)
@given(value=trees)
def test_a_saved_value_is_read_unchanged(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("saved") / "value"
    save(path, value)
    assert equal(read(path), value)


def test_dataclasses_and_views_are_read_unchanged_and_damage_is_noticed(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    form = PolarForm(matrix.T, None)
    save(tmp_path / "a", {3: (form, matrix, matrix[1:]), "same": [matrix]})
    value = read(tmp_path / "a")
    assert torch.equal(value[3][0].rotation, matrix.T)
    assert torch.equal(value[3][2], matrix[1:])
    content = bytearray((tmp_path / "a").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "a"))):
        read(tmp_path / "a")
    with pytest.raises(TypeError, match=r"class 'object'"):
        save(tmp_path / "b", object())
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def stop_after(n_pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run when it has stored `n_pieces` pieces, as Ctrl-C would."""
    n_stored, put = 0, WorkStore.put

    def put_and_stop(store: WorkStore, key: str, value: Any) -> None:
        nonlocal n_stored
        put(store, key, value)
        n_stored += 1
        if n_stored == n_pieces:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkStore, "put", put_and_stop)


@pytest.mark.parametrize("command", ["slice", "canonical", "bits-back", "quantize"])
def test_a_stopped_run_is_resumed_and_leaves_no_staging_directory(
    command: str, dense: Path, slice_tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, model, options = commands(dense, slice_tiny(dense, force=True))[command]
    run(model, tmp_path / "uninterrupted", **options)
    expected, before = contents(tmp_path / "uninterrupted"), {file.name for file in tmp_path.iterdir()}
    stops = 0
    with pytest.MonkeyPatch.context() as patch:
        for n_pieces in (1, 2, 3, 5, 8, 4):
            patch.undo()
            if (tmp_path / "out").exists():
                break
            stop_after(n_pieces, patch)
            try:
                run(model, tmp_path / "out", **options)
            except KeyboardInterrupt:
                stops += 1
    if not (tmp_path / "out").exists():
        run(model, tmp_path / "out", **options)
    assert stops >= 2
    assert "resuming" in caplog.text
    assert contents(tmp_path / "out") == expected
    assert {file.name for file in tmp_path.iterdir()} == before | {"out"}


@pytest.mark.parametrize("command", ["slice", "quantize", "lowrank"])
def test_a_run_is_resumed_wherever_it_was_stopped(command: str, save_tiny: Make, tmp_path: Path) -> None:
    deep = save_tiny(num_hidden_layers=6)  # deep enough that pieces of finished blocks are deleted
    run, model, options = commands(deep, deep)[command]
    run(model, tmp_path / "uninterrupted", **options)
    stops = 0
    while not (tmp_path / "out").exists():
        with pytest.MonkeyPatch.context() as patch:
            stop_after(5, patch)
            try:
                run(model, tmp_path / "out", **options)
            except KeyboardInterrupt:
                stops += 1
    assert 3 < stops < 80  # only few pieces are computed twice
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def test_a_run_with_other_arguments_starts_again(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(dense, force=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(4, patch)
        freebits.pack(sliced, tmp_path / "out")
    [staging] = tmp_path.glob(".out*")
    freebits.pack(sliced, tmp_path / "out", codec="bits-back")
    freebits.pack(sliced, tmp_path / "other", codec="bits-back")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    assert not staging.exists()


def test_finished_pieces_are_not_computed_again(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(dense, force=True)
    calls: list[int] = []

    def count_call(A: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return canonical_direction(A)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("freebits.transforms.diagonal.canonical_direction", count_call)
        stop_after(6, patch)
        freebits.pack(sliced, tmp_path / "out", codec="bits-back", parallel=Parallel(jobs=1))
    n_before = len(calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("freebits.transforms.diagonal.canonical_direction", count_call)
        freebits.pack(sliced, tmp_path / "out", codec="bits-back", parallel=Parallel(jobs=1))
    assert n_before > 0
    assert len(calls) == 8  # one per sublayer


KILLED_PROGRAM = """
import os, signal, sys
from freebits.cli.main import main
from freebits.execution.work_store import WorkStore

n_pieces, n_stored, put = int(sys.argv[1]), 0, WorkStore.put

def put_or_die(store, key, value):
    global n_stored
    n_stored += 1
    if n_stored == n_pieces:
        os.kill(os.getpid(), signal.SIGKILL)
    put(store, key, value)

WorkStore.put = put_or_die
main(sys.argv[2:])
"""


@pytest.mark.parametrize("name", ["slice", "quantize"])
def test_a_killed_process_is_resumed(name: str, dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    options = {"slice": ["--sparsity", "0.25", "--force"], "quantize": ["--target-kl", "0.01"]}[name]

    def command(out: str) -> list[str]:
        calibration = ["--calibration", str(text), "--samples", "8", "--seq-len", "32"]
        return [name, str(dense), str(tmp_path / out), *calibration, *options]

    assert main(command("uninterrupted")) == 0
    for n_pieces in (3, 5):
        killed = subprocess.run([sys.executable, "-c", KILLED_PROGRAM, str(n_pieces), *command("out")], check=False)
        assert killed.returncode == -signal.SIGKILL
    assert main(command("out")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")
    assert not [*tmp_path.glob(".out*")]


def test_a_missing_cluster_is_refused() -> None:  # this test must run before the tests that start a cluster
    with (
        pytest.raises(freebits.UsageError, match=r"127\.0\.0\.1:1 "),
        Parallel(backend="ray", address="127.0.0.1:1").executor(),
    ):
        pass


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("command", ["slice", "canonical", "bits-back", "none", "quantize", "lowrank"])
def test_ray_writes_the_same_files_as_threads(command: str, dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    run, model, options = commands(dense, slice_tiny(dense, force=True))[command]
    run(model, tmp_path / "threads", **options)
    run(model, tmp_path / "ray", parallel=Parallel(backend="ray"), **options)
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


@pytest.mark.usefixtures("ray")
def test_ray_resumes_a_run_that_threads_began(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(dense, force=True)
    freebits.pack(sliced, tmp_path / "uninterrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(4, patch)
        freebits.pack(sliced, tmp_path / "out")
    freebits.pack(sliced, tmp_path / "out", parallel=Parallel(backend="ray"))
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


@pytest.mark.usefixtures("ray")
def test_ray_unpacks_the_same_files_as_threads(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    freebits.pack(slice_tiny(dense, force=True), tmp_path / "packed")
    freebits.unpack(tmp_path / "packed", tmp_path / "threads")
    freebits.unpack(tmp_path / "packed", tmp_path / "ray", parallel=Parallel(backend="ray"))
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


@pytest.mark.usefixtures("ray")
def test_another_worker_runs_the_piece_of_a_worker_that_died(tmp_path: Path) -> None:
    def square(item: int) -> int:
        mark = tmp_path / str(item)
        if item % 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item**2

    with Parallel(backend="ray").executor() as executor:
        assert list(executor.map(square, range(4))) == [0, 1, 4, 9]


def test_a_piece_runs_again_only_if_its_result_is_damaged(tmp_path: Path) -> None:
    runs: list[int] = []

    def square(item: int) -> int:
        runs.append(item)
        return item**2

    with threads(2) as executor:
        work = Work(executor, WorkStore(tmp_path))
        for _ in range(2):
            assert list(work.map("squares", square, range(4))) == [0, 1, 4, 9]
            assert work.once("one", lambda: square(5)) == 25
        assert sorted(runs) == [0, 1, 2, 3, 5]
        assert work.has("one")
        [damaged] = tmp_path.glob("squares-2.*")
        damaged.write_bytes(b"damaged")
        assert list(work.map("squares", square, range(4))) == [0, 1, 4, 9]
        assert runs[-1] == 2
        work.drop("squares", "one")
        assert not work.has("one")
        assert not [*tmp_path.iterdir()]


def test_work_without_a_store_keeps_no_results() -> None:
    with threads(1) as executor:
        work = Work(executor)
        assert list(work.map("squares", lambda item: item**2, range(4))) == [0, 1, 4, 9]
        assert work.once("one", lambda: 1) == 1
        assert not work.has("one")
        work.drop("one")
        with pytest.raises(LookupError):
            _ = work.store


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"backend": "slurm"}, "slurm"),
        ({"jobs": 0}, "jobs"),
    ],
)
def test_invalid_parallel_options_are_refused(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(freebits.UsageError, match=fact):
        Parallel(**options)
