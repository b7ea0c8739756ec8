"""Bytes and bits against perplexity and KL divergence: every way to quantize, on the off-grid demo model.

    python -m benchmarks.quantize --data DATA [--only "NAME; …"]

DATA is a folder with `wikitext-2-raw/wiki.valid.raw`. Everything is calibrated on text that the model writes itself,
and measured on the first 16 windows of 1024 tokens of WikiText-2's validation text. Bits are those of everything that
the quantized matrices take on disk; bytes are of the finished folder.
"""

import argparse
import csv
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

from benchmarks.off_grid import off_grid
from benchmarks.results import save_csv
from freebits.api.quantize import SAMPLES, WINDOW
from freebits.calibration.groups import RunningModel
from freebits.calibration.self_generated import self_generated_windows
from freebits.calibration.tokens import token_windows
from freebits.evaluation.perplexity import logits, loss
from freebits.evaluation.sizes import bytes_on_disk
from freebits.execution.executor import Parallel
from freebits.execution.progress import silent
from freebits.execution.work_store import Work, WorkStore
from freebits.integrations.loading import load
from freebits.packed.packing import publish
from freebits.packed.reader import PackedFolder
from freebits.quantization.measuring import measure_matrices
from freebits.quantization.rounding import Goal, write_rounded
from freebits.quantization.sensitivity_cache import SensitivityCache, whole_tensors
from freebits.storage.folder import Checkpoint
from freebits.storage.staging import new_directory
from freebits.transforms.slicing import perplexity

