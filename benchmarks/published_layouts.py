"""Published layouts: are models packed, quantized and loaded by the names that are on the hub?

    python -m benchmarks.published_layouts [NAME ...]

For each of the checkpoints in `tests/published_layouts.json` a small random model is laid out as that one is on the hub
(`tests/published.py`): names, ties, stacks or single experts, layers that predict several tokens at once, quantized
weights. *Names*: whether all are as published. *Lossless*: whether `pack --codec none` and `unpack` give the file back
byte for byte, and which class loads what was packed. *Quantized* at 6 bits: the share of the weights, the part of it by
the weights alone, and the mean KL divergence of what `from_pretrained` loads from the original, in nats per token.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import freebits
from benchmarks.model_types import BITS, CALIBRATION, TEXT, TOKENS, attempt, kl, one
from benchmarks.results import many_small_models, print_table, save_csv, saved_rows, write_page
from freebits.calibration.streamed import window_logits
from tests.published import LAYOUTS, auto_of, save_layout

HEADER = (
    "model",
    "type",
    "weights",
    "names",
    "lossless",
    "loads as",
    "quantized",
    "share",
    "alone",
    "logits differ by",
)
PAGE = Path(__file__).parent.parent / "docs" / "published_layouts.md"


def main() -> None:
    """Try each layout, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    many_small_models()
    before = saved_rows("published_layouts")
    rows = [row for row in before if arguments.names and row[0] not in arguments.names]
    for name in arguments.names or LAYOUTS:
        rows.append((name, *tried(name)))
        print("; ".join(rows[-1]), flush=True)
        rows.sort(key=lambda row: [*LAYOUTS].index(row[0]))
        save_csv("published_layouts", HEADER, rows)
        page(rows)
    print_table(HEADER, rows)


def page(rows: list[tuple[str, ...]]) -> None:
    """The table as a page of the documentation."""
    about = (
        f"Made by `python -m benchmarks.published_layouts` with transformers {transformers.__version__}: small random "
        "models, each laid out as a published checkpoint is on the hub. *Alone* is the share that is rounded by its "
        f"weights alone. Quantized at {BITS} bits; KL in nats per token."
    )
    write_page(PAGE, "Published layouts that were tried", about, HEADER, rows)


def tried(name: str) -> tuple[str, ...]:
    """The cells of a row."""
    layout = LAYOUTS[name]
    with tempfile.TemporaryDirectory() as scratch:
        dense, packed, back, rounded = (Path(scratch) / part for part in ("dense", "packed", "back", "rounded"))
        other = save_layout(name, dense)
        told: tuple[str, ...] = (
            layout["model_type"],
            layout["quantized"] or "16 bits",
            "published" if not other else f"{len(other)} differ",
        )
        try:
            freebits.pack(dense, packed, codec="none")
            freebits.unpack(packed, back)
            files = ("model.safetensors", "config.json")
            equal = all((back / file).read_bytes() == (dense / file).read_bytes() for file in files)
        except Exception as error:
            return (*told, one(error), "", "", "", "", "")
        told += ("yes" if equal else "no", loaded_class(dense, packed, layout))
        try:
            coverage = freebits.quantize(dense, rounded, calibration=TEXT, **CALIBRATION)["coverage"]
        except Exception as error:
            return (*told, one(error), "", "", "")
        told += ("yes", f"{coverage['share']:.4f}", f"{coverage['uncalibrated']:.4f}")
        return (*told, attempt(lambda: difference(dense, rounded, layout)))


def loaded_class(dense: Path, packed: Path, layout: dict[str, Any]) -> str:
    """The class that loads what was packed without loss, if the original loads."""
    try:
        auto_of(layout).from_pretrained(dense)
    except Exception as error:
        return f"the original does not load ({type(error).__name__})"
    return attempt(lambda: type(auto_of(layout).from_pretrained(packed)).__name__)


@torch.no_grad()
def difference(dense: Path, rounded: Path, layout: dict[str, Any]) -> str:
    """The mean KL divergence of the quantized model from the original; by our engine, if the class runs on no text."""
    reference: Any = freebits.load(dense, dtype=torch.float32).eval()
    model = auto_of(layout).from_pretrained(rounded, dtype=torch.float32).eval()
    try:
        expected, found = (of(input_ids=TOKENS, use_cache=False).logits for of in (reference, model))
    except Exception:
        expected, found = (torch.stack([*window_logits(folder, TOKENS)]) for folder in (dense, rounded))
    return f"{kl(expected, found):.2g}"


if __name__ == "__main__":
    main()
