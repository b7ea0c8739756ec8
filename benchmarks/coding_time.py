"""Measure encoding and decoding time of a sliced OPT-1.3B with random weights. Ten minutes, 8 GB of disk.

    python -m benchmarks.coding_time

The paper reports 3.9 minutes (20 %) and 3.5 minutes (30 %) to encode, and 1.5 minutes to decode, on a 16-core Ryzen 9
7950X.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import freebits
from benchmarks.results import print_table, save_csv
from freebits.api.estimate import dense_shapes
from freebits.models.architecture import Architecture
from freebits.models.layout import Layout
from freebits.storage.writer import CheckpointWriter
from freebits.transforms.slicing import sliced_size

CONFIG = Path(__file__).parent / "configs" / "opt-1.3b.json"
PAPER_MINUTES = {0.2: (3.9, 1.5), 0.3: (3.5, 1.5)}
"""Sparsity → (encoding, decoding)."""
HEADER = ("sparsity", "step", "minutes", "paper, minutes", "ratio", "share in eigendecompositions", "peak memory, GB")


def random_sliced(folder: Path, sparsity: float) -> None:
    """Write a sliced checkpoint with random weights. Their scale decays along the stream, as after slicing."""
    config = json.loads(CONFIG.read_text())
    config |= {"tie_word_embeddings": False}
    architecture = Architecture.of(config)
    layout = Layout.sliced(architecture, sliced_size(architecture.hidden_size, sparsity))
    shapes = layout.shapes(architecture, dense_shapes(config, CONFIG))
    config |= {"model_type": "sliced_opt", "dtype": "float16", "tie_word_embeddings": False, **layout.to_config()}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with CheckpointWriter(folder, shapes) as writer:
        for name, shape in shapes.items():
            tensor = 0.03 * torch.randn(shape, generator=generator)
            for axis in architecture.weights[name].axes:
                decay = torch.linspace(0, -1, shape[axis.dim]).exp2()
                tensor = (tensor.movedim(axis.dim, -1) * decay).movedim(-1, axis.dim)
            writer.write(name, tensor.half())


def step(name: str, source: Path, out: Path) -> dict[str, float]:
    """Run `pack` or `unpack` in a child process; return seconds, peak memory and share of eigendecompositions."""
    command = [sys.executable, "-m", "benchmarks.coding_time", name, str(source), str(out)]
    result: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return result


def measured_step(name: str, source: str, out: str) -> None:
    """Run in the child process of `step`, and print the measurements as JSON."""
    eigh_seconds: list[float] = []  # appending is safe from any thread
    eigh = torch.linalg.eigh

    def timed(matrix: torch.Tensor) -> object:
        start = time.thread_time()
        result = eigh(matrix)
        eigh_seconds.append(time.thread_time() - start)
        return result

    torch.linalg.eigh = timed
    process_start, start = time.process_time(), time.perf_counter()
    freebits.pack(source, out, codec="bits-back", entropy="none") if name == "pack" else freebits.unpack(source, out)
    seconds, process_seconds = time.perf_counter() - start, time.process_time() - process_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "share": sum(eigh_seconds) / process_seconds, "peak": peak}))


def main() -> None:
    """Measure, print and save."""
    rows = []
    for sparsity, paper_minutes in PAPER_MINUTES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folders = [Path(scratch) / name for name in ("sliced", "packed", "unpacked")]
            random_sliced(folders[0], sparsity)
            steps = zip(("pack", "unpack"), paper_minutes, folders, folders[1:], strict=False)
            for name, paper, source, out in steps:
                result = step(name, source, out)
                minutes = result["seconds"] / 60
                figures = (f"{minutes:.2f}", paper, f"{minutes / paper:.2f}", f"{result['share']:.0%}")
                rows.append((f"{sparsity:.0%}", name, *figures, f"{result['peak'] / 1e9:.2f}"))
                print(rows[-1], flush=True)
    print_table(HEADER, rows)
    save_csv("coding_time", HEADER, rows)


if __name__ == "__main__":
    measured_step(*sys.argv[1:]) if len(sys.argv) > 1 else main()
