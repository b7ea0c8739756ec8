"""Power cuts. strace records the order of a run's system calls; the test simulates a cut after each of them.

The worst state of the disk is this: names are those of the last change, and a file has the bytes of its last `fsync`.
So when `OUT` appears under its name, all files in it must have been synced after their last write, and their folder
after the last change of a name in it. The same holds for each finished piece that a later run would reuse.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.faults import Case
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
    """The worst state of a disk. Paths are the current ones, after all renames.

    Attributes:
        root: folder whose contents are tracked.
        unsynced: files whose bytes, and folders whose names, a power cut can destroy.
        files: files that were written.
    """

    root: Path
    unsynced: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    def call(self, name: str, arguments: str) -> None:
        """Update the state after a successful system call."""
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
            self._name_changed(paths[-1])
        elif name.startswith("rename"):
            old, new = paths[-2:]
            self.unsynced = {self._renamed(path, old, new) for path in self.unsynced}
            self.files = {self._renamed(path, old, new) for path in self.files}
            self._name_changed(new)
        elif name in ("unlink", "unlinkat", "rmdir"):
            self.unsynced.discard(paths[-1])
            self.files.discard(paths[-1])

    def lost(self, folder: str) -> set[str]:
        """Return the paths in a folder whose contents a power cut can destroy."""
        return {path for path in self.unsynced if path == folder or path.startswith(f"{folder}/")}

    def _name_changed(self, path: str) -> None:
        """Record that the parent folder of a path is not synced."""
        if path.startswith(str(self.root)):
            self.unsynced.add(str(Path(path).parent))

    @staticmethod
    def _renamed(path: str, old: str, new: str) -> str:
        """Return a path after `old`, which may be the path or a parent of it, was renamed to `new`."""
        return new + path[len(old) :] if path == old or path.startswith(f"{old}/") else path


def power_cuts(cases: list[Case]) -> list[Finding]:
    """Run each command under `strace` and simulate a power cut after each system call."""
    finding = Finding("power", f"a power cut after each system call ({len(cases)} commands, recorded with strace)")
    pieces = Finding("power", "the same, for finished pieces that a later run reuses")
    for case in cases:
        disk, n_calls = Disk(case.scratch / "work"), 0
        for name, arguments in traced_calls(case):
            disk.call(name, arguments)
            new_path = _paths(arguments)[-1] if name.startswith("rename") else ""
            n_calls += str(disk.root) in arguments
            finding.times += str(disk.root) in arguments
            lost = disk.lost(str(case.out)) if new_path == str(case.out) else set()
            finding.silent += bool(lost)
            finding.harmless += str(disk.root) in arguments and not lost
            finding.notes += [f"{case.name}: {sorted(Path(path).name for path in lost)}"] if lost else []
            if new_path and "/.unfinished/" in new_path and not Path(new_path).name.startswith("."):
                pieces.times += 1
                pieces.silent += new_path in disk.unsynced
                pieces.harmless += new_path not in disk.unsynced
        if not n_calls or not disk.files:
            raise RuntimeError(f"strace recorded no writes of {case.name}: check that strace works here")
        shutil.rmtree(case.out)
    return [finding, pieces]


def traced_calls(case: Case) -> list[tuple[str, str]]:
    """Run a command under strace. Return the names and arguments of its successful system calls, in order."""
    log = case.scratch / "strace"
    command = [sys.executable, "-m", "freebits.cli", *case.argv()]
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
    subprocess.run([*trace, *command], check=True, capture_output=True)
    matches = (_LINE.match(line) for line in _join_split_calls(log.read_text(errors="replace").splitlines()))
    return [(match[1], match[2]) for match in matches if match]


def _paths(arguments: str) -> list[str]:
    """Return the paths among the arguments. Names relative to an open folder become absolute."""
    handle = _HANDLE.match(arguments)
    return [str(Path(handle[2] if handle else "/", path)) for path in _PATH.findall(arguments)]


def _join_split_calls(lines: list[str]) -> list[str]:
    """Join calls that strace split into two lines, because of a call in another thread, at the second line."""
    unfinished: dict[str, str] = {}
    joined = []
    for line in lines:
        thread = line.split(maxsplit=1)[0]
        if line.endswith("<unfinished ...>"):
            unfinished[thread] = line.removesuffix("<unfinished ...>")
        elif "resumed>" in line:
            joined.append(unfinished.pop(thread, "") + line.partition("resumed>")[2])
        else:
            joined.append(line)
    return joined
