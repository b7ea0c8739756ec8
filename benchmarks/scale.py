"""Time, memory and disk of large models: exact shapes, random weights, made and removed block by block.

    python -m benchmarks.scale SCRATCH [--models "opt-1.3b; opt-6.7b; llama-2-7b"] [--blocks 2,6] [--steps PART,…]
    python -m benchmarks.scale SCRATCH --jobs [--steps canonical]   # two pieces at once against one
    python -m benchmarks.scale SCRATCH --plot                       # of what was measured before

The weights of a stream's axis decay as those of a sliced model do, and shortcuts are corners of orthogonal matrices, as
slicing leaves them; no function is computed. Each step runs in a process of its own, which tells its seconds and the
most memory it held of its own (mapped files not counted, but there are none). SCRATCH needs four times the model on
disk. `copy` reads every tensor by the safetensors library, writes it by that and has it synced to the disk: the limit
of any unpacking.

All blocks of a model cost the same, so that with --blocks two models are made, of so few blocks, and seconds and bytes
are those of a straight line through both; the table says so.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import freebits
from benchmarks.results import RESULTS, print_table, save_csv
from freebits.api.estimate import dense_shapes
from freebits.models.layout import Layout
from freebits.models.table import Architecture, Role, Weight
from freebits.storage.folder import write_json
from freebits.storage.writer import CheckpointWriter
from freebits.transforms.orthogonal import random_orthogonal
from freebits.transforms.slicing import sliced_size

CONFIGS = Path(__file__).parent / "configs"
SPARSITY = 0.2
SHARD = 2 * 10**9
HEADER = (
    *("model", "step", "blocks", "seconds", "MB of the model a second", "peak memory, GB", "bytes of the model"),
    *("bytes of the result", "cores"),
)
Step = Callable[[Path, Path], object]
Row = tuple[object, ...]
JOBS_HEADER = (
    *("model", "codec", "seconds, 1 job, 1 thread", "2 jobs, 1 thread each", "1 job, 2 threads"),
    *("two jobs against one", "two threads against two jobs"),
)
Figures = tuple[float, float, int, int]


def packing(codec: str, entropy: str = "none", jobs: int | None = None) -> Step:
    """One way to pack."""
    parallel = freebits.Parallel(jobs=jobs)
    return lambda source, out: freebits.pack(source, out, codec=codec, entropy=entropy, parallel=parallel)


STEPS: dict[str, tuple[str, Step]] = {
    # name: (which folder it takes, what it does)
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
    parser.add_argument("--blocks", default="", help="two numbers of blocks, from which the whole follows")
    parser.add_argument("--jobs", action="store_true", help="two pieces at once against one")
    parser.add_argument("--plot", action="store_true", help="plot what was measured")
    parser.add_argument("--steps", default="", help="those with one of these parts in their names, and what they take")
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
    for model in (part.strip() for part in arguments.models.split(";")):
        config = json.loads((CONFIGS / f"{model}.json").read_text())
        n_blocks = config["num_hidden_layers"]
        counts = [int(count) for count in arguments.blocks.split(",")] if arguments.blocks else [n_blocks]
        found = [measured(config, arguments.scratch / model, arguments.steps.split(","), count) for count in counts]
        for name in found[0]:
            told = ", ".join(map(str, counts)) if arguments.blocks else "all"
            of = [one[name] for one in found]
            seconds, size, result = (whole([one[part] for one in of], counts, n_blocks) for part in (0, 2, 3))
            speed, memory = size / seconds / 1e6, max(one[1] for one in of)
            figures = (f"{seconds:.0f}", f"{speed:.0f}", f"{memory / 1e9:.2f}", f"{size:.0f}", f"{result:.0f}")
            rows.append((model, name, told, *figures, cores()))
        save_csv("scale", HEADER, merged(rows))
    print_table(HEADER, rows)


def whole(found: list[float], counts: list[int], n_blocks: int) -> float:
    """What a model of all blocks takes, from models of few, of which each takes the same more."""
    if len(found) == 1:
        return found[0]
    (first, last), (few, more) = found, counts
    return first + (last - first) / (more - few) * (n_blocks - few)


def merged(rows: list[Row]) -> list[Row]:
    """With the rows that were measured before, or on other machines."""
    new = {(*row[:2], row[-1]) for row in rows}
    return [row for row in saved() if (*row[:2], row[-1]) not in new] + rows


def cores() -> str:
    """Those that this process may use, of how many."""
    return f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"


def saved() -> list[tuple[str, ...]]:
    """What was measured before."""
    path = RESULTS / "scale.csv"
    return [tuple(row) for row in csv.reader(path.read_text().splitlines()[2:])] if path.exists() else []


def measured(config: dict[str, Any], scratch: Path, parts: list[str], blocks: int) -> dict[str, Figures]:
    """Of each step of a model of so many blocks: seconds, memory, bytes of the model and of the result."""
    scratch.mkdir(parents=True)
    folders = {"sliced": scratch / "sliced"}
    write_sliced(folders["sliced"], config, blocks)
    found: dict[str, Figures] = {}
    for name, (source, _) in STEPS.items():
        if any(part in name for part in parts):
            folders[name] = scratch / name.replace(" ", "-")
            seconds, memory = in_child(name, folders[source], folders[name])
            found[name] = (seconds, memory, n_bytes(folders["sliced"]), n_bytes(folders[name]))
            print(blocks, name, found[name], flush=True)
            if not any(of == name for of, _ in STEPS.values()):
                shutil.rmtree(folders[name])
    shutil.rmtree(scratch)
    return found


def in_child(name: str, source: Path, out: Path, **settings: str) -> tuple[float, float]:
    """Seconds and memory of a step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", str(out.parent), "--child", name, str(source), str(out)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings}).stdout
    seconds, memory = map(float, told.split())
    return seconds, memory


