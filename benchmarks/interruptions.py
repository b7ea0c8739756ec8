"""Runs that are killed at random moments, of the demo model: they go on to the same bytes.

    python -m benchmarks.interruptions SCRATCH [--kills 20] [--runs 10] [--ways "slice: one process; slice: Ray; …"]

`slice` and `quantize` are killed (SIGKILL) `--kills` times on the way to one result, each time after a part of the
plain run's seconds drawn at random, and given again. Then `--runs` runs each of three ranks, one of which is killed at
a random moment and started again, and of Ray, one of whose workers is. Every result is compared with the plain run's,
file by file. Rows of ways that are not run again stay.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.results import RESULTS, print_table, save_csv
from freebits.calibration import embedded_text
from freebits.huggingface.demo_model import demo_model

HEADER = ("verb", "how", "interruptions", "finished pieces found again", "seconds of the plain run", "result")
WORLD, ONE = 3, "one process"
WAYS = [f"{verb}: {how}" for verb in ("slice", "quantize") for how in (ONE, f"{WORLD} ranks", "Ray")]
SAMPLES = {
    "slice": ["--sparsity", "0.2", "--samples", "4", "--seq-len", "256", "--force"],
    "quantize": ["--bits", "4", "--samples", "2"],
}


def main() -> None:
    """Interrupt every verb in every way, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--ways", default="; ".join(WAYS), help="which (default: %(default)s)")
    arguments = parser.parse_args()
    scratch: Path = arguments.scratch
    scratch.mkdir(parents=True)
    (scratch / "text").write_text(embedded_text()[0], encoding="utf-8")
    model, draw = demo_model(), random.Random(0)  # noqa: S311  (no secret)
    ways = [way.strip() for way in arguments.ways.split(";")]
    rows: list[tuple[object, ...]] = [row for row in saved() if f"{row[0]}: {row[1]}" not in ways]
    for verb, options in SAMPLES.items():
        chosen = [way.partition(": ")[2] for way in ways if way.startswith(f"{verb}: ")]
        if not chosen:
            continue
        command = [verb, str(model), "OUT", "--calibration", str(scratch / "text"), *options]
        start = time.perf_counter()
        subprocess.run(typed(command, scratch / "plain"), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        for how in chosen:
            times = arguments.kills if how == ONE else arguments.runs
            kills, found, equal = HOW[how](command, scratch, times, seconds, draw)
            rows.append((verb, how, kills, found, f"{seconds:.0f}", "the same bytes" if equal else "DIFFERS"))
            print(rows[-1], flush=True)
            save_csv("interruptions", HEADER, rows)
        shutil.rmtree(scratch / "plain")
    shutil.rmtree(scratch)
    print_table(HEADER, rows)


def saved() -> list[tuple[str, ...]]:
    """What was found before."""
    path = RESULTS / "interruptions.csv"
    return [tuple(row) for row in csv.reader(path.read_text().splitlines()[2:])] if path.exists() else []


def typed(command: list[str], out: Path, *more: str) -> list[str]:
    """The command line."""
    words = [str(out) if word == "OUT" else word for word in command]
    return [sys.executable, "-m", "freebits.cli", *words, *more]


def started(command: list[str]) -> subprocess.Popen[bytes]:
    """The command, without what it prints."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed(command: list[str], scratch: Path, times: int, seconds: float, draw: random.Random) -> tuple[int, int, bool]:
    """One process, killed until it has been so often, then left alone; again where it was done before that."""
    out, kills, found, equal = scratch / "out", 0, 0, True
    while kills < times:
        found += n_pieces(scratch)
        process = started(typed(command, out))
        try:
            process.wait(draw.uniform(0.1, 0.6) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            equal &= finished(process, out, scratch)
    return kills, found, equal and finished(started(typed(command, out)), out, scratch)


def rank_killed(
    command: list[str], scratch: Path, times: int, seconds: float, draw: random.Random
) -> tuple[int, int, bool]:
    """Three ranks, one of which is killed and started again."""
    out, kills, found, equal = scratch / "out", 0, 0, True
    for _ in range(times):
        jobs = [] if command[0] == "slice" else ["--jobs", "1"]
        ranks = [
            started(typed(command, out, "--rank", str(rank), "--world", str(WORLD), *jobs)) for rank in range(WORLD)
        ]
        victim = draw.randrange(WORLD)
        time.sleep(draw.uniform(0.2, 0.9) * seconds)
        if ranks[victim].poll() is None:
            ranks[victim].kill()
            ranks[victim].wait()
            kills += 1
            found += n_pieces(scratch)
            ranks[victim] = started(ranks[victim].args)  # type: ignore[arg-type]
        for rank in ranks[1:]:
            rank.wait()
        equal &= finished(ranks[0], out, scratch)
    return kills, found, equal


def worker_killed(
    command: list[str], scratch: Path, times: int, seconds: float, draw: random.Random
) -> tuple[int, int, bool]:
    """A local cluster of Ray, of which a worker at work is killed."""
    out, kills, found, equal = scratch / "out", 0, 0, True
    for _ in range(times):
        process = started(typed(command, out, "--backend", "ray"))
        time.sleep(draw.uniform(0.2, 0.9) * seconds)
        while process.poll() is None and not (workers := [*at_work(process.pid)]):
            time.sleep(0.05)  # none is at work at this moment
        if process.poll() is None and workers:
            os.kill(draw.choice(workers), signal.SIGKILL)
            kills += 1
            found += n_pieces(scratch)
        equal &= finished(process, out, scratch)
    return kills, found, equal


HOW: dict[str, Callable[[list[str], Path, int, float, random.Random], tuple[int, int, bool]]] = {
    ONE: killed,
    f"{WORLD} ranks": rank_killed,
    "Ray": worker_killed,
}


def at_work(parent: int) -> Iterator[int]:
    """Ray's workers below a process that run a piece."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            above = ancestors(int(folder.name)) if title.startswith("ray::_run") else []
        except OSError:
            continue
        if parent in above:
            yield int(folder.name)


def ancestors(process: int) -> list[int]:
    """Those that started it, innermost first."""
    found = []
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(process)
    return found


def n_pieces(scratch: Path) -> int:
    """Finished pieces in a draft."""
    return sum(1 for _ in scratch.glob(".out*/unfinished/*.safetensors"))


def finished(process: "subprocess.Popen[bytes]", out: Path, scratch: Path) -> bool:
    """Whether a process ends well, with the plain run's bytes and nothing beside; its output is removed."""
    equal = process.wait() == 0 and contents(out) == contents(scratch / "plain")
    equal &= {path.name for path in scratch.iterdir()} <= {"text", "plain", "out"}
    shutil.rmtree(out, ignore_errors=True)
    return equal


def contents(folder: Path) -> dict[str, bytes]:
    """Files and bytes."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


if __name__ == "__main__":
    main()
