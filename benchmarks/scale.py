"""Measure time, memory and disk of packing and unpacking large models with exact shapes and random weights.

    python -m benchmarks.scale SCRATCH [--models "opt-1.3b; opt-6.7b; llama-2-7b"] [--blocks 2,6] [--steps PART,…]
    python -m benchmarks.scale SCRATCH --jobs [--steps canonical]   # compare two jobs with one
    python -m benchmarks.scale SCRATCH --plot                       # plot saved results

Weights decay along the axis of the stream, and shortcuts are corners of orthogonal matrices, as after slicing. The
models are never run. Each step runs in a child process, which reports its seconds and its peak memory without mapped
files. SCRATCH needs free space for four times the model. `copy` reads and writes every tensor with the safetensors
library and syncs the files to disk, as a lower bound for the time of unpacking.

All blocks of a model cost the same. With --blocks, only models with these two numbers of blocks are measured. Seconds
and bytes of the full model are extrapolated linearly; the column `blocks` contains the two numbers.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import freebits
from benchmarks.results import RESULTS, print_table, save_csv, saved_rows
from freebits.api.estimate import dense_shapes
from freebits.models.architecture import Architecture, Role, Weight
from freebits.models.layout import Layout
from freebits.storage.checkpoint import write_json
from freebits.storage.writer import CheckpointWriter
from freebits.transforms.orthogonal import random_orthogonal
from freebits.transforms.slicing import sliced_size

CONFIGS = Path(__file__).parent / "configs"
SPARSITY = 0.2
SHARD = 2 * 10**9
HEADER = (
    *("model", "step", "blocks", "seconds", "MB of the model per second", "peak memory, GB", "bytes of the model"),
    *("bytes of the result", "cores"),
)
Step = Callable[[Path, Path], object]
Row = tuple[object, ...]
JOBS_HEADER = (
    *("model", "codec", "seconds, 1 job, 1 thread", "2 jobs, 1 thread each", "1 job, 2 threads"),
    *("1 job / 2 jobs", "2 jobs / 2 threads"),
)
Figures = tuple[float, float, int, int]
"""Seconds, bytes of memory, bytes of the model, bytes of the result."""


def packing(codec: str, entropy: str = "none", jobs: int | None = None) -> Step:
    """Return a step that packs with these options."""
    parallel = freebits.Parallel(jobs=jobs)
    return lambda source, out: freebits.pack(source, out, codec=codec, entropy=entropy, parallel=parallel)


STEPS: dict[str, tuple[str, Step]] = {
    # name: (name of the source folder, function)
    "copy": ("sliced", lambda source, out: copy(source, out)),
    "pack canonical": ("sliced", packing("canonical")),
    "unpack canonical": ("pack canonical", freebits.unpack),
    "pack canonical+entropy": ("sliced", packing("canonical", "auto")),
    "unpack canonical+entropy": ("pack canonical+entropy", freebits.unpack),
    "pack bits-back": ("sliced", packing("bits-back")),
    "unpack bits-back": ("pack bits-back", freebits.unpack),
    "pack none+entropy": ("sliced", packing("none", "auto")),
    "unpack none+entropy": ("pack none+entropy", freebits.unpack),
}
JOBS = {f"pack {codec}, {n} jobs": packing(codec, jobs=n) for codec in ("canonical", "bits-back") for n in (1, 2)}


def main() -> None:
    """Measure every step of every model, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--models", default="opt-1.3b; opt-6.7b; llama-2-7b")
    parser.add_argument("--blocks", default="", help="two numbers of blocks to extrapolate from")
    parser.add_argument("--jobs", action="store_true", help="compare two jobs with one")
    parser.add_argument("--plot", action="store_true", help="plot saved results")
    parser.add_argument("--steps", default="", help="parts of the names of steps to run")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, source, out = arguments.child
        run((STEPS[name][1] if name in STEPS else JOBS[name]), Path(source), Path(out))
        return
    if arguments.plot:
        plot()
        return
    if arguments.jobs:
        measure_jobs(arguments.scratch, arguments.steps.split(","))
        return
    rows: list[Row] = []
    for model in (name.strip() for name in arguments.models.split(";")):
        config = json.loads((CONFIGS / f"{model}.json").read_text())
        n_blocks = config["num_hidden_layers"]
        counts = [int(count) for count in arguments.blocks.split(",")] if arguments.blocks else [n_blocks]
        runs = [measured(config, arguments.scratch / model, arguments.steps.split(","), count) for count in counts]
        for name in runs[0]:
            blocks = ", ".join(map(str, counts)) if arguments.blocks else "all"
            all_seconds, memory, sizes, results = zip(*(run[name] for run in runs), strict=True)
            seconds, size, result = (full_model(values, counts, n_blocks) for values in (all_seconds, sizes, results))
            speed = size / seconds / 1e6
            figures = (f"{seconds:.0f}", f"{speed:.0f}", f"{max(memory) / 1e9:.2f}", f"{size:.0f}", f"{result:.0f}")
            rows.append((model, name, blocks, *figures, cores()))
        save_csv("scale", HEADER, merged(rows))
    print_table(HEADER, rows)


