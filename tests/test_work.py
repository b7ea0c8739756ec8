"""Commands that are stopped and resumed, and work that runs on Ray."""

import logging
import os
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
    return {
        "slice": (freebits.slice_model, dense, SLICE),
        "canonical": (freebits.pack, sliced, {"codec": "canonical"}),
        "bits-back": (freebits.pack, sliced, {"codec": "bits-back"}),
        "none": (freebits.pack, dense, {"codec": "none"}),
        "quantize": (freebits.quantize, dense, QUANTIZE),
        "lowrank": (freebits.lowrank, dense, {"calibration": TEXT, "samples": 8, "seq_len": 32}),
    }


plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
tensors = st.lists(st.integers(0, 200), max_size=4).map(lambda values: torch.tensor(values, dtype=torch.uint8))
trees = st.recursive(
    plain | tensors,
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
def test_a_value_comes_back_from_its_file(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("saved") / "value"
    save(path, value)
    assert equal(read(path), value)


def test_classes_and_views_come_back_and_damage_is_noticed(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    form = PolarForm(whole.T, None)
    save(tmp_path / "a", {3: (form, whole, whole[1:]), "same": [whole]})
    back = read(tmp_path / "a")
    assert torch.equal(back[3][0].rotation, whole.T)
    assert torch.equal(back[3][2], whole[1:])
    content = bytearray((tmp_path / "a").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "a")
    with pytest.raises(TypeError, match=r"object.*storable"):
        save(tmp_path / "b", object())
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def stop_after(n_pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run once it has stored so many pieces, as Ctrl-C would."""
    left, put = n_pieces, WorkStore.put

    def counted(store: WorkStore, key: str, value: Any) -> None:
        nonlocal left
        put(store, key, value)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkStore, "put", counted)


@pytest.mark.parametrize("command", ["slice", "canonical", "bits-back", "quantize"])
def test_a_stopped_run_is_resumed(
    command: str, dense: Path, slice_tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, model, options = commands(dense, slice_tiny(dense, force=True))[command]
    run(model, tmp_path / "at once", **options)
    expected, before = contents(tmp_path / "at once"), {file.name for file in tmp_path.iterdir()}
    stops = 0
    with pytest.MonkeyPatch.context() as patch:
        for after in (1, 2, 3, 5, 8, 4):
            patch.undo()
            if (tmp_path / "out").exists():
                break
            stop_after(after, patch)
            try:
                run(model, tmp_path / "out", **options)
            except KeyboardInterrupt:
                stops += 1
    if not (tmp_path / "out").exists():
        run(model, tmp_path / "out", **options)
    assert stops >= 2
    assert "resuming the stopped run" in caplog.text
    assert contents(tmp_path / "out") == expected
    assert {file.name for file in tmp_path.iterdir()} == before | {"out"}


@pytest.mark.parametrize("command", ["slice", "quantize", "lowrank"])
def test_a_run_is_resumed_wherever_it_was_stopped(command: str, save_tiny: Make, tmp_path: Path) -> None:
    deep = save_tiny(num_hidden_layers=6)  # pieces of blocks that are finished are dropped on the way
    run, model, options = commands(deep, deep)[command]
    run(model, tmp_path / "at once", **options)
    stops = 0
    while not (tmp_path / "out").exists():
        with pytest.MonkeyPatch.context() as patch:
            stop_after(5, patch)
            try:
                run(model, tmp_path / "out", **options)
            except KeyboardInterrupt:
                stops += 1
    assert 3 < stops < 80  # few pieces are computed twice
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


def test_other_arguments_start_afresh(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
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
    made: list[int] = []

    def counted(A: torch.Tensor) -> torch.Tensor:
        made.append(1)
        return canonical_direction(A)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("freebits.transforms.diagonal.canonical_direction", counted)
        stop_after(6, patch)
        freebits.pack(sliced, tmp_path / "out", codec="bits-back", parallel=Parallel(jobs=1))
    before = len(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("freebits.transforms.diagonal.canonical_direction", counted)
        freebits.pack(sliced, tmp_path / "out", codec="bits-back", parallel=Parallel(jobs=1))
    assert before > 0
    assert len(made) == 8  # one a sublayer


KILLED = """
import os, signal, sys
from freebits.cli.main import main
from freebits.execution.work_store import WorkStore

left, put = int(sys.argv[1]), WorkStore.put

def counted(store, key, value):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    put(store, key, value)

WorkStore.put = counted
main(sys.argv[2:])
"""


@pytest.mark.parametrize("name", ["slice", "quantize"])
def test_a_killed_process_is_resumed(name: str, dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    options = {"slice": ["--sparsity", "0.25", "--force"], "quantize": ["--target-kl", "0.01"]}[name]

    def command(out: str) -> list[str]:
        given = ["--calibration", str(text), "--samples", "8", "--seq-len", "32", *options]
        return [name, str(dense), str(tmp_path / out), *given]

    assert main(command("at once")) == 0
    for pieces in (3, 5):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(pieces), *command("out")], check=False)
        assert killed.returncode == -signal.SIGKILL
    assert main(command("out")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    assert not [*tmp_path.glob(".out*")]


def test_a_cluster_that_is_not_there_is_refused_at_once() -> None:  # before the tests that start one
    with (
        pytest.raises(freebits.UsageError, match=r"no Ray cluster at 127\.0\.0\.1:1 "),
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
def test_ray_writes_what_threads_write(command: str, dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    run, model, options = commands(dense, slice_tiny(dense, force=True))[command]
    run(model, tmp_path / "threads", **options)
    run(model, tmp_path / "ray", parallel=Parallel(backend="ray"), **options)
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


@pytest.mark.usefixtures("ray")
def test_ray_resumes_what_threads_began(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(dense, force=True)
    freebits.pack(sliced, tmp_path / "at once")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(4, patch)
        freebits.pack(sliced, tmp_path / "out")
    freebits.pack(sliced, tmp_path / "out", parallel=Parallel(backend="ray"))
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


@pytest.mark.usefixtures("ray")
def test_ray_unpacks_what_threads_unpack(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    freebits.pack(slice_tiny(dense, force=True), tmp_path / "packed")
    freebits.unpack(tmp_path / "packed", tmp_path / "threads")
    freebits.unpack(tmp_path / "packed", tmp_path / "ray", parallel=Parallel(backend="ray"))
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


@pytest.mark.usefixtures("ray")
def test_another_worker_runs_the_piece_of_a_dead_one(tmp_path: Path) -> None:
    def square(item: int) -> int:
        mark = tmp_path / str(item)
        if item % 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item**2

    with Parallel(backend="ray").executor() as executor:
        assert list(executor.map(square, range(4))) == [0, 1, 4, 9]


def test_work_runs_each_piece_once(tmp_path: Path) -> None:
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


def test_work_without_a_store_keeps_nothing() -> None:
    with threads(1) as executor:
        work = Work(executor)
        assert list(work.map("squares", lambda item: item**2, range(4))) == [0, 1, 4, 9]
        assert work.once("one", lambda: 1) == 1
        assert not work.has("one")
        work.drop("one")
        with pytest.raises(LookupError):
            _ = work.store


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "slurm"}, "slurm"),
        ({"jobs": 0}, "jobs"),
    ],
)
def test_wrong_parallel_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(freebits.UsageError, match=message):
        Parallel(**options)
