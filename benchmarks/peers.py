"""What others make of the off-grid demo model, on the text and with the measure of `benchmarks.quantize`.

    python -m benchmarks.peers --data DATA [--llama-cpp SOURCE --binaries BIN] [--only "NAME; …"]

DATA is a folder with `wikitext-2-raw`; SOURCE is llama.cpp's, with `convert_hf_to_gguf.py`, BIN has `llama-quantize`
and `llama-imatrix` (without both, its rows are left out). bitsandbytes must be installed for its row. Their
numbers are turned back into floating point by transformers, which then runs every model in float32: what is compared is
what was stored, not the kernels. Bytes are those of the file (llama.cpp) or of what `save_pretrained` writes.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.off_grid import off_grid
from benchmarks.quantize import WINDOWS, compared
from benchmarks.results import RESULTS, print_table, save_csv
from freebits.calibration.tokens import token_windows
from freebits.integrations.loading import load

HEADER = ("row", "bytes", "perplexity", "ratio", "mean_kl")
IMPORTANCE = "imatrix, WikiText-2 training text"
LLAMA_CPP = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
WITH_IMPORTANCE = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ2_M")
LIBRARIES: dict[str, Callable[[], Any]] = {
    "bitsandbytes NF4, scales quantized": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
}


def main() -> None:
    """Measure each row that is wanted, and save it beside those that are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--binaries", type=Path)
    parser.add_argument("--only", default="", help="rows, by parts of their names")
    arguments = parser.parse_args()
    rows = saved()
    with tempfile.TemporaryDirectory() as made:
        dense = off_grid(Path(made) / "off-grid")
        texts = arguments.data / "wikitext-2-raw"
        windows = token_windows(dense, (texts / "wiki.valid.raw").read_text(encoding="utf-8"), 1024, WINDOWS)
        reference = load(dense, dtype=torch.float32).eval()
        parts = [part.strip() for part in arguments.only.split(";")]
        for name, make in all_rows(dense, Path(made), arguments.llama_cpp, arguments.binaries, texts):
            if any(part in name for part in parts):
                size, model = make()
                rows[name] = (name, str(size), *compared(reference, model, windows).values())
                print(rows[name], flush=True)
                ordered = sorted(rows.values(), key=n_bytes, reverse=True)
                save_csv("peers", HEADER, ordered)
    print_table(HEADER, rows.values())


def n_bytes(row: tuple[str, ...]) -> int:
    """Of a row."""
    return int(row[1])


def saved() -> dict[str, tuple[str, ...]]:
    """The rows that were measured before."""
    path = RESULTS / "peers.csv"
    if not path.exists():
        return {}
    return {row[0]: tuple(row) for row in list(csv.reader(path.open(newline="")))[2:]}


def all_rows(
    dense: Path, scratch: Path, source: Path | None, binaries: Path | None, texts: Path
) -> Iterator[tuple[str, Callable[[], tuple[int, Any]]]]:
    """Names, and what makes a model and says its bytes."""
    if source and binaries:
        gguf, importance = scratch / "dense.gguf", scratch / "importance.gguf"
        run(sys.executable, source / "convert_hf_to_gguf.py", dense, "--outtype", "f16", "--outfile", gguf)
        for spec in LLAMA_CPP:
            yield f"llama.cpp {spec}", partial(from_gguf, binaries, gguf, spec)
        train = scratch / "train.txt"
        text = (texts / "wikitext2_train.txt").read_text(encoding="utf-8")
        train.write_text(text[: text.rindex("\n")], encoding="utf-8")
        run(binaries / "llama-imatrix", "-m", gguf, "-f", train, "-o", importance, "--chunks", "100", "-c", "512")
        for spec in WITH_IMPORTANCE:
            yield f"llama.cpp {spec}, {IMPORTANCE}", partial(from_gguf, binaries, gguf, spec, "--imatrix", importance)
    for name, config in LIBRARIES.items():
        yield name, partial(from_library, dense, scratch / "saved", config)


def from_gguf(binaries: Path, gguf: Path, spec: str, *options: Any) -> tuple[int, Any]:
    """Quantized by llama.cpp, and turned back by transformers."""
    out = gguf.with_name(f"{spec}.gguf")
    run(binaries / "llama-quantize", *options, gguf, out, spec)
    size = out.stat().st_size
    model: Any = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32).eval()
    out.unlink()
    return size, model


def from_library(dense: Path, out: Path, config: Callable[[], Any]) -> tuple[int, Any]:
    """Quantized while transformers loads it; what it writes is measured."""
    model: Any = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config(), dtype=torch.float32).eval()
    model.save_pretrained(out)
    return sum(file.stat().st_size for file in out.iterdir()), model


def run(*command: Any) -> None:
    """A program of theirs."""
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
