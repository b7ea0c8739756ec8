"""Disturbed runs: signals, full and read-only file systems, changing sources, two writers, and too little memory.

After each disturbance, the output folder is absent or complete, the source is unchanged, and a rerun of the same
command succeeds and leaves nothing else behind.
"""

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.attacks.bases import TEXT
from tests.torture.children import Child, Outcome, start_command
from tests.torture.findings import Finding

CALIBRATED = ["--samples", "4", "--seq-len", "32"]
COMMANDS: Mapping[str, tuple[str, list[str]]] = {
    # name: (source, the command line)
    "slice": (
        "dense",
        ["slice", "SOURCE", "OUT", "--sparsity", "0.25", "--force", "--calibration", "TEXT", *CALIBRATED],
    ),
    "pack canonical": ("sliced", ["pack", "SOURCE", "OUT"]),
    "pack bits-back": ("sliced", ["pack", "SOURCE", "OUT", "--codec", "bits-back"]),
    "pack none": ("dense", ["pack", "SOURCE", "OUT", "--codec", "none"]),
    "pack with a base": ("changed", ["pack", "SOURCE", "OUT", "--base", "BASE"]),
    "unpack": ("canonical", ["unpack", "SOURCE", "OUT"]),
    "quantize": ("dense", ["quantize", "SOURCE", "OUT", "--calibration", "TEXT", *CALIBRATED]),
    "lowrank": ("dense", ["lowrank", "SOURCE", "OUT", "--calibration", "TEXT", *CALIBRATED]),
    "rotate": ("dense", ["rotate", "SOURCE", "OUT"]),
    "compress": ("dense", ["compress", "SOURCE", "OUT", "--bits", "4", "--force", "--calibration", "TEXT"]),
}
STOPPED = {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM}
"""Exit codes of runs that a signal stopped."""


@dataclass
class Case:
    """One command, with its source and its undisturbed result.

    Attributes:
        scratch: folder in which the command runs.
        bases: folder with the valid folders that are copied as sources.
        name: name of the command in `COMMANDS`.
        expected: digests of the files of the undisturbed result.
        seconds: duration of an undisturbed run.
    """

    scratch: Path
    bases: Path
    name: str
    expected: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def prepare(cls, scratch: Path, bases: Path, name: str) -> "Case":
        """Return a case after two undisturbed runs. The second is timed, because the first also imports modules."""
        case = cls(scratch, bases, name)
        scratch.mkdir()
        (scratch / "text").write_text(TEXT, encoding="utf-8")
        case.restore_source()
        for _ in range(2):
            start = time.monotonic()
            outcome = case.start().wait()
            case.seconds = time.monotonic() - start
            if outcome.exit_code:
                raise RuntimeError(f"{name} fails without a disturbance: {outcome.output[-500:]}")
            case.expected = file_digests(case.out)
            shutil.rmtree(case.out)
        return case

    @property
    def base(self) -> str:
        """Name of the valid folder that is the source."""
        return COMMANDS[self.name][0]

    @property
    def out(self) -> Path:
        return self.scratch / "work" / "out"

    @property
    def source(self) -> Path:
        return self.scratch / "source" / self.base

    def restore_source(self) -> None:
        """Copy the source again, with its times, because a rerun recognizes its source by them."""
        shutil.rmtree(self.source, ignore_errors=True)
        shutil.copytree(self.bases / self.base, self.source)
        (self.scratch / "work").mkdir(exist_ok=True)

    def argv(self, out: Path | None = None) -> list[str]:
        """Return the arguments of the command line."""
        paths = {"SOURCE": str(self.source), "OUT": str(out or self.out), "TEXT": str(self.scratch / "text")}
        paths["BASE"] = str(self.bases / "dense")
        return [paths.get(argument, argument) for argument in COMMANDS[self.name][1]]

    def start(self, out: Path | None = None, before: Callable[[], object] | None = None, log: str = "log") -> Child:
        """Start the command in a child process."""
        return start_command(self.argv(out), self.scratch / log, before)

    def judge(self, finding: Finding, outcome: Outcome, out: Path | None = None, accepted_code: int = 0) -> None:
        """Count a disturbed run. `accepted_code` is one more exit code that a stopped run may have."""
        out = out or self.out
        finding.times += 1
        output = outcome.output.replace(str(Path.home()), "~").replace(str(self.scratch), "")
        if not (outcome.clean or outcome.exit_code in STOPPED | {accepted_code}):
            finding.tracebacks += 1
            finding.notes.append(f"{self.name}: exit {outcome.exit_code}: {' '.join(output.split())[-300:]}")
        if not out.exists():
            finding.refused += 1
        elif file_digests(out) in (self.expected, self._result_of_current_source(out)):
            finding.harmless += 1
        else:
            finding.silent += 1
            finding.notes.append(f"{self.name}: another result, exit {outcome.exit_code}")

    def _result_of_current_source(self, out: Path) -> dict[str, bytes]:
        """Return the digests of a run on the source as it is now, as it may have changed before the run opened it."""
        if file_digests(out) == self.expected:
            return self.expected
        aside = out.rename(self.scratch / "aside")
        outcome = self.start(out).wait()
        digests = file_digests(out) if outcome.exit_code == 0 else {}
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
        return digests

    def rerun(self, finding: Finding) -> None:
        """Rerun the command if there is no output folder, count wrong results and leftovers, and remove the result."""
        if not self.out.exists():
            outcome = self.start().wait()
            if outcome.exit_code or file_digests(self.out) != self.expected:
                output = " ".join(outcome.output.split())[-300:]
                finding.silent += 1
                finding.notes.append(f"{self.name}, rerun: exit {outcome.exit_code}: {output}")
        if {path.name for path in (self.scratch / "work").iterdir()} != {"out"}:
            finding.left += 1
            finding.notes.append(str(sorted(path.name for path in (self.scratch / "work").iterdir())))
        shutil.rmtree(self.scratch / "work")
        (self.scratch / "work").mkdir()


