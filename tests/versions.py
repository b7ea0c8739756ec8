"""Run the tests that need no extra with the oldest and the newest supported packages: `make versions`.

    python -m tests.versions FOLDER [NAME …]

Creates one environment per NAME in FOLDER, and reuses existing ones. With CUDA, PyTorch takes gigabytes.
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
"""Name of an environment → version of Python. Environments whose Python is missing on this machine are skipped."""


def main() -> int:
    """Create the environments, run the tests, and write the results. Return 1 if a test failed, otherwise 0."""
    folder, names = Path(sys.argv[1]).absolute(), sys.argv[2:] or [*ENVIRONMENTS]
    other_rows = [row for row in saved_rows() if row[0] not in names]
    rows: list[tuple[str, ...]] = []
    for name in names:
        python = shutil.which(f"python{ENVIRONMENTS[name]}")
        if python is None:
            print(f"{name}: skipped, because python{ENVIRONMENTS[name]} is not on the PATH")  # noqa: T201
            continue
        environment_python = create_environment(folder / name, python, oldest=name == "oldest")
        start = time.monotonic()
        tests = [str(ROOT / "tests" / f"test_{file}.py") for file in FILES.split()]
        command = [str(environment_python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not smollm2", *tests]
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        output = process.stdout
        counts = {
            outcome: re.findall(rf"(\d+) {outcome}", output) or ["0"] for outcome in ("passed", "failed", "error")
        }
        failed = int(counts["failed"][-1]) + int(counts["error"][-1]) or int(process.returncode != 0)
        figures = (counts["passed"][-1], str(failed), f"{time.monotonic() - start:.0f}")
        rows.append((name, *versions(environment_python), *figures))
        print(rows[-1], *re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE), sep="\n")  # noqa: T201
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *other_rows, *rows])
    return int(any(row[-2] != "0" for row in rows))


def saved_rows() -> list[tuple[str, ...]]:
    """Return the rows of earlier runs."""
    if not RESULTS.exists():
        return []
    return [tuple(row) for row in csv.reader(RESULTS.read_text(encoding="utf-8").splitlines()[1:])]


def create_environment(folder: Path, python: str, *, oldest: bool) -> Path:
    """Create an environment with freebits and the oldest or newest supported packages. Return its Python."""
    environment_python = folder / "bin" / "python"
    install = [str(environment_python), "-m", "pip", "install", "--quiet"]
    if not environment_python.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        requirements = [requirement.partition(";")[0].strip() for requirement in project["dependencies"]]
        if oldest:
            requirements = [requirement.replace(">=", "==") for requirement in requirements]
        subprocess.run([*install, *requirements, "pytest", "hypothesis", "gguf", "accelerate"], check=True)
    subprocess.run([*install, "--no-deps", str(ROOT)], check=True)
    return environment_python


def versions(python: Path) -> list[str]:
    """Return the versions of Python and of the packages in `SHOWN`."""
    script = f"import sys; from importlib.metadata import version as v; print(sys.version.split()[0], *map(v, {SHOWN}))"
    return subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    sys.exit(main())
