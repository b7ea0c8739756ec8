"""Kill runs on the demo model at random moments, resume them, and compare the results byte for byte.

    python -m benchmarks.interruptions SCRATCH [--kills 20] [--runs 10] [--ways "slice: one process; slice: Ray; …"]

One process of `slice` and of `quantize` is killed (SIGKILL) `--kills` times before it may finish, each time after a
random fraction of the plain run's seconds, and rerun. Then each command runs `--runs` times on Ray, and one of Ray's
workers is killed at a random moment. Every result is compared with the plain run's, file by file. Rows in the CSV file
for ways that are not run again stay.
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
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text

HEADER = ("command", "how", "interruptions", "finished pieces found again", "seconds of the plain run", "result")
ONE, RAY = "one process", "Ray"
WAYS = [f"{command}: {how}" for command in ("slice", "quantize") for how in (ONE, RAY)]
SAMPLES = {
    "slice": ["--sparsity", "0.2", "--samples", "4", "--seq-len", "256", "--force"],
    "quantize": ["--bits", "4", "--samples", "2"],
}


def main() -> None:
    """Interrupt both commands in every way, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--ways", default="; ".join(WAYS), help="which (default: %(default)s)")
    arguments = parser.parse_args()
    scratch: Path = arguments.scratch
    scratch.mkdir(parents=True)
    (scratch / "text").write_text(embedded_text()[0], encoding="utf-8")
    model, draw = demo_model(), random.Random(0)  # noqa: S311
    ways = [way.strip() for way in arguments.ways.split(";")]
    rows: list[tuple[object, ...]] = [row for row in saved() if f"{row[0]}: {row[1]}" not in ways]
    for name, options in SAMPLES.items():
        chosen = [way.partition(": ")[2] for way in ways if way.startswith(f"{name}: ")]
        if not chosen:
            continue
        command = [name, str(model), "OUT", "--calibration", str(scratch / "text"), *options]
        start = time.perf_counter()
        subprocess.run(typed(command, scratch / "plain"), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        for how in chosen:
            times = arguments.kills if how == ONE else arguments.runs
            kills, found, equal = HOW[how](command, scratch, times, seconds, draw)
            rows.append((name, how, kills, found, f"{seconds:.0f}", "the same bytes" if equal else "DIFFERS"))
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
    """Kill one process so many times, then let it finish. If it finishes earlier, start again."""
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


def worker_killed(
    command: list[str], scratch: Path, times: int, seconds: float, draw: random.Random
) -> tuple[int, int, bool]:
    """Run on a local Ray cluster, and kill a worker that is running a piece."""
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
    RAY: worker_killed,
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
    """Finished pieces in the staging directory."""
    return sum(1 for _ in scratch.glob(".out*/.unfinished/*.safetensors"))


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
