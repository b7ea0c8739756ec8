"""The house: imports run one way, and the public names are these."""

import ast
import subprocess
import sys
from pathlib import Path

import freebits

SOURCE = Path(freebits.__file__).parent
FLOORS = {
    "limits": set(),
    "errors": {"limits"},
    "options": set(),
    "version": set(),
    "kind": {"limits"},
    "import_hook": set(),
    "work": {"errors", "options"},
    "architecture": {"errors", "limits"},
    "checkpoint": {"errors", "kind", "limits", "version", "work"},
    "symmetry": {"architecture"},
    "codes": {"kind", "limits", "symmetry"},
    "quantization": {"codes"},
    "reduction": set(),
    "calibration": set(),
    "moves": {"architecture", "calibration", "checkpoint", "codes", "errors", "kind", "symmetry", "work"},
    "packed": {
        *("architecture", "checkpoint", "codes", "errors", "kind", "limits", "moves", "options", "version", "work"),
    },
    "report": {"architecture", "checkpoint", "errors", "kind", "packed"},
    "pipelines": {"checkpoint", "packed"},
    "quantized_inputs": {"checkpoint", "errors", "kind", "packed", "report"},
    "huggingface": {
        *("architecture", "calibration", "checkpoint", "codes", "errors", "kind", "limits", "moves", "options"),
        *("packed", "quantization", "quantized_inputs", "reduction", "report", "symmetry", "version", "work"),
    },
    "verbs": {
        *("architecture", "checkpoint", "errors", "huggingface", "options", "packed", "pipelines", "report", "work"),
    },
    "evaluation": {
        *("architecture", "calibration", "checkpoint", "errors", "huggingface", "kind", "moves", "options", "packed"),
        *("report", "work"),
    },
    "compression": {
        *("calibration", "checkpoint", "errors", "evaluation", "huggingface", "moves", "packed", "pipelines"),
        *("quantized_inputs", "report", "work"),
    },
    "demo": {"calibration", "evaluation", "huggingface", "report", "verbs", "work"},
    "cli": {
        "checkpoint",
        "compression",
        "demo",
        "errors",
        "evaluation",
        "huggingface",
        "moves",
        "options",
        "report",
        "verbs",
        "version",
        "work",
    },
    "__init__": {
        "compression",
        "errors",
        "evaluation",
        "huggingface",
        "import_hook",
        "report",
        "verbs",
        "version",
        "work",
    },
}
"""What each module or package may import of the others: what stands above it."""


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
    assert known == FLOORS.keys()
    order = list(FLOORS)
    for package, allowed in FLOORS.items():
        assert all(order.index(name) < order.index(package) for name in allowed), package
        for file in files(package):
            ours = {name.split(".")[1] for name in imported(file) if name.startswith("freebits.")}
            assert ours <= allowed | {package}, file


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from freebits import cli\nfrom freebits.packed.reader import x\nimport torch\n")
    assert imported(tmp_path / "a.py") == {"freebits.cli", "freebits.packed.reader", "torch"}


def test_only_huggingface_and_the_command_line_import_transformers() -> None:
    for file in SOURCE.rglob("*.py"):
        if "transformers" in {name.split(".")[0] for name in imported(file)}:
            assert file.parent.name in ("huggingface", "cli"), file


def test_no_two_modules_share_a_name_and_no_function_is_long() -> None:
    modules = [file for file in SOURCE.rglob("*.py") if file.stem not in ("__init__", "__main__")]
    assert len({file.stem for file in modules}) == len(modules)
    for file in modules:
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
