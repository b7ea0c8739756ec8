"""Measure the demo model, sliced by 20 %, on two domains of text, for three calibration texts. Eight minutes.

    python -m benchmarks.domains DATA_DIR

DATA_DIR/wikitext-2-raw contains wikitext2_train.txt, whose incomplete last line is dropped, and wiki.valid.raw.
"""

import sys
import tempfile
from pathlib import Path

import freebits
from benchmarks.results import print_table, save_csv
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text

SAMPLES = 32
WINDOWS = 16
HEADER = ("calibrated on", "perplexity, held-out topics of the documentation", "perplexity, WikiText-2 validation")


def main() -> None:
    """Measure, print and save."""
    folder = Path(sys.argv[1]) / "wikitext-2-raw"
    train, valid = ((folder / name).read_text(encoding="utf-8") for name in ("wikitext2_train.txt", "wiki.valid.raw"))
    documentation, held_out = embedded_text()
    texts = {
        "self-generated data": None,
        "Python's documentation": documentation,
        "WikiText-2, training": train[: train.rindex("\n")],
    }
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("dense", *texts):
            path = demo_model() if name == "dense" else Path(scratch) / name
            if name in texts:
                freebits.slice_model(
                    demo_model(), path, sparsity=0.2, calibration=texts[name], samples=SAMPLES, force=True
                )
            perplexities = [
                freebits.evaluate(path, text=text, limit=WINDOWS)["perplexity"] for text in (held_out, valid)
            ]
            rows.append((name, *(f"{perplexity:.2f}" for perplexity in perplexities)))
            print(rows[-1], flush=True)
            save_csv("domains", HEADER, rows)
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
