"""Work that is stopped and gone on with, and work that is spread: over ranks, and over workers of Ray."""

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
from freebits import Team
from freebits.cli import main
from freebits.codes import canonical_direction
from freebits.moves import slicing
from freebits.symmetry import PolarForm
from freebits.work import Desk
from freebits.work.saved import read, save
from tests.tiny import Make, random_text

TEXT = random_text(600)
SLICE: dict[str, Any] = {"sparsity": 0.25, "calibration": TEXT, "samples": 8, "seq_len": 32, "force": True}
QUANTIZE: dict[str, Any] = {"target_kl": 0.01, "calibration": TEXT, "samples": 8, "seq_len": 32}
Verb = Callable[..., Any]


@pytest.fixture
def dense(save_tiny: Make) -> Path:
    return save_tiny(num_hidden_layers=4)


@pytest.fixture
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few windows are few tokens: they would all be one chunk."""
    monkeypatch.setattr(slicing, "_AT_ONCE", 64)
    monkeypatch.setattr("freebits.huggingface.sensitivities._AT_ONCE", 64)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def verbs(dense: Path, sliced: Path) -> dict[str, tuple[Verb, Path, dict[str, Any]]]:
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
    with pytest.raises(ValueError, match="does not hold what was written"):
        read(tmp_path / "a")
    with pytest.raises(TypeError, match="no file can hold"):
        save(tmp_path / "b", object())
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


class Stopped:
    """Stops a run after so many pieces were laid down, as Ctrl-C would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        put = Desk.put

        def counted(desk: Desk, key: str, value: Any) -> None:
            put(desk, key, value)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(Desk, "put", counted)


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("verb", ["slice", "canonical", "bits-back", "quantize"])
def test_a_stopped_run_is_gone_on_with(
    verb: str, dense: Path, slice_tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, model, options = verbs(dense, slice_tiny(dense, force=True))[verb]
    run(model, tmp_path / "at once", **options)
    expected, before = contents(tmp_path / "at once"), {file.name for file in tmp_path.iterdir()}
    stops = 0
    with pytest.MonkeyPatch.context() as patch:
        for after in (1, 2, 3, 5, 8, 4):
            patch.undo()
            if (tmp_path / "out").exists():
                break
            Stopped(patch, after)
            try:
                run(model, tmp_path / "out", **options)
            except KeyboardInterrupt:
                stops += 1
    if not (tmp_path / "out").exists():
        run(model, tmp_path / "out", **options)
    assert stops >= 2
    assert "going on with what a run left that was stopped" in caplog.text
    assert contents(tmp_path / "out") == expected
    assert {file.name for file in tmp_path.iterdir()} == before | {"out"}


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("verb", ["slice", "quantize", "lowrank"])
def test_a_run_is_gone_on_with_wherever_it_was_stopped(verb: str, save_tiny: Make, tmp_path: Path) -> None:
    deep = save_tiny(num_hidden_layers=6)  # what is known of blocks long done is forgotten on the way
    run, model, options = verbs(deep, deep)[verb]
    run(model, tmp_path / "at once", **options)
    stops = 0
    while not (tmp_path / "out").exists():
        with pytest.MonkeyPatch.context() as patch:
            Stopped(patch, 11)
            try:
                run(model, tmp_path / "out", **options)
            except KeyboardInterrupt:
                stops += 1
    assert 4 < stops < 40  # nothing much is made again
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


def test_other_arguments_begin_anew(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(dense, force=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stopped(patch, 4)
        freebits.pack(sliced, tmp_path / "out")
    [draft] = tmp_path.glob(".out*")
    freebits.pack(sliced, tmp_path / "out", codec="bits-back")
    freebits.pack(sliced, tmp_path / "other", codec="bits-back")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    assert not draft.exists()


def test_finished_pieces_are_not_made_again(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(dense, force=True)
    made: list[int] = []

    def counted(A: torch.Tensor) -> torch.Tensor:
        made.append(1)
        return canonical_direction(A)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("freebits.moves.diagonal.canonical_direction", counted)
        Stopped(patch, 6)
        freebits.pack(sliced, tmp_path / "out", codec="bits-back", jobs=1)
    before = len(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("freebits.moves.diagonal.canonical_direction", counted)
        freebits.pack(sliced, tmp_path / "out", codec="bits-back", jobs=1)
    assert before > 0
    assert len(made) == 8  # one a sublayer


KILLED = """
import os, signal, sys
from freebits.cli import main
from freebits.work import Desk

left, put = int(sys.argv[1]), Desk.put

def counted(desk, key, value):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    put(desk, key, value)

Desk.put = counted
main(sys.argv[2:])
"""


@pytest.mark.parametrize("verb", ["slice", "quantize"])
def test_a_killed_process_is_gone_on_with(verb: str, dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    options = {"slice": ["--sparsity", "0.25", "--force"], "quantize": ["--target-kl", "0.01"]}[verb]

    def command(out: str) -> list[str]:
        given = ["--calibration", str(text), "--samples", "8", "--seq-len", "32", *options]
        return [verb, str(dense), str(tmp_path / out), *given]

    assert main(command("at once")) == 0
    for pieces in (3, 5):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(pieces), *command("out")], check=False)
        assert killed.returncode == -signal.SIGKILL
    assert main(command("out")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    assert not [*tmp_path.glob(".out*")]


RANK = """
import sys
from pathlib import Path
from freebits import Team
from freebits.huggingface import sensitivities
from freebits.moves import slicing
from tests.test_crew import verbs

slicing._AT_ONCE = sensitivities._AT_ONCE = 64
rank, dense, sliced, out = int(sys.argv[1]), *map(Path, sys.argv[2:])
for name, (run, model, options) in verbs(dense, sliced).items():
    made = run(model, out / name, team=Team(jobs=1, rank=rank, world=3), **options)
    assert bool(made) == (rank == 0)
"""


@pytest.mark.usefixtures("several_chunks")
def test_ranks_make_what_one_process_makes(dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    sliced, out = slice_tiny(dense, force=True), tmp_path / "out"
    command = [sys.executable, "-c", RANK]
    arguments, root = [str(folder) for folder in (dense, sliced, out)], Path(__file__).parent.parent
    ranks = [subprocess.Popen([*command, str(rank), *arguments], cwd=root) for rank in (2, 1, 0)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for name, (run, model, options) in verbs(dense, sliced).items():
        run(model, tmp_path / name, **options)
        assert contents(out / name) == contents(tmp_path / name), name
    assert {path.name for path in out.iterdir()} == {*verbs(dense, sliced)}


@pytest.mark.usefixtures("several_chunks")
def test_a_stream_may_lie_on_disk(dense: Path, tmp_path: Path) -> None:
    freebits.slice_model(dense, tmp_path / "memory", **SLICE)
    freebits.slice_model(dense, tmp_path / "disk", team=Team(jobs=1, spills=True), **SLICE)
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray", "several_chunks")
@pytest.mark.parametrize("verb", ["slice", "canonical", "quantize"])
def test_workers_of_ray_make_what_one_process_makes(verb: str, dense: Path, slice_tiny: Make, tmp_path: Path) -> None:
    run, model, options = verbs(dense, slice_tiny(dense, force=True))[verb]
    run(model, tmp_path / "alone", **options)
    run(model, tmp_path / "out", team=Team(backend="ray"), **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.usefixtures("ray")
def test_what_a_dead_worker_had_is_done_by_another(tmp_path: Path) -> None:
    def work(item: int) -> int:
        mark = tmp_path / str(item)
        if item % 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item**2

    with Team(backend="ray").crew(None) as crew:
        assert list(crew.share("squares", work, range(4))) == [0, 1, 4, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "slurm"}, "no backend"),
        ({"rank": 3, "world": 3}, "rank 3 of 3"),
        ({"world": 2, "backend": "ray"}, "without Ray"),
        ({"jobs": 0}, "jobs 0"),
    ],
)
def test_a_team_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(freebits.UsageError, match=message):
        Team(**options)
