"""Kill runs on the demo model at random moments, resume them, and compare the results byte for byte.

    python -m benchmarks.interruptions SCRATCH [--kills 20] [--runs 10] [--ways "slice: one process; slice: Ray; …"]

A process of `slice` or `quantize` is killed (SIGKILL) and rerun `--kills` times before it may finish. Each kill comes
after a random fraction of the seconds of an uninterrupted run. Then each command runs `--runs` times on Ray, and one of
Ray's workers is killed at a random moment. Every result is compared, file by file, with that of an uninterrupted run on
the same backend, because the number of threads affects rounding. Rows of other commands and backends in the CSV file
are kept.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.results import print_table, save_csv, saved_rows
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text

HEADER = ("command", "how", "interruptions", "finished pieces reused", "seconds of an uninterrupted run", "result")
ONE, RAY = "one process", "Ray"
WAYS = [f"{command}: {how}" for command in ("slice", "quantize") for how in (ONE, RAY)]
SAMPLES = {
    "slice": ["--sparsity", "0.2", "--samples", "4", "--seq-len", "256", "--force"],
    "quantize": ["--bits", "4", "--samples", "2"],
}


def main() -> None:
    """Interrupt the chosen commands on the chosen backends, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--ways", default="; ".join(WAYS), help="commands and ways to run them (default: %(default)s)")
    arguments = parser.parse_args()
    scratch: Path = arguments.scratch
    scratch.mkdir(parents=True)
    (scratch / "text").write_text(embedded_text()[0], encoding="utf-8")
    model, generator = demo_model(), random.Random(0)  # noqa: S311
    ways = [way.strip() for way in arguments.ways.split(";")]
    rows: list[tuple[object, ...]] = [row for row in saved_rows("interruptions") if f"{row[0]}: {row[1]}" not in ways]
    for name, options in SAMPLES.items():
        chosen = [way.partition(": ")[2] for way in ways if way.startswith(f"{name}: ")]
        if not chosen:
            continue
        command = [name, str(model), "OUT", "--calibration", str(scratch / "text"), *options]
        for how in chosen:
            backend = ["--backend", "ray"] if how == RAY else []
            start = time.perf_counter()
            subprocess.run(command_line(command, scratch / "plain", *backend), check=True, capture_output=True)
            seconds = time.perf_counter() - start
            times = arguments.kills if how == ONE else arguments.runs
            kills, pieces, equal = EXPERIMENTS[how](command, scratch, times, seconds, generator)
            rows.append((name, how, kills, pieces, f"{seconds:.0f}", "the same bytes" if equal else "DIFFERS"))
            print(rows[-1], flush=True)
            save_csv("interruptions", HEADER, rows)
            shutil.rmtree(scratch / "plain")
    shutil.rmtree(scratch)
    print_table(HEADER, rows)


def command_line(command: list[str], out: Path, *options: str) -> list[str]:
    """Return the arguments of a process that runs a command into `out`."""
    words = [str(out) if word == "OUT" else word for word in command]
    return [sys.executable, "-m", "freebits.cli", *words, *options]


def started(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a process, and discard what it prints."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed(
    command: list[str], scratch: Path, times: int, seconds: float, generator: random.Random
) -> tuple[int, int, bool]:
    """Kill and rerun one process, then let it finish. If it finishes before it is killed, start again.

    Returns:
        The number of kills, of finished pieces that reruns found, and whether all results were equal.
    """
    out, kills, pieces, equal = scratch / "out", 0, 0, True
    while kills < times:
        pieces += n_pieces(scratch)
        process = started(command_line(command, out))
        try:
            process.wait(generator.uniform(0.1, 0.6) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            equal &= finished(process, out, scratch)
    return kills, pieces, equal and finished(started(command_line(command, out)), out, scratch)


def worker_killed(
    command: list[str], scratch: Path, times: int, seconds: float, generator: random.Random
) -> tuple[int, int, bool]:
    """Run on a local Ray cluster and kill a worker that runs a piece; returns the same as `killed`."""
    out, kills, pieces, equal = scratch / "out", 0, 0, True
    for _ in range(times):
        process = started(command_line(command, out, "--backend", "ray"))
        time.sleep(generator.uniform(0.2, 0.9) * seconds)
        while process.poll() is None and not (workers := [*busy_workers(process.pid)]):
            time.sleep(0.05)
        if process.poll() is None and workers:
            os.kill(generator.choice(workers), signal.SIGKILL)
            kills += 1
            pieces += n_pieces(scratch)
        equal &= finished(process, out, scratch)
    return kills, pieces, equal


EXPERIMENTS: dict[str, Callable[[list[str], Path, int, float, random.Random], tuple[int, int, bool]]] = {
    ONE: killed,
    RAY: worker_killed,
}


def busy_workers(parent: int) -> Iterator[int]:
    """Yield the ids of Ray workers below a process that run a piece."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parents = ancestors(int(folder.name)) if title.startswith("ray::_run") else []
        except OSError:
            continue
        if parent in parents:
            yield int(folder.name)


def ancestors(process: int) -> list[int]:
    """Return the ids of a process's parent, its parent's parent, and so on."""
    parents = []
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        parents.append(process)
    return parents


def n_pieces(scratch: Path) -> int:
    """Count the finished pieces in the staging directory."""
    return sum(1 for _ in scratch.glob(".out*/.unfinished/*.safetensors"))


def finished(process: "subprocess.Popen[bytes]", out: Path, scratch: Path) -> bool:
    """Wait for a process and remove its output; return whether it succeeded, with equal bytes and no other files."""
    equal = process.wait() == 0 and contents(out) == contents(scratch / "plain")
    equal &= {path.name for path in scratch.iterdir()} <= {"text", "plain", "out"}
    shutil.rmtree(out, ignore_errors=True)
    return equal


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


if __name__ == "__main__":
    main()