def full_model(values: Sequence[float], counts: list[int], n_blocks: int) -> float:
    """Extrapolate linearly from models with `counts` blocks to one with `n_blocks`."""
    if len(values) == 1:
        return values[0]
    (first, last), (few, more) = values, counts
    return first + (last - first) / (more - few) * (n_blocks - few)


def merged(rows: list[Row]) -> list[Row]:
    """Return the saved rows of other steps or numbers of cores, then the new rows."""
    new = {(*row[:2], row[-1]) for row in rows}
    return [row for row in saved_rows("scale") if (*row[:2], row[-1]) not in new] + rows


def cores() -> str:
    """Return the number of cores that this process may use, and of all cores."""
    return f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"


def measured(config: dict[str, Any], scratch: Path, parts: list[str], blocks: int) -> dict[str, Figures]:
    """Measure the chosen steps of a model with this number of blocks."""
    scratch.mkdir(parents=True)
    folders = {"sliced": scratch / "sliced"}
    write_sliced(folders["sliced"], config, blocks)
    figures: dict[str, Figures] = {}
    for name, (source, _) in STEPS.items():
        if any(part in name for part in parts):
            folders[name] = scratch / name.replace(" ", "-")
            seconds, memory = in_child(name, folders[source], folders[name])
            figures[name] = (seconds, memory, n_bytes(folders["sliced"]), n_bytes(folders[name]))
            print(blocks, name, figures[name], flush=True)
            if not any(folder == name for folder, _ in STEPS.values()):
                shutil.rmtree(folders[name])
    shutil.rmtree(scratch)
    return figures


def in_child(name: str, source: Path, out: Path, **environment: str) -> tuple[float, float]:
    """Run a step in a child process with changed environment variables; return its seconds and memory."""
    command = [sys.executable, "-m", "benchmarks.scale", str(out.parent), "--child", name, str(source), str(out)]
    environment = {**os.environ, **environment}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    seconds, memory = map(float, output.split())
    return seconds, memory


def measure_jobs(scratch: Path, parts: list[str]) -> None:
    """Compare one job, two jobs, and one job with two BLAS threads, in interleaved runs."""
    model, blocks = "opt-1.3b", 3
    source, rows = scratch / "sliced", list[Row]()
    scratch.mkdir(parents=True)
    write_sliced(source, json.loads((CONFIGS / f"{model}.json").read_text()), blocks)
    for codec in (codec for codec in ("canonical", "bits-back") if any(part in codec for part in parts)):
        seconds: dict[tuple[int, int], list[float]] = {(1, 1): [], (2, 2): [], (1, 2): []}
        for _ in range(3):
            for (jobs, threads), values in seconds.items():
                out = scratch / f"{codec}-{jobs}"
                values.append(in_child(f"pack {codec}, {jobs} jobs", source, out, OMP_NUM_THREADS=str(threads))[0])
                shutil.rmtree(out)
            print(codec, seconds, flush=True)
        one_job, two_jobs, two_threads = medians = [statistics.median(values) for values in seconds.values()]
        ratios = f"{one_job / two_jobs:.2f}", f"{two_jobs / two_threads:.2f}"
        figures = *(f"{value:.1f}" for value in medians), *ratios
        rows.append((f"{model}, {blocks} blocks", codec, *figures))
        save_csv("jobs", JOBS_HEADER, rows)
    shutil.rmtree(scratch)
    print_table(JOBS_HEADER, rows)


