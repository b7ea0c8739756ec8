"""Give every attack to every verb that reads, in this process: what came of it, how long, how much memory.

python -m tests.attacks.run BASES SCRATCH     # prints JSON
"""

import contextlib
import io
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from freebits.cli.main import main
from tests.attacks import load_all

DENSE = {"dense", "sliced", "low rank"}


def commands(folder: Path, base: str, scratch: Path) -> list[list[str]]:
    """What is done with a folder that somebody sent."""
    out = str(scratch / "out")
    either = [["pack", str(folder), out, "--codec", "none"]] if base in DENSE else [["unpack", str(folder), out]]
    verify = [] if base in DENSE else [["verify", str(folder)]]
    return [["inspect", str(folder)], *either, *verify, ["eval", str(folder), "--seq-len", "8", "--limit", "1"]]


def run(bases: Path, scratch: Path) -> list[dict[str, Any]]:
    """Everything, one after another."""
    results = []
    for name, (base, spoil) in load_all().items():
        folder = scratch / "folder" / base.replace(" ", "-")
        shutil.rmtree(scratch / "folder", ignore_errors=True)
        shutil.copytree(bases / base, folder, symlinks=True)
        spoil(folder)
        for command in commands(folder, base, scratch):
            shutil.rmtree(scratch / "out", ignore_errors=True)
            results.append({"attack": name, "verb": command[0], **_tried(command)})
            results[-1]["left"] = sorted(path.name for path in scratch.iterdir() if path.name not in ("folder", "out"))
            results[-1]["ran"] = (folder / "ran").exists()
    return results


def _tried(command: list[str]) -> dict[str, Any]:
    """Exit code, what was said, seconds, and by how many bytes the most memory grew."""
    said, told = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _peak(), time.perf_counter()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
        try:
            code = main(command)
        except BaseException as error:  # a traceback is what must not be
            code, _ = -1, said.write(f"TRACEBACK {type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    printable = all(c.isprintable() or c == "\n" for c in said.getvalue() + told.getvalue())
    return {
        "code": code,
        "said": said.getvalue()[:300],
        "lines": said.getvalue().count("\n"),
        "printable": printable,
        "seconds": seconds,
        "memory": _peak() - before,
    }


def _peak() -> int:
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]))))  # noqa: T201
