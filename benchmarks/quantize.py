"""Measure bits, bytes, perplexity and KL divergence of every quantization method on the off-grid demo model.

    python -m benchmarks.quantize --data DATA [--only "NAME; …"]

DATA contains `wikitext-2-raw/wiki.valid.raw`. All methods calibrate on self-generated data. They are measured on the
first 16 windows of 1024 tokens of WikiText-2's validation text. Bits include everything that the quantized matrices
take on disk; bytes are those of the finished folder.
"""

import argparse
import csv
import re
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

import benchmarks.group_rounding  # noqa: F401  (registers gptq and rtn)
from benchmarks.off_grid import off_grid
from benchmarks.results import save_csv
from freebits.api.quantize import SAMPLES, WINDOW
from freebits.calibration.groups import RunningModel
from freebits.calibration.self_generated import self_generated_windows
from freebits.calibration.tokens import token_windows
from freebits.evaluation.folder_sizes import bytes_on_disk
from freebits.evaluation.perplexity import logits, loss
from freebits.execution.executor import Parallel
from freebits.execution.progress import silent
from freebits.execution.work_store import Work, WorkStore
from freebits.integrations.loading import load
from freebits.packed.packing import publish
from freebits.packed.reader import PackedFolder
from freebits.quantization.measuring import measure_matrices
from freebits.quantization.rounding import Goal, write_rounded
from freebits.quantization.sensitivity_cache import SensitivityCache, fully_covered_matrices
from freebits.storage.checkpoint import Checkpoint
from freebits.storage.staging import new_directory
from freebits.transforms.slicing import perplexity

RESULTS = Path(__file__).parent / "results" / "quantize.csv"
HEADER = ("row", "bits", "bytes", "perplexity", "ratio", "mean_kl")
WINDOWS = 16
MB = 1_000_000
ROWS: dict[str, tuple[str, str, Goal]] = {
    # name: (which matrices, rotation, goal)
    "whole, 102 MB": ("all", "none", Goal(size=102 * MB)),
    "no trellis, 102 MB": ("all", "none", Goal(size=102 * MB, trellis=0)),
    "no trellis, 90 MB": ("all", "none", Goal(size=90 * MB, trellis=0)),
    "no trellis, 78 MB": ("all", "none", Goal(size=78 * MB, trellis=0)),
    "no trellis, 68 MB": ("all", "none", Goal(size=68 * MB, trellis=0)),
    "no trellis, 60 MB": ("all", "none", Goal(size=60 * MB, trellis=0)),
    "no trellis, 52 MB": ("all", "none", Goal(size=52 * MB, trellis=0)),
    "whole, 90 MB": ("all", "none", Goal(size=90 * MB)),
    "whole, 78 MB": ("all", "none", Goal(size=78 * MB)),
    "whole, 68 MB": ("all", "none", Goal(size=68 * MB)),
    "whole, 60 MB": ("all", "none", Goal(size=60 * MB)),
    "whole, 52 MB": ("all", "none", Goal(size=52 * MB)),
    "whole, 48 MB": ("all", "none", Goal(size=48 * MB)),
    "linear, integers 3.80": ("linear", "none", Goal(bits=3.80)),
    "linear, integers 3.05": ("linear", "none", Goal(bits=3.05)),
    "linear, integers 2.40": ("linear", "none", Goal(bits=2.40)),
    "linear, integers 6": ("linear", "none", Goal(bits=6)),
    "linear, integers 5": ("linear", "none", Goal(bits=5)),
    "linear, no trellis 6": ("linear", "none", Goal(bits=6, trellis=0)),
    "linear, no trellis 5": ("linear", "none", Goal(bits=5, trellis=0)),
    "linear, no trellis 3.80": ("linear", "none", Goal(bits=3.80, trellis=0)),
    "linear, no trellis 3.05": ("linear", "none", Goal(bits=3.05, trellis=0)),
    "linear, no trellis 2.40": ("linear", "none", Goal(bits=2.40, trellis=0)),
    "linear, gptq 4, rotated": ("linear", "hadamard", Goal(bits=4, method="gptq")),
    "linear, gptq 4": ("linear", "none", Goal(bits=4, method="gptq")),
    "linear, rtn 4": ("linear", "none", Goal(bits=4, method="rtn")),
    "linear, rtn 4, rotated": ("linear", "hadamard", Goal(bits=4, method="rtn")),
    "linear, pyramid 3.6, rotated": ("linear", "hadamard", Goal(bits=3.6, method="pyramid")),
    "linear, pyramid 3.6": ("linear", "none", Goal(bits=3.6, method="pyramid")),
    "linear, gptq 5, rotated": ("linear", "hadamard", Goal(bits=5, method="gptq")),
    "linear, gptq 3, rotated": ("linear", "hadamard", Goal(bits=3, method="gptq")),
    "linear, pyramid 4.8, rotated": ("linear", "hadamard", Goal(bits=4.8, method="pyramid")),
    "linear, pyramid 3.0, rotated": ("linear", "hadamard", Goal(bits=3.0, method="pyramid")),
    "embedding, integers 3.60": ("embeddings", "none", Goal(bits=3.60)),
}


