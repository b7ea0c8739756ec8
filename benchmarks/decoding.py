"""Measure speed and memory of decoding quantized matrices. Two minutes.

    python -m benchmarks.decoding

The folder contains two blocks with the shapes of Llama-2-7B: random integers of 3.5 bits that decode to bfloat16. The
figures are output bytes per second with one and two threads, and the peak memory added by decoding, in units of one
block in bfloat16.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.results import print_table, save_csv
from freebits.codecs.registry import CODES
from freebits.execution.executor import Parallel
from freebits.packed.contents import STEM, Contents, digested
from freebits.packed.encoded_piece import Piece
from freebits.packed.packing import publish
from freebits.packed.reader import PackedFolder
from freebits.packed.recipe import Recipe
from freebits.storage.writer import CheckpointWriter
from freebits.types import TensorSpec

SHAPES = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096)} | {
    "gate_proj": (11008, 4096),
    "up_proj": (11008, 4096),
    "down_proj": (4096, 11008),
}
N_BLOCKS = 2
BLOCK = 2 * sum(rows * columns for rows, columns in SHAPES.values())
"""Bytes of one block in bfloat16."""
HEADER = ("threads", "MB of bfloat16 per second", "peak memory, blocks")


def write(directory: Path) -> None:
    """Write the packed folder. Its config is a stub, because the model is never run."""
    generator = torch.Generator().manual_seed(0)
    contents = Contents()
    names = {f"{block}.{name}.weight" for block in range(N_BLOCKS) for name in SHAPES}
    with CheckpointWriter(directory, {f"{name}.message": (10**12,) for name in names}, None, STEM) as writer:
        for name in sorted(names):
            rows, columns = SHAPES[name.split(".")[1]]
            integers = (torch.randn(rows, columns, generator=generator) * 2.7).round().int()
            scales = (torch.zeros(size, dtype=torch.int16) for size in (rows, columns))
            makes = {name: TensorSpec("BF16", (rows, columns))}
            coded = CODES["integers"].encode([integers, *scales], list(makes.values()))
            message = coded.parts["message"]
            stored = {f"{name}.message": (TensorSpec.of(message), message)}
            piece = Piece(stored, (Recipe("integers", {"message": f"{name}.message"}, makes, coded.params),))
            contents.write(writer, *digested(piece))
    source: Any = SimpleNamespace(path=directory, weight_files=())
    publish(directory, source, contents, {"model_type": "none"}, ("integers", "none"), history=[])


def decode(directory: Path, jobs: int) -> None:
    """Decode all tensors; print seconds and added peak memory in bytes."""
    torch.set_num_threads(jobs)
    packed = PackedFolder(directory)
    before = peak()
    start = time.perf_counter()
    packed.check(Parallel(jobs=jobs))
    seconds = time.perf_counter() - start
    print(seconds, peak() - before)


def peak() -> int:
    """Return the peak resident set of this process so far, in bytes (Linux)."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Measure, print and save."""
    if len(sys.argv) == 3:
        decode(Path(sys.argv[1]), int(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        rows = []
        for jobs in (1, 2):
            command = [sys.executable, "-m", "benchmarks.decoding", scratch, str(jobs)]
            runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
            seconds, memory = sorted(tuple(map(float, run.split())) for run in runs)[1]
            rows.append((jobs, f"{N_BLOCKS * BLOCK / seconds / 1e6:.0f}", f"{memory / BLOCK:.2f}"))
    print_table(HEADER, rows)
    save_csv("decoding", HEADER, rows)


if __name__ == "__main__":
    main()
