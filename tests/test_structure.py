"""The house: imports run one way, and the public names are these."""

import ast
from pathlib import Path

import freebits

SOURCE = Path(freebits.__file__).parent
FLOORS = {
    "architecture": {"errors"},
    "checkpoint": {"errors"},
    "coding": set(),
    "entropy": set(),
    "symmetry": {"architecture"},
    "slicing": {"architecture", "checkpoint", "errors", "symmetry"},
    "packed": {"architecture", "checkpoint", "coding", "entropy", "errors", "progress", "symmetry", "version"},
    "huggingface": {"architecture", "checkpoint", "errors", "packed", "progress", "slicing", "text", "version"},
    "cli": {"demo", "errors", "evaluation", "huggingface", "packed", "progress", "version"},
    "evaluation": {"errors", "huggingface", "packed", "progress", "text"},
}
"""What each package may import of the others."""


def imported(file: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def test_imports_run_one_way() -> None:
    for package, allowed in FLOORS.items():
        for file in (SOURCE / package).rglob("*.py"):
            ours = {name.split(".")[1] for name in imported(file) if name.startswith("freebits.")}
            assert ours <= allowed | {package}, file


def test_only_huggingface_and_the_command_line_import_transformers() -> None:
    for file in SOURCE.rglob("*.py"):
        if "transformers" in {name.split(".")[0] for name in imported(file)}:
            assert file.parent.name in ("huggingface", "cli"), file


def test_public_names() -> None:
    assert freebits.__all__ == [
        "CheckpointError",
        "FreebitsError",
        "UnsupportedModelError",
        "UsageError",
        "__version__",
        "estimate",
        "evaluate",
        "inspect",
        "load",
        "pack",
        "slice_model",
        "unpack",
        "verify",
    ]
    assert all(hasattr(freebits, name) for name in freebits.__all__)
