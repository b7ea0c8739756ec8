"""Compress the off-grid demo model to several sizes, at the default KL bound, and without loss.

    python -m benchmarks.compress DATA [SCRATCH]

The text is the first 16 windows of 1024 tokens of DATA/wikitext-2-raw/wiki.valid.raw. Each row takes five minutes.
Folders that exist in SCRATCH are reused.
"""

import filecmp
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import freebits
from benchmarks.off_grid import off_grid
from benchmarks.results import print_table, save_csv

HEADER = (
    *("target", "bytes", "vs dense", "mean KL, documentation", "perplexity ratio, WikiText-2", "mean KL, WikiText-2"),
    "seconds",
)
TARGETS: dict[str, dict[str, Any]] = {
    "none (mean KL 0.05)": {},
    "--target-ratio 0.6": {"target_ratio": 0.6},
    "--target-ratio 0.4": {"target_ratio": 0.4},
    "--target-ratio 0.3": {"target_ratio": 0.3},
}


def main() -> None:
    """Compress, measure, print and save."""
    text = (Path(sys.argv[1]) / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(temporary)
        dense = scratch / "off-grid"
        if not dense.is_dir():
            off_grid(dense)
        for name, target in TARGETS.items():
            result = compressed(dense, scratch / name, **target)
            verdict = freebits.verify(scratch / name, against=dense, text=text, seq_len=1024, limit=16)
            size = result["bytes"]["packed"]
            rows.append(
                (
                    *(name, f"{size:,}", f"{size / result['bytes']['dense'] - 1:.1%}"),
                    f"{result['fidelity']['mean_kl']:.4f}",
                    *(f"{verdict['ratio']:.4f}", f"{verdict['mean_kl']:.4f}", f"{result['seconds']:.0f}"),
                )
            )
            print(rows[-1], flush=True)
        result = compressed(dense, scratch / "--lossless", lossless=True)
        freebits.unpack(scratch / "--lossless", Path(temporary) / "unpacked")
        names = [file.name for file in dense.iterdir()]
        equal, *different = filecmp.cmpfiles(dense, Path(temporary) / "unpacked", names, shallow=False)
        assert sorted(equal) == sorted(names), different
        size = result["bytes"]["packed"]
        change = f"{size / result['bytes']['dense'] - 1:.1%}"
        rows.append(("--lossless", f"{size:,}", change, "byte for byte", "", "", f"{result['seconds']:.0f}"))
    print_table(HEADER, rows)
    save_csv("compress", HEADER, rows)


def compressed(dense: Path, out: Path, **target: Any) -> dict[str, Any]:
    """Return the result of `compress`, which is saved as JSON next to the folder."""
    saved = out.with_name(f"{out.name}.json")
    if not out.is_dir():
        saved.write_text(json.dumps(freebits.compress(dense, out, **target)))
    result: dict[str, Any] = json.loads(saved.read_text())
    return result


if __name__ == "__main__":
    main()
