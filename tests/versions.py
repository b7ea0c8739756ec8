"""The tests that need no extra, with the oldest and the newest packages that freebits says it takes: `make versions`.

    python -m tests.versions FOLDER [NAME …]

Makes an environment for each in FOLDER, gigabytes where PyTorch comes with CUDA; one that is there is used again.
"""

import csv
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions.csv"
FILES = "architecture canonical checkpoint codes compression entropy families fuzz golden huggingface lowrank packed"
FILES += " import pairs quantization slicing symmetry"
SHOWN = ("torch", "numpy", "transformers", "safetensors", "huggingface_hub")
HEADER = ("environment", "Python", *SHOWN, "passed", "failed", "seconds")
ENVIRONMENTS = {"oldest": "3.11", "newest-3.11": "3.11", "newest-3.12": "3.12", "newest": "3.13", "newest-3.14": "3.14"}
"""Name → Python; those of which there is no Python here are left out, and said."""


def main() -> int:
    """Make, run, tell; the exit code says whether all passed."""
    folder, names = Path(sys.argv[1]).absolute(), sys.argv[2:] or [*ENVIRONMENTS]
    kept = [row for row in saved() if row[0] not in names]
    rows: list[tuple[str, ...]] = []
    for name in names:
        python = shutil.which(f"python{ENVIRONMENTS[name]}")
        if python is None:
            print(f"{name}: there is no python{ENVIRONMENTS[name]} here")  # noqa: T201
            continue
        made = made_environment(folder / name, python, oldest=name == "oldest")
        start = time.monotonic()
        tests = [str(ROOT / "tests" / f"test_{file}.py") for file in FILES.split()]
        command = [str(made), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not smollm2", *tests]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        told = done.stdout
        counts = {what: re.findall(rf"(\d+) {what}", told) or ["0"] for what in ("passed", "failed", "error")}
        failed = int(counts["failed"][-1]) + int(counts["error"][-1]) or int(done.returncode != 0)
        figures = (counts["passed"][-1], str(failed), f"{time.monotonic() - start:.0f}")
        rows.append((name, *versions(made), *figures))
        print(rows[-1], *re.findall(r"^(?:FAILED|ERROR) .*", told, re.MULTILINE), sep="\n")  # noqa: T201
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *kept, *rows])
    return int(any(row[-2] != "0" for row in rows))


def saved() -> list[tuple[str, ...]]:
    """What was found before."""
    if not RESULTS.exists():
        return []
    return [tuple(row) for row in csv.reader(RESULTS.read_text(encoding="utf-8").splitlines()[1:])]


def made_environment(folder: Path, python: str, *, oldest: bool) -> Path:
    """The Python of an environment with freebits, of the least versions it names or of the newest there are."""
    inside = folder / "bin" / "python"
    install = [str(inside), "-m", "pip", "install", "--quiet"]
    if not inside.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        needs = [need.partition(";")[0].strip() for need in project["dependencies"]]
        pins = [need.replace(">=", "==") for need in needs] if oldest else needs
        subprocess.run([*install, *pins, "pytest", "hypothesis", "gguf", "accelerate"], check=True)
    subprocess.run([*install, "--no-deps", str(ROOT)], check=True)
    return inside


def versions(python: Path) -> list[str]:
    """Of Python and of what matters."""
    code = f"import sys; from importlib.metadata import version as v; print(sys.version.split()[0], *map(v, {SHOWN}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    sys.exit(main())