def main() -> None:
    """Measure the chosen rows, save them with the rows measured before, and plot all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="parts of the names of rows to measure")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="windows of text; only %(default)s updates the main table"
    )
    parser.add_argument("--scratch", type=Path, help="folder in which to keep the quantized models")
    arguments = parser.parse_args()
    names = [name for name in ROWS if any(part.strip() in name for part in arguments.only.split(";"))]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        scratch = arguments.scratch or Path(temporary)
        dense = scratch / "off-grid"
        if not dense.is_dir():
            off_grid(dense)
        text = (arguments.data / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")
        windows = token_windows(dense, text, 1024, WINDOWS)
        executor = stack.enter_context(Parallel().executor())
        rotations = {ROWS[name][1] for name in names}
        store, table = WorkStore(scratch / f"store-{arguments.samples}"), "quantize"
        if arguments.samples != SAMPLES:
            table = f"quantize_{arguments.samples}_windows"
        caches, source = calibrated(dense, Work(executor, store), rotations, arguments.samples)
        reference = load(dense, dtype=torch.float32).eval()
        for name in names:
            which, rotation, goal = ROWS[name]
            cache = caches[rotation]
            embedding = "model.embed_tokens.weight"
            chosen = {
                tensor for tensor in cache.tensors if which == "all" or (tensor == embedding) == (which == "embeddings")
            }
            out = scratch / name.replace(" ", "-").replace(",", "")
            shutil.rmtree(out, ignore_errors=True)
            start = time.perf_counter()
            with new_directory(out) as directory:
                calibrated_cache, other_cache = cache.only(chosen), cache.only(())
                contents = write_rounded(
                    directory, source, calibrated_cache, other_cache, goal, "entropy", executor, silent
                )
                history: list[dict[str, Any]] = [{"transform": goal.method, "fidelity": "lossy"}]
                publish(directory, source, contents, source.config, (goal.method, "auto"), history)
            seconds = time.perf_counter() - start
            folder = PackedFolder(out)
            n_weights = sum(source.specs[tensor].numel for tensor in chosen)
            n_bytes = sum(
                spec.n_bytes
                for stored, spec in folder.stored.items()
                if re.sub(r"\.weight\b.*", ".weight", stored) in chosen
            )
            result = compare(reference, load(out, dtype=torch.float32).eval(), windows)
            row = {"row": name, "bits": f"{8 * n_bytes / n_weights:.3f}", "bytes": bytes_on_disk(folder), **result}
            print(row, f"rounded in {seconds:.1f} s", flush=True)
            rows = {saved[0]: saved for saved in saved_rows(table)} | {name: tuple(map(str, row.values()))}
            save_csv(table, HEADER, [rows[label] for label in ROWS if label in rows])
    plot()


def saved_rows(table: str) -> list[tuple[str, ...]]:
    """Return the saved rows of a table."""
    path = RESULTS.with_stem(table)
    return [tuple(row) for row in csv.reader(path.open(newline="")) if row[0] in ROWS] if path.exists() else []


def plot() -> None:
    """Plot perplexity against bytes of quantized models and of llama.cpp's files."""
    rows = [(name, int(size), float(ratio)) for name, _, size, _, ratio, _ in saved_rows("quantize")]
    figure, axes = plt.subplots(figsize=(7, 4))
    lines = {"everything": "whole", "linear layers": "linear, integers", "everything, no trellis": "no trellis"}
    for label, start in lines.items():
        points = sorted((size / MB, ratio) for name, size, ratio in rows if name.startswith(start))
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    for name, size, ratio in rows:
        if name in ("linear, gptq 4, rotated", "linear, gptq 5, rotated", "linear, pyramid 3.6, rotated"):
            axes.plot(size / MB, ratio, "x", color="black")
            axes.annotate(
                name.removeprefix("linear, "), (size / MB, ratio), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
    points_of_peers = peers()
    sizes, ratios = [size / MB for _, size, _ in points_of_peers], [ratio for *_, ratio in points_of_peers]
    axes.plot(sizes, ratios, "s", color="gray", label="llama.cpp")
    for name, size, ratio in points_of_peers:
        label = name.removeprefix("llama.cpp ")
        axes.annotate(label, (size / MB, ratio), fontsize=7, xytext=(5, 3), textcoords="offset points", color="gray")
    axes.set(
        xlabel="MB of the finished folder or file",
        ylabel="perplexity / dense, WikiText-2",
        xlim=(48, 158),
        ylim=(0.98, 1.65),
    )
    axes.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120, bbox_inches="tight")