def plot() -> None:
    """Plot seconds against the number of weights, with fitted power laws."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(6, 4))
    rows = saved_rows("scale")
    for step in ("pack canonical", "pack bits-back", "unpack canonical", "unpack bits-back"):
        points = sorted((int(row[6]) / 2e9, float(row[3])) for row in rows if row[1] == step)
        sizes, seconds = np.array(points).T
        exponent, offset = np.polyfit(np.log(sizes), np.log(seconds), 1)
        print(f"{step}: seconds are proportional to weights^{exponent:.2f}")
        [line] = axes.loglog(sizes, seconds, "o", label=f"{step}: N^{exponent:.2f}")
        axes.loglog(sizes, np.exp(offset) * sizes**exponent, color=line.get_color(), linewidth=1)
    axes.set(xlabel="billion weights of the sliced model", ylabel="seconds, two cores")
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "scale.png", dpi=150)


def n_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def run(step: Step, source: Path, out: Path) -> None:
    """Run a step; print its seconds and the peak memory that it adds to this process."""
    ended, peak, before = threading.Event(), [0], own_memory()

    def sample_memory() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], own_memory())

    sampler = threading.Thread(target=sample_memory)
    sampler.start()
    start = time.perf_counter()
    step(source, out)
    seconds = time.perf_counter() - start
    ended.set()
    sampler.join()
    print(seconds, peak[0] - before)


def own_memory() -> int:
    """Return the resident bytes of this process without mapped files (Linux)."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def copy(source: Path, out: Path) -> None:
    """Copy weights with the safetensors library, shard by shard."""
    out.mkdir()
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            save_file({name: tensors.get_tensor(name) for name in tensors.keys()}, out / file.name)  # noqa: SIM118
        with (out / file.name).open("rb") as written:
            os.fsync(written.fileno())


def write_sliced(folder: Path, config: dict[str, Any], blocks: int) -> None:
    """Write a sliced model with random weights in float16."""
    folder.mkdir()
    config = config | {"num_hidden_layers": blocks, "tie_word_embeddings": False}
    architecture = Architecture.of(config).with_tie(False)
    layout = Layout.sliced(architecture, sliced_size(architecture.hidden_size, SPARSITY))
    shapes = layout.shapes(architecture, dense_shapes(config, folder))
    generator = torch.Generator().manual_seed(0)
    widths = layout.widths or ()
    before = random_orthogonal(architecture.hidden_size, generator)
    with CheckpointWriter(folder, shapes, SHARD) as writer:
        for part in architecture.parts:
            corners: dict[str, Tensor] = {}
            for sub in part.sublayers:
                after = random_orthogonal(architecture.hidden_size, generator)
                before_width, after_width = widths[sub.site - 1], widths[sub.site]
                corners[sub.shortcut.weight] = (before[:, :before_width].T @ after[:, :after_width]).T
                before = after
            for name, weight in part.weights.items():
                if name in shapes:
                    tensor = corners.get(name)
                    tensor = random_weight(shapes[name], weight, generator) if tensor is None else tensor
                    writer.write(name, tensor.half())
    changes = {"model_type": architecture.family.sliced_model_type, "dtype": "float16", **layout.to_config()}
    write_json(folder / "config.json", config | changes | {"architectures": [architecture.family.sliced_causal_lm]})


def random_weight(shape: tuple[int, ...], weight: Weight, generator: torch.Generator) -> Tensor:
    """Return normally distributed weights that decay along the axis of the stream, as after slicing."""
    tensor = torch.randn(shape, generator=generator) * 0.02
    for axis in weight.axes if weight.role is not Role.SHORTCUT else ():
        decay = (1 + torch.arange(shape[axis.dim])).float() ** -0.25
        tensor *= decay.reshape([-1 if dim == axis.dim else 1 for dim in range(len(shape))])
    return tensor


if __name__ == "__main__":
    main()
