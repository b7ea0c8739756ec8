"""What the site has besides the pages of `docs`: those of the folder above, and pictures of results."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ABOVE = {"README.md": "index.md", "SECURITY.md": "SECURITY.md", "CHANGELOG.md": "CHANGELOG.md"}
ABOVE["CONTRIBUTING.md"] = "CONTRIBUTING.md"


def on_files(files: Files, *, config: Any) -> Files:
    """Add them."""
    for source, target in ABOVE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are on the site; what is not on it, code mostly, is named."""
    markdown = re.sub(r"\]\((?:\.\./)?benchmarks/results/", "](results/", markdown)
    markdown = re.sub(r"\]\((?:docs/|\.\./docs/)", "](", markdown)
    for source, target in ABOVE.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}", f"]({target}", markdown)
    return re.sub(r"\[([^\]]*)\]\((?:\.\./|LICENSE|src/|tests/|benchmarks/)[^)]*\)", r"\1", markdown)