def peers() -> list[tuple[str, int, float]]:
    """Return name, bytes and perplexity ratio of llama.cpp's files without an importance matrix."""
    path = RESULTS.with_name("peers.csv")
    rows = list(csv.reader(path.open(newline="")))[2:] if path.exists() else []
    return [
        (name, int(size), float(ratio)) for name, size, _, ratio, _ in rows if "imatrix" not in name and "cpp" in name
    ]


def calibrated(
    dense: Path, work: Work, rotations: set[str], samples: int
) -> tuple[dict[str, SensitivityCache], Checkpoint]:
    """Calibrate on self-generated data; return a sensitivity cache for each rotation, and the source."""
    source = Checkpoint(dense)
    tokens = self_generated_windows(dense, samples, WINDOW, 0, torch.device("cpu"))
    caches = {}
    for name in rotations:
        rotation, running = (0 if name == "hadamard" else None), RunningModel(dense, torch.device("cpu"))
        work_of_rotation = Work(work.executor, WorkStore(work.store.folder / name))
        measured = measure_matrices(running, tokens, work_of_rotation, 0, rotation, silent)
        caches[name] = SensitivityCache(work_of_rotation, source, rotation)
        caches[name].add(fully_covered_matrices(measured.matrices, source))
    return caches, source


_REFERENCE_LOGITS: dict[tuple[Any, int], torch.Tensor] = {}


def _reference_logits(reference: Any, number: int, window: torch.Tensor) -> torch.Tensor:
    """Return the logits of the reference model for a window. They are computed once, because they are needed often."""
    key = reference, number
    if key not in _REFERENCE_LOGITS:
        _REFERENCE_LOGITS[key] = logits(reference, window)
    return _REFERENCE_LOGITS[key]


@torch.no_grad()
def compare(reference: Any, model: Any, windows: torch.Tensor) -> dict[str, str]:
    """Return a model's perplexity, its ratio to the reference's, and the mean KL divergence from the reference."""
    losses: list[tuple[float, float]] = []
    divergence = 0.0
    for number, window in enumerate(tqdm(windows, disable=None)):
        expected, actual = _reference_logits(reference, number, window), logits(model, window)
        losses.append((loss(expected, window), loss(actual, window)))
        log_p, log_q = log_softmax(expected, -1), log_softmax(actual, -1)
        divergence += kl_div(log_q, log_p, log_target=True, reduction="batchmean").item() / len(windows)
    before, after = (perplexity(values) for values in zip(*losses, strict=True))
    return {"perplexity": f"{after:.4f}", "ratio": f"{after / before:.4f}", "mean_kl": f"{divergence:.4f}"}


if __name__ == "__main__":
    main()
