"""What can happen to a run that writes: killed, told to stop, no room, no right, a source that changes, a rival.

After each the target is absent or complete, the source is what it was, and the next run of the same command ends well
and leaves nothing else behind.
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
from tests.torture.children import Child, Ended, command
from tests.torture.findings import Finding

CALIBRATED = ["--samples", "4", "--seq-len", "32"]
VERBS: Mapping[str, tuple[str, list[str]]] = {
    # name: (source, the command line)
    "slice": (
        "dense",
        ["slice", "SOURCE", "OUT", "--sparsity", "0.25", "--force", "--calibration", "TEXT", *CALIBRATED],
    ),
    "pack canonical": ("sliced", ["pack", "SOURCE", "OUT"]),
    "pack bits-back": ("sliced", ["pack", "SOURCE", "OUT", "--codec", "bits-back"]),
    "pack none": ("dense", ["pack", "SOURCE", "OUT", "--codec", "none"]),
    "unpack": ("canonical", ["unpack", "SOURCE", "OUT"]),
    "quantize": ("dense", ["quantize", "SOURCE", "OUT", "--calibration", "TEXT", *CALIBRATED]),
    "lowrank": ("dense", ["lowrank", "SOURCE", "OUT", "--calibration", "TEXT", *CALIBRATED]),
    "rotate": ("dense", ["rotate", "SOURCE", "OUT"]),
    "compress": ("dense", ["compress", "SOURCE", "OUT", "--bits", "4", "--force", "--calibration", "TEXT"]),
}
STOPPED = {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM}


@dataclass
class Place:
    """Where one verb is tortured: its source, what comes of a plain run, and how long that takes."""

    scratch: Path
    bases: Path
    name: str
    plain: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, scratch: Path, bases: Path, name: str) -> "Place":
        """Make it, with a plain run; the first is for what is only imported then."""
        place = cls(scratch, bases, name)
        scratch.mkdir()
        (scratch / "text").write_text(TEXT, encoding="utf-8")
        place.fresh_source()
        for _ in range(2):
            start = time.monotonic()
            ended = place.started().end()
            place.seconds = time.monotonic() - start
            if ended.code:
                raise RuntimeError(f"{name} does not run at all: {ended.said[-500:]}")
            place.plain = contents(place.out)
            shutil.rmtree(place.out)
        return place

    @property
    def base(self) -> str:
        """Name of its source."""
        return VERBS[self.name][0]

    @property
    def out(self) -> Path:
        return self.scratch / "work" / "out"

    @property
    def source(self) -> Path:
        return self.scratch / "source" / self.base

    def fresh_source(self) -> None:
        """The source as it was, also its times, by which a stopped run knows it."""
        shutil.rmtree(self.source, ignore_errors=True)
        shutil.copytree(self.bases / self.base, self.source)
        (self.scratch / "work").mkdir(exist_ok=True)

    def started(self, out: Path | None = None, before: Callable[[], object] | None = None, log: str = "log") -> Child:
        """A child at it."""
        known = {"SOURCE": str(self.source), "OUT": str(out or self.out), "TEXT": str(self.scratch / "text")}
        return command([known.get(word, word) for word in VERBS[self.name][1]], self.scratch / log, before)

    def judge(self, finding: Finding, ended: Ended, out: Path | None = None, also: int = 0) -> None:
        """Count a run that was hindered; it may also end with one more exit code."""
        out = out or self.out
        finding.times += 1
        ended = Ended(ended.code, ended.said.replace(str(Path.home()), "~").replace(str(self.scratch), ""))
        if not (ended.in_one_line or ended.code in STOPPED | {also}):
            finding.tracebacks += 1
            finding.notes.append(f"{self.name}: exit {ended.code}: {' '.join(ended.said.split())[-300:]}")
        if not out.exists():
            finding.refused += 1
        elif contents(out) in (self.plain, self._of_the_source_now(out)):
            finding.harmless += 1
        else:
            finding.silent += 1
            finding.notes.append(f"{self.name}: another result, exit {ended.code}")

    def _of_the_source_now(self, out: Path) -> dict[str, bytes]:
        """What a run makes of the source as it now is; it may have been changed before the run opened it."""
        if contents(out) == self.plain:
            return self.plain
        aside = out.rename(self.scratch / "aside")
        ended = self.started(out).end()
        found = contents(out) if ended.code == 0 else {}
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
        return found

    def again(self, finding: Finding) -> None:
        """The next run of the same command."""
        if not self.out.exists():
            ended = self.started().end()
            if ended.code or contents(self.out) != self.plain:
                finding.silent += 1
                finding.notes.append(f"{self.name}, again: exit {ended.code}: {' '.join(ended.said.split())[-300:]}")
        if {path.name for path in (self.scratch / "work").iterdir()} != {"out"}:
            finding.left += 1
            finding.notes.append(str(sorted(path.name for path in (self.scratch / "work").iterdir())))
        shutil.rmtree(self.scratch / "work")
        (self.scratch / "work").mkdir()


def contents(folder: Path) -> dict[str, bytes]:
    """Files and digests."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).digest() for file in files}


