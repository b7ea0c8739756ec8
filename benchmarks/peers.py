"""Measure other tools' quantized versions of the off-grid demo model, in the same way as `benchmarks.quantize`.

    python -m benchmarks.peers --data DATA [--llama-cpp SOURCE --binaries BIN] [--only "NAME; …"]

DATA contains `wikitext-2-raw`. SOURCE is the source folder of llama.cpp with `convert_hf_to_gguf.py`; BIN contains
`llama-quantize` and `llama-imatrix`. Without these two options the rows of llama.cpp are left out. Install
bitsandbytes and nncodec for their rows. The weights of every model are converted to float32 and run by
transformers, so the stored weights are compared, not the kernels. Bytes are those of the GGUF file, of the files that
`save_pretrained` writes, or of NNCodec's bitstreams.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.off_grid import off_grid
from benchmarks.quantize import WINDOWS, compare
from benchmarks.results import print_table, save_csv, saved_rows
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
NNCODEC_STEPS = (-26, -24, -22)
"""Quantization parameters of NNCodec. The step doubles every 4."""


def main() -> None:
    """Measure the chosen rows, and save them with the rows measured before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--binaries", type=Path)
    parser.add_argument("--only", default="", help="parts of the names of rows to measure")
    arguments = parser.parse_args()
    rows = {row[0]: row for row in saved_rows("peers")}
    with tempfile.TemporaryDirectory() as scratch:
        dense = off_grid(Path(scratch) / "off-grid")
        texts = arguments.data / "wikitext-2-raw"
        windows = token_windows(dense, (texts / "wiki.valid.raw").read_text(encoding="utf-8"), 1024, WINDOWS)
        reference = load(dense, dtype=torch.float32).eval()
        parts = [part.strip() for part in arguments.only.split(";")]
        for name, make in all_rows(dense, Path(scratch), arguments.llama_cpp, arguments.binaries, texts):
            if any(part in name for part in parts):
                size, model = make()
                rows[name] = (name, str(size), *compare(reference, model, windows).values())
                print(rows[name], flush=True)
                ordered = sorted(rows.values(), key=n_bytes, reverse=True)
                save_csv("peers", HEADER, ordered)
    print_table(HEADER, rows.values())


def n_bytes(row: tuple[str, ...]) -> int:
    """Return the bytes in a row."""
    return int(row[1])


def all_rows(
    dense: Path, scratch: Path, source: Path | None, binaries: Path | None, texts: Path
) -> Iterator[tuple[str, Callable[[], tuple[int, Any]]]]:
    """Yield the name of each row and a function that returns the bytes and the loaded model."""
    if source and binaries:
        gguf, importance = scratch / "dense.gguf", scratch / "importance.gguf"
        run(sys.executable, source / "convert_hf_to_gguf.py", dense, "--outtype", "f16", "--outfile", gguf)
        for gguf_type in LLAMA_CPP:
            yield f"llama.cpp {gguf_type}", partial(from_gguf, binaries, gguf, gguf_type)
        train = scratch / "train.txt"
        text = (texts / "wikitext2_train.txt").read_text(encoding="utf-8")
        train.write_text(text[: text.rindex("\n")], encoding="utf-8")
        run(binaries / "llama-imatrix", "-m", gguf, "-f", train, "-o", importance, "--chunks", "100", "-c", "512")
        for gguf_type in WITH_IMPORTANCE:
            make = partial(from_gguf, binaries, gguf, gguf_type, "--imatrix", importance)
            yield f"llama.cpp {gguf_type}, {IMPORTANCE}", make
    for name, config in LIBRARIES.items():
        yield name, partial(from_library, dense, scratch / "saved", config)
    for step in NNCODEC_STEPS:
        yield f"NNCodec, dependent quantization, qp {step}", partial(from_nncodec, dense, scratch, step)


def from_gguf(binaries: Path, gguf: Path, gguf_type: str, *options: Any) -> tuple[int, Any]:
    """Quantize with llama.cpp; return the bytes of the file, and the model that transformers loads from it."""
    out = gguf.with_name(f"{gguf_type}.gguf")
    run(binaries / "llama-quantize", *options, gguf, out, gguf_type)
    size = out.stat().st_size
    model: Any = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32).eval()
    out.unlink()
    return size, model


def from_library(dense: Path, out: Path, config: Callable[[], Any]) -> tuple[int, Any]:
    """Quantize while transformers loads; return the bytes that `save_pretrained` writes, and the model."""
    model: Any = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config(), dtype=torch.float32).eval()
    model.save_pretrained(out)
    return sum(file.stat().st_size for file in out.iterdir()), model


@torch.no_grad()
def from_nncodec(dense: Path, scratch: Path, step: int) -> tuple[int, Any]:
    """Code each matrix by NNCodec (ISO/IEC 15938-17); return the bytes with 16-bit norms, and the decoded model."""
    nncodec = import_module("nncodec.tensor")
    options: dict[str, Any] = dict.fromkeys(("quantize_only", "tca", "compress_differences", "verbose"), False)
    options |= {"approx_method": "uniform", "qp": step, "nonweight_qp": -75, "use_dq": True, "row_skipping": True}
    options |= {"sparsity": 0.0, "struct_spars_factor": 0.0, "bitdepth": None, "tensor_path": None}
    options |= {"job_identifier": "", "results": str(scratch), "tensor_id": "0"}
    model, n_bytes = load(dense, dtype=torch.float32).eval(), 0
    for parameter in model.parameters():
        if parameter.dim() == 1:
            n_bytes += 2 * parameter.numel()
            continue
        stream = nncodec.encode(parameter.detach().clone(), options)
        n_bytes += len(stream)
        parameter.copy_(torch.as_tensor(nncodec.decode(stream, "0")))
    return n_bytes, model


def run(*command: Any) -> None:
    """Run an external program, and discard what it prints."""
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
