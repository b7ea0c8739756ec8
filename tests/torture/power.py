"""Power that fails at any moment: the order in which a run writes, as the kernel saw it, cut after every call.

What a disk then holds is at worst this: names are as they were last changed, and of a file's bytes those that were
there at its last `fsync`. So wherever `OUT` has its name, all of its files must have been synced after their last
write, and their folder after their last name; so must each finished piece that a later run would go on with.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.faults import VERBS, Place
from tests.torture.findings import Finding

CALLS = (
    "openat,open,creat,close,write,pwrite64,writev,pwritev,ftruncate,fsync,fdatasync,rename,renameat,renameat2,mkdir"
)
CALLS += ",mkdirat,unlink,unlinkat,mmap,copy_file_range,sendfile,dup,dup2,dup3,fallocate,rmdir"
_LINE = re.compile(r"(?:\[pid +\d+\] |\d+ +)?(\w+)\((.*)\) += (-?\d+|\?)")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
_HANDLE = re.compile(r"(\d+)<([^>]*)>")


@dataclass
class Disk:
    """What is on a disk in the worst case; paths are those of now."""

    root: Path
    unsynced: set[str] = field(default_factory=set)
    """Files with bytes, and folders with names, that a power cut may take."""
    files: set[str] = field(default_factory=set)

    def call(self, name: str, arguments: str) -> None:
        """One call that has succeeded."""
        handle, paths = _HANDLE.search(arguments), _paths(arguments)
        if name in ("write", "pwrite64", "writev", "pwritev", "ftruncate", "copy_file_range", "sendfile", "fallocate"):
            if name == "copy_file_range":
                handle = [*_HANDLE.finditer(arguments)][-1]
            if handle and handle[2].startswith(str(self.root)):
                self.files.add(handle[2])
                self.unsynced.add(handle[2])
        elif name in ("fsync", "fdatasync") and handle:
            self.unsynced.discard(handle[2])
        elif (name in ("openat", "open", "creat") and "O_CREAT" in arguments) or name in ("mkdir", "mkdirat"):
            self._named(paths[-1])
        elif name.startswith("rename"):
            old, new = paths[-2:]
            self.unsynced = {self._moved(path, old, new) for path in self.unsynced}
            self.files = {self._moved(path, old, new) for path in self.files}
            self._named(new)
        elif name in ("unlink", "unlinkat", "rmdir"):
            self.unsynced.discard(paths[-1])
            self.files.discard(paths[-1])

    def lost(self, folder: str) -> set[str]:
        """What a power cut may take of a folder that is there."""
        return {path for path in self.unsynced if path == folder or path.startswith(f"{folder}/")}

    def _named(self, path: str) -> None:
        if path.startswith(str(self.root)):
            self.unsynced.add(str(Path(path).parent))

    @staticmethod
    def _moved(path: str, old: str, new: str) -> str:
        return new + path[len(old) :] if path == old or path.startswith(f"{old}/") else path


def power_cuts(places: list[Place]) -> list[Finding]:
    """Each verb under `strace`, cut after each of its calls."""
    finding = Finding("power", f"a power cut after any call that writes or names ({len(places)} verbs, by strace)")
    pieces = Finding("power", "the same, of finished pieces that a later run goes on with")
    for place in places:
        disk, seen = Disk(place.scratch / "work"), 0
        for name, arguments in traced(place):
            disk.call(name, arguments)
            renamed = _paths(arguments)[-1] if name.startswith("rename") else ""
            seen += str(disk.root) in arguments
            finding.times += str(disk.root) in arguments
            lost = disk.lost(str(place.out)) if renamed == str(place.out) else set()
            finding.silent += bool(lost)
            finding.harmless += str(disk.root) in arguments and not lost
            finding.notes += [f"{place.name}: {sorted(Path(path).name for path in lost)}"] if lost else []
            if renamed and "/.unfinished/" in renamed and not Path(renamed).name.startswith("."):
                pieces.times += 1
                pieces.silent += renamed in disk.unsynced
                pieces.harmless += renamed not in disk.unsynced
        if not seen or not disk.files:
            raise RuntimeError(f"nothing was seen of {place.name}")
        shutil.rmtree(place.out)
    return [finding, pieces]


def traced(place: Place) -> list[tuple[str, str]]:
    """The calls of a run, in order, that succeeded."""
    log = place.scratch / "strace"
    known = {"SOURCE": str(place.source), "OUT": str(place.out), "TEXT": str(place.scratch / "text")}
    argv = [known.get(word, word) for word in VERBS[place.name][1]]
    run = [sys.executable, "-m", "freebits.cli", *argv]
    trace = [
        "strace",
        "-f",
        "-y",
        "-qq",
        "-s",
        "4096",
        "-e",
        f"trace={CALLS}",
        "-e",
        "status=successful",
        "-o",
        str(log),
    ]
    subprocess.run([*trace, *run], check=True, capture_output=True)
    lines = (_LINE.match(line) for line in _joined(log.read_text(errors="replace").splitlines()))
    return [(found[1], found[2]) for found in lines if found]


def _paths(arguments: str) -> list[str]:
    """Those among the arguments, also of a name in an open folder."""
    handle = _HANDLE.match(arguments)
    return [str(Path(handle[2] if handle else "/", path)) for path in _PATH.findall(arguments)]


def _joined(lines: list[str]) -> list[str]:
    """Calls that were interrupted by another thread's, put together where they ended."""
    begun: dict[str, str] = {}
    joined = []
    for line in lines:
        thread = line.split(maxsplit=1)[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
        elif "resumed>" in line:
            joined.append(begun.pop(thread, "") + line.partition("resumed>")[2])
        else:
            joined.append(line)
    return joined
