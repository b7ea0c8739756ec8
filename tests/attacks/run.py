"""Run the commands that read on each hostile folder, in this process. Record outcome, time and memory.

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
    """Return the command lines to run on a folder that somebody has sent."""
    out = str(scratch / "out")
    convert = [["pack", str(folder), out, "--codec", "none"]] if base in DENSE else [["unpack", str(folder), out]]
    verify = [] if base in DENSE else [["verify", str(folder)]]
    return [["inspect", str(folder)], *convert, *verify, ["eval", str(folder), "--seq-len", "8", "--limit", "1"]]


def run(bases: Path, scratch: Path) -> list[dict[str, Any]]:
    """Run all commands on all hostile folders, one after another. Return one result for each run."""
    results = []
    for name, (base, damage) in load_all().items():
        folder = scratch / "folder" / base.replace(" ", "-")
        shutil.rmtree(scratch / "folder", ignore_errors=True)
        shutil.copytree(bases / base, folder, symlinks=True)
        damage(folder)
        for command in commands(folder, base, scratch):
            shutil.rmtree(scratch / "out", ignore_errors=True)
            results.append({"attack": name, "command": command[0], **_run_command(command)})
            results[-1]["left"] = sorted(path.name for path in scratch.iterdir() if path.name not in ("folder", "out"))
            results[-1]["ran"] = (folder / "ran").exists()
    return results


def _run_command(command: list[str]) -> dict[str, Any]:
    """Return the exit code, the start of stderr, the seconds, and the growth of peak memory in bytes."""
    stderr, stdout = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")
    memory_before, start = _peak_memory(), time.perf_counter()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        try:
            exit_code = main(command)
        except BaseException as error:  # would print a traceback, which counts as a failure
            exit_code = -1
            stderr.write(f"TRACEBACK {type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    printable = all(c.isprintable() or c == "\n" for c in stderr.getvalue() + stdout.getvalue())
    return {
        "code": exit_code,
        "said": stderr.getvalue()[:300],
        "lines": stderr.getvalue().count("\n"),
        "printable": printable,
        "seconds": seconds,
        "memory": _peak_memory() - memory_before,
    }


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes. Writing 5 to `clear_refs` resets it."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]))))  # noqa: T201