def file_digests(folder: Path) -> dict[str, bytes]:
    """Map the relative paths of the files in a folder to their digests."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).digest() for file in files}


def send_signals(cases: list[Case], signal_: signal.Signals, times: int, rng: random.Random) -> Finding:
    """Run each command `times` times, and send it a signal at a random moment."""
    finding = Finding("faults", f"{signal_.name} at a random moment: {len(cases)} commands, {times} times each")
    for case in cases:
        source_digests = file_digests(case.source)
        for _ in range(times):
            child = case.start()
            if child.alive_after(rng.uniform(0, 1.1 * case.seconds)):
                child.send(signal_)
            case.judge(finding, child.wait())
            if file_digests(case.source) != source_digests:
                finding.silent += 1
            case.rerun(finding)
    return finding


def full_disk(cases: list[Case], times: int) -> Finding:
    """Run each command with its output on file systems of different sizes, most of which are too small."""
    finding = Finding("faults", f"a full disk (tmpfs): {len(cases)} commands, {times} sizes each")
    for case in cases:
        size = sum(file.stat().st_size for file in case.source.iterdir())
        for number in range(1, times + 1):
            with mounted(case.scratch / "small", f"size={2 * size * number // times}") as small:
                outcome = case.start(small / "out").wait()
                case.judge(finding, outcome, small / "out")
                if {path.name for path in small.iterdir()} - {"out"}:
                    finding.left += 1
    return finding


def read_only_target(cases: list[Case]) -> Finding:
    """Run each command with its output on a read-only file system."""
    finding = Finding("faults", f"a read-only file system for the output: {len(cases)} commands")
    for case in cases:
        with mounted(case.scratch / "small", "ro,size=1m") as small:
            case.judge(finding, case.start(small / "out").wait(), small / "out")
    return finding


def change_sources(cases: list[Case], times: int, rng: random.Random) -> list[Finding]:
    """Run each command, and truncate, remove, replace or overwrite its weights file while the command reads it."""
    findings = []
    for description, change in CHANGES.items():
        finding = Finding(
            "faults", f"a source that is {description} while it is read: {len(cases)} commands, {times} times each"
        )
        for case in cases:
            for _ in range(times):
                child = case.start()
                if child.alive_after(rng.uniform(0, case.seconds)):
                    [weights] = case.source.glob("*.safetensors")
                    change(weights, rng)
                case.judge(finding, child.wait())
                case.restore_source()
                case.rerun(finding)
        findings.append(finding)
    return findings


def _truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def _replace(file: Path, rng: random.Random) -> None:
    other = file.with_name("other")
    other.write_bytes(rng.randbytes(file.stat().st_size))
    other.replace(file)


def _overwrite(file: Path, rng: random.Random) -> None:
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(rng.randbytes(size - size // 2))


CHANGES: Mapping[str, Callable[[Path, random.Random], None]] = {
    "truncated": _truncate,
    "removed": lambda file, _: file.unlink(),
    "replaced": _replace,
    "partly overwritten": _overwrite,
}


def two_writers(cases: list[Case], times: int) -> Finding:
    """Run each command twice at the same time with the same output folder. One run publishes it."""
    finding = Finding(
        "faults", f"two simultaneous runs with one output folder: {len(cases)} commands, {times} times each"
    )
    for case in cases:
        for _ in range(times):
            for child in [case.start(log=f"log {number}") for number in range(2)]:
                outcome = child.wait()
                finding.tracebacks += not outcome.clean
            case.judge(finding, outcome)
            case.rerun(finding)
    return finding


def out_of_memory(cases: list[Case], times: int, rng: random.Random) -> Finding:
    """Run each command with so little address space that an allocation can fail."""
    finding = Finding("faults", f"out of memory (limited address space): {len(cases)} commands, {times} times each")
    aborted = 0
    for case in cases:
        for _ in range(times):
            extra_bytes = int(rng.uniform(0, 3e8))

            def limit_memory(extra_bytes: int = extra_bytes) -> None:
                lines = Path("/proc/self/status").read_text().splitlines()
                [line] = [line for line in lines if line.startswith("VmSize")]
                resource.setrlimit(resource.RLIMIT_AS, (1024 * int(line.split()[1]) + extra_bytes,) * 2)

            outcome = case.start(before=limit_memory).wait()
            aborted += outcome.exit_code == -signal.SIGABRT
            # allocators of Rust and C++ libraries abort the process
            case.judge(finding, outcome, accepted_code=-signal.SIGABRT)
            case.rerun(finding)
    finding.notes.append(f"{aborted} aborted by the allocator of a library")
    return finding


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory at a folder. Only root is allowed to do this."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)  # noqa: S607
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S607