RESULTS = Path(__file__).parent / "results" / "quantize.csv"
HEADER = ("row", "bits", "bytes", "perplexity", "ratio", "mean_kl")
WINDOWS = 16
MB = 1_000_000
ROWS: dict[str, tuple[str, str, Goal]] = {
    # name: (which matrices, rotation, how)
    "whole, 102 MB": ("all", "none", Goal(size=102 * MB)),
    "whole, 90 MB": ("all", "none", Goal(size=90 * MB)),
    "whole, 78 MB": ("all", "none", Goal(size=78 * MB)),
    "whole, 68 MB": ("all", "none", Goal(size=68 * MB)),
    "whole, 60 MB": ("all", "none", Goal(size=60 * MB)),
    "whole, 52 MB": ("all", "none", Goal(size=52 * MB)),
    "linear, integers 6": ("linear", "none", Goal(bits=6)),
    "linear, integers 5": ("linear", "none", Goal(bits=5)),
    "linear, integers 3.80": ("linear", "none", Goal(bits=3.80)),
    "linear, integers 3.05": ("linear", "none", Goal(bits=3.05)),
    "linear, integers 2.40": ("linear", "none", Goal(bits=2.40)),
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
    """Measure each row that is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows, by parts of their names")
    parser.add_argument("--scratch", type=Path, help="keep what was made here")
    arguments = parser.parse_args()
    wanted = [name for name in ROWS if any(part in name for part in arguments.only.split(";"))]
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        scratch = arguments.scratch or Path(made)
        dense = scratch / "off-grid"
        if not dense.is_dir():
            off_grid(dense)
        text = (arguments.data / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")
        windows = token_windows(dense, text, 1024, WINDOWS)
        executor = stack.enter_context(Parallel().executor())
        caches, source = calibrated(dense, Work(executor, WorkStore(scratch / "store")))
        reference = load(dense, dtype=torch.float32).eval()
        for name in wanted:
            which, rotation, goal = ROWS[name]
            cache = caches[rotation]
            embedding = "model.embed_tokens.weight"
            chosen = {n for n in cache.tensors if which == "all" or (n == embedding) == (which == "embeddings")}
            out = scratch / name.replace(" ", "-").replace(",", "")
            shutil.rmtree(out, ignore_errors=True)
            with new_directory(out) as directory:
                of = cache.only(chosen), cache.only(())
                contents = write_rounded(directory, source, *of, goal, "entropy", executor, silent)
                history: list[dict[str, Any]] = [{"transform": goal.method, "fidelity": "lossy"}]
                publish(directory, source, contents, source.config, (goal.method, "auto"), history)
            folder = PackedFolder(out)
            n_weights_of = sum(source.specs[n].numel for n in chosen)
            coded = sum(
                spec.n_bytes for n, spec in folder.stored.items() if n.partition(".weight.")[0] + ".weight" in chosen
            )
            result = compared(reference, load(out, dtype=torch.float32).eval(), windows)
            row = {"row": name, "bits": f"{8 * coded / n_weights_of:.3f}", "bytes": bytes_on_disk(folder), **result}
            print(row, flush=True)
            rows = {of[0]: of for of in saved()} | {name: tuple(map(str, row.values()))}
            save_csv("quantize", HEADER, [rows[of] for of in ROWS if of in rows])
            plot()


def saved() -> list[tuple[str, ...]]:
    """The rows that were measured before."""
    if not RESULTS.exists():
        return []
    return [tuple(row) for row in csv.reader(RESULTS.open(newline="")) if row[0] in ROWS]


def plot() -> None:
    """Bytes against perplexity: whole models in integers, and linear layers in every way."""
    rows = [(name, int(size), float(ratio)) for name, _, size, _, ratio, _ in saved()]
    figure, axes = plt.subplots(figsize=(7, 4))
    lines = {"everything in integers": "whole", "linear layers in integers": "linear, integers"}
    for label, start in lines.items():
        points = sorted((size / MB, ratio) for name, size, ratio in rows if name.startswith(start))
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    for name, size, ratio in rows:
        if name in ("linear, gptq 4, rotated", "linear, gptq 5, rotated", "linear, pyramid 3.6, rotated"):
            axes.plot(size / MB, ratio, "x", color="black")
            axes.annotate(
                name.removeprefix("linear, "), (size / MB, ratio), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
    theirs = peers()
    axes.plot(
        [size / MB for _, size, _ in theirs], [ratio for *_, ratio in theirs], "s", color="gray", label="llama.cpp"
    )
    for name, size, ratio in theirs:
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
    """What llama.cpp makes without a text, as `benchmarks.peers` measured it."""
    path = RESULTS.with_name("peers.csv")
    rows = list(csv.reader(path.open(newline="")))[2:] if path.exists() else []
    return [
        (name, int(size), float(ratio)) for name, size, _, ratio, _ in rows if "imatrix" not in name and "cpp" in name
    ]


def calibrated(dense: Path, work: Work) -> tuple[dict[str, SensitivityCache], Checkpoint]:
    """What is known of each matrix, as it is and rotated."""
    source, running = Checkpoint(dense), RunningModel(dense, torch.device("cpu"))
    tokens = self_generated_windows(dense, SAMPLES, WINDOW, 0, torch.device("cpu"))
    caches = {}
    for name, rotation in (("none", None), ("hadamard", 0)):
        apart = Work(work.executor, WorkStore(work.store.folder / name))
        measured = measure_matrices(running, tokens, apart, 0, rotation, silent)
        caches[name] = SensitivityCache(apart, source, rotation)
        caches[name].add(whole_tensors(measured.matrices, source))
    return caches, source


@torch.no_grad()
def compared(reference: Any, model: Any, windows: torch.Tensor) -> dict[str, str]:
    """Perplexity against the reference's, and mean KL divergence from it."""
    losses: list[tuple[float, float]] = []
    divergence = 0.0
    for window in tqdm(windows, disable=None):
        theirs, ours = logits(reference, window), logits(model, window)
        losses.append((loss(theirs, window), loss(ours, window)))
        log_p, log_q = log_softmax(theirs, -1), log_softmax(ours, -1)
        divergence += kl_div(log_q, log_p, log_target=True, reduction="batchmean").item() / len(windows)
    before, after = (perplexity(of) for of in zip(*losses, strict=True))
    return {"perplexity": f"{after:.4f}", "ratio": f"{after / before:.4f}", "mean_kl": f"{divergence:.4f}"}


if __name__ == "__main__":
    main()
