"""The house: imports run one way, and the public names are these."""

import ast
import subprocess
import sys
from pathlib import Path

import freebits

SOURCE = Path(freebits.__file__).parent
ORDER = (
    *("limits", "errors", "options", "version", "types"),
    *("execution", "storage", "codecs", "models", "transforms", "packed", "dequantization"),
    *("integrations", "calibration", "quantization", "evaluation", "api", "cli", "__init__"),
)
"""Modules and packages; each imports only those before it."""
WITH_TRANSFORMERS = {"models", "integrations", "calibration", "quantization", "evaluation", "api", "cli"}


def files(package: str) -> list[Path]:
    folder = SOURCE / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [SOURCE / f"{package}.py"]


def imported(file: Path) -> set[str]:
    """Every module that a file imports, `from freebits import x` as `freebits.x`."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            ours = node.module == "freebits"
            modules |= {f"freebits.{alias.name}" for alias in node.names} if ours else {node.module}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def test_imports_run_one_way() -> None:
    known = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert known == {*ORDER}
    for number, package in enumerate(ORDER):
        for file in files(package):
            ours = {name.split(".")[1] for name in imported(file) if name.startswith("freebits.")}
            assert ours <= {*ORDER[: number + 1]}, file


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from freebits import cli\nfrom freebits.packed.reader import x\nimport torch\n")
    assert imported(tmp_path / "a.py") == {"freebits.cli", "freebits.packed.reader", "torch"}


def test_what_reads_and_writes_files_does_not_import_transformers() -> None:
    for file in SOURCE.rglob("*.py"):
        if "transformers" in {name.split(".")[0] for name in imported(file)}:
            assert file.relative_to(SOURCE).parts[0] in WITH_TRANSFORMERS, file


def test_every_package_says_what_belongs_in_it() -> None:
    for file in SOURCE.rglob("__init__.py"):
        if file.parent != SOURCE:
            [docstring] = ast.parse(file.read_text(encoding="utf-8")).body
            assert isinstance(docstring, ast.Expr)


def test_no_function_is_long() -> None:
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in (
                "compress",
                "lowrank",
                "quantize",
                "recover",
                "slice_model",
            ):  # arguments
                assert (node.end_lineno or 0) - node.lineno < 60, f"{file}: {node.name}"


def test_importing_and_asking_for_help_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, freebits, freebits.cli.parser as p;"
        "p.build_parser().format_help();"
        "print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names() -> None:
    assert freebits.__all__ == [
        "CheckpointError",
        "FreebitsError",
        "Parallel",
        "UnsupportedModelError",
        "UsageError",
        "__version__",
        "compress",
        "estimate",
        "evaluate",
        "import_slicegpt",
        "inspect",
        "load",
        "lowrank",
        "pack",
        "quantize",
        "recover",
        "rotate_model",
        "slice_model",
        "unpack",
        "verify",
        "write_report",
    ]
    assert all(hasattr(freebits, name) for name in freebits.__all__)