def stopped(places: list[Place], number: signal.Signals, times: int, draw: random.Random) -> Finding:
    """Each verb, so often, sent a signal at a random moment."""
    finding = Finding("faults", f"{number.name} at a random moment: {len(places)} verbs, {times} times each")
    for place in places:
        before = contents(place.source)
        for _ in range(times):
            child = place.started()
            if child.alive(draw.uniform(0, 1.1 * place.seconds)):
                child.kill(number)
            place.judge(finding, child.end())
            if contents(place.source) != before:
                finding.silent += 1
            place.again(finding)
    return finding


def no_room(places: list[Place], times: int) -> Finding:
    """Each verb, into a file system that is too small, by more and by less."""
    finding = Finding("faults", f"a full disk (tmpfs): {len(places)} verbs, {times} sizes each")
    for place in places:
        size = sum(file.stat().st_size for file in place.source.iterdir())
        for step in range(1, times + 1):
            with mounted(place.scratch / "small", f"size={2 * size * step // times}") as small:
                ended = place.started(small / "out").end()
                place.judge(finding, ended, small / "out")
                if {path.name for path in small.iterdir()} - {"out"}:
                    finding.left += 1
    return finding


def no_right(places: list[Place]) -> Finding:
    """Each verb, into a file system that cannot be written."""
    finding = Finding("faults", f"a target that cannot be written: {len(places)} verbs")
    for place in places:
        with mounted(place.scratch / "small", "ro,size=1m") as small:
            place.judge(finding, place.started(small / "out").end(), small / "out")
    return finding


def changed(places: list[Place], times: int, draw: random.Random) -> list[Finding]:
    """Each verb, its weights truncated, removed, replaced or written into while it reads them."""
    findings = []
    for how, change in CHANGES.items():
        finding = Finding("faults", f"a source that is {how} while it is read: {len(places)} verbs, {times} times each")
        for place in places:
            for _ in range(times):
                child = place.started()
                if child.alive(draw.uniform(0, place.seconds)):
                    [weights] = place.source.glob("*.safetensors")
                    change(weights, draw)
                place.judge(finding, child.end())
                place.fresh_source()
                place.again(finding)
        findings.append(finding)
    return findings


def _truncate(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def _replace(file: Path, draw: random.Random) -> None:
    other = file.with_name("other")
    other.write_bytes(draw.randbytes(file.stat().st_size))
    other.replace(file)


def _overwrite(file: Path, draw: random.Random) -> None:
    size = file.stat().st_size
    with file.open("r+b") as open_folder:
        open_folder.seek(size // 2)
        open_folder.write(draw.randbytes(size - size // 2))


CHANGES: Mapping[str, Callable[[Path, random.Random], None]] = {
    "truncated": _truncate,
    "removed": lambda file, _: file.unlink(),
    "replaced": _replace,
    "written into": _overwrite,
}


def two_writers(places: list[Place], times: int) -> Finding:
    """Each verb twice at once, into one folder: one of them gets it."""
    finding = Finding("faults", f"two runs into one folder at once: {len(places)} verbs, {times} times each")
    for place in places:
        for _ in range(times):
            for child in [place.started(log=f"log {number}") for number in range(2)]:
                ended = child.end()
                finding.tracebacks += not ended.in_one_line
            place.judge(finding, ended)
            place.again(finding)
    return finding


def no_memory(places: list[Place], times: int, draw: random.Random) -> Finding:
    """Each verb with so little address space left that an allocation fails somewhere."""
    finding, aborted = (
        Finding("faults", f"out of memory (a bound on address space): {len(places)} verbs, {times} times each"),
        0,
    )
    for place in places:
        for _ in range(times):
            more = int(draw.uniform(0, 3e8))

            def bound(more: int = more) -> None:
                [line] = [of for of in Path("/proc/self/status").read_text().splitlines() if of.startswith("VmSize")]
                resource.setrlimit(resource.RLIMIT_AS, (1024 * int(line.split()[1]) + more,) * 2)

            ended = place.started(before=bound).end()
            aborted += ended.code == -signal.SIGABRT
            place.judge(finding, ended, also=-signal.SIGABRT)  # which allocators of Rust and C++ libraries do
            place.again(finding)
    finding.notes.append(f"{aborted} ended by a library's allocator (abort)")
    return finding


@contextmanager
def mounted(at: Path, options: str) -> Iterator[Path]:
    """A file system in memory, which only root may make."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(at)], check=True)  # noqa: S607
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)  # noqa: S607