def measure_jobs(scratch: Path, parts: list[str]) -> None:
    """Two jobs against one where BLAS has one thread for each, and one with both threads; interleaved."""
    model, blocks = "opt-1.3b", 3
    source, rows = scratch / "sliced", list[Row]()
    scratch.mkdir(parents=True)
    write_sliced(source, json.loads((CONFIGS / f"{model}.json").read_text()), blocks)
    for codec in (codec for codec in ("canonical", "bits-back") if any(part in codec for part in parts)):
        seconds: dict[tuple[int, int], list[float]] = {(1, 1): [], (2, 2): [], (1, 2): []}
        for _ in range(3):
            for (jobs, threads), found in seconds.items():
                out = scratch / f"{codec}-{jobs}"
                found.append(in_child(f"pack {codec}, {jobs} jobs", source, out, OMP_NUM_THREADS=str(threads))[0])
                shutil.rmtree(out)
            print(codec, seconds, flush=True)
        one, two, both = (statistics.median(found) for found in seconds.values())
        figures = *(f"{value:.1f}" for value in (one, two, both)), f"{one / two:.2f}", f"{two / both:.2f}"
        rows.append((f"{model}, {blocks} blocks", codec, *figures))
        save_csv("jobs", JOBS_HEADER, rows)
    shutil.rmtree(scratch)
    print_table(JOBS_HEADER, rows)


def plot() -> None:
    """Seconds against parameters, with the exponent of a power fitted."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(6, 4))
    rows = saved()
    for step in ("pack canonical", "pack bits-back", "unpack canonical", "unpack bits-back"):
        points = sorted((int(row[6]) / 2e9, float(row[3])) for row in rows if row[1] == step)
        sizes, seconds = np.array(points).T
        exponent, offset = np.polyfit(np.log(sizes), np.log(seconds), 1)
        print(f"{step}: seconds grow as the parameters' power {exponent:.2f}")
        [line] = axes.loglog(sizes, seconds, "o", label=f"{step}: N^{exponent:.2f}")
        axes.loglog(sizes, np.exp(offset) * sizes**exponent, color=line.get_color(), linewidth=1)
    axes.set(xlabel="billion numbers of the sliced model", ylabel="seconds, two cores")
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "scale.png", dpi=150)


def n_bytes(folder: Path) -> int:
    """Of all files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def run(step: Step, source: Path, out: Path) -> None:
    """Do it, and print seconds and most memory of this process, less what it had before."""
    ended, most, before = threading.Event(), [0], own_memory()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    step(source, out)
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    print(seconds, most[0] - before)


def own_memory() -> int:
    """Bytes that are no file's."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def copy(source: Path, out: Path) -> None:
    """Through the safetensors library, shard by shard."""
    out.mkdir()
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            save_file({name: tensors.get_tensor(name) for name in tensors.keys()}, out / file.name)  # noqa: SIM118
        with (out / file.name).open("rb") as written:
            os.fsync(written.fileno())


def write_sliced(folder: Path, config: dict[str, Any], blocks: int) -> None:
    """A sliced model with random weights, in float16."""
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
    kept = {"model_type": architecture.family.sliced_model_type, "dtype": "float16", **layout.to_config()}
    write_json(folder / "config.json", config | kept | {"architectures": [architecture.family.sliced_causal_lm]})


def random_weight(shape: tuple[int, ...], weight: Weight, generator: torch.Generator) -> Tensor:
    """Normal numbers that decay along the axis of the stream, which begins with what varies most."""
    tensor = torch.randn(shape, generator=generator) * 0.02
    for axis in weight.axes if weight.role is not Role.SHORTCUT else ():
        decay = (1 + torch.arange(shape[axis.dim])).float() ** -0.25
        tensor *= decay.reshape([-1 if dim == axis.dim else 1 for dim in range(len(shape))])
    return tensor


if __name__ == "__main__":
    main()
