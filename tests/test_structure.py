"""The structure of the package: order of imports, public names, length of functions."""

import ast
import subprocess
import sys
from pathlib import Path

import freebits

SOURCE = Path(freebits.__file__).parent
ORDER = (
    *("limits", "errors", "options", "version", "types", "compiled"),
    *("execution", "storage", "codecs", "models", "transforms", "packed", "dequantization"),
    *("integrations", "calibration", "quantization", "evaluation", "api", "cli", "__init__"),
)
"""Modules and packages; each imports only itself and those before it."""
WITH_TRANSFORMERS = {"models", "integrations", "calibration", "quantization", "evaluation", "api", "cli"}
"""Packages that are allowed to import transformers."""
LONG_SIGNATURES = {
    "_pop",
    "compress",
    "lowrank",
    "pack",
    "prepare",
    "quantize",
    "recover",
    "slice_model",
    "write_rounded",
}
"""Functions with so many arguments that they are allowed to be long."""


def modules_of(package: str) -> list[Path]:
    folder = SOURCE / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [SOURCE / f"{package}.py"]


def imported_modules(file: Path) -> set[str]:
    """Return the modules that a file imports. `from freebits import x` counts as `freebits.x`."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "freebits":
                modules |= {f"freebits.{alias.name}" for alias in node.names}
            else:
                modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def test_packages_import_only_earlier_packages() -> None:
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names == {*ORDER}
    for number, package in enumerate(ORDER):
        for file in modules_of(package):
            packages = {name.split(".")[1] for name in imported_modules(file) if name.startswith("freebits.")}
            assert packages <= {*ORDER[: number + 1]}, file


def test_all_kinds_of_import_statements_are_recognized(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from freebits import cli\nfrom freebits.packed.reader import x\nimport torch\n")
    assert imported_modules(tmp_path / "a.py") == {"freebits.cli", "freebits.packed.reader", "torch"}


def test_packages_that_read_and_write_files_do_not_import_transformers() -> None:
    for file in SOURCE.rglob("*.py"):
        if "transformers" in {name.split(".")[0] for name in imported_modules(file)}:
            assert file.relative_to(SOURCE).parts[0] in WITH_TRANSFORMERS, file


def test_the_init_file_of_every_package_contains_only_a_docstring() -> None:
    for file in SOURCE.rglob("__init__.py"):
        if file.parent != SOURCE:
            [docstring] = ast.parse(file.read_text(encoding="utf-8")).body
            assert isinstance(docstring, ast.Expr)


def test_functions_have_fewer_than_60_lines() -> None:
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in LONG_SIGNATURES:
                assert (node.end_lineno or 0) - node.lineno < 60, f"{file}: {node.name}"


def test_import_and_help_load_neither_torch_nor_transformers_nor_numpy() -> None:
    program = (
        "import sys, freebits, freebits.cli.parser as p;"
        "p.build_parser().format_help();"
        "print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_public_names_are_these() -> None:
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
        "pack_series",
        "quantize",
        "recover",
        "rotate_model",
        "slice_model",
        "unpack",
        "verify",
        "write_report",
    ]
    assert all(hasattr(freebits, name) for name in freebits.__all__)
