"""Tokens a second and memory of the quantized demo model, expanded and with its integers kept. Five minutes.

    python -m benchmarks.tokens

Each way in a process of its own, in bfloat16, turn about; the medians of three. Memory is what the process holds of its
own after loading, less what it held before: mapped files, which can be had again, not counted.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import freebits
from benchmarks.results import print_table, save_csv
from examples.demo_model import demo_model

WAYS = ("dense", "expanded", "integers kept")
N_TOKENS = 64
HEADER = ("model", "tokens per second, one sequence", "tokens per second, prompt of 512", "MB in memory")


def measure(way: str, folder: str) -> None:
    """Print tokens per second and bytes."""
    before = own_memory()
    kept = {"keep_integers": True} if way == WAYS[2] else {}
    model: Any = freebits.load(folder, dtype=torch.bfloat16, **kept).eval()
    after = own_memory()
    prompt = torch.randint(1000, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(prompt)
        start = time.perf_counter()
        model(prompt)
        read = time.perf_counter() - start
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
        start = time.perf_counter()
        model.generate(prompt[:, :8], max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS, **options)
        written = time.perf_counter() - start
    print(N_TOKENS / written, 512 / read, after - before)


def own_memory() -> int:
    """Bytes that are no file's."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Measure, print and save."""
    if len(sys.argv) == 3:
        measure(*sys.argv[1:])
        return
    with tempfile.TemporaryDirectory() as scratch:
        quantized = Path(scratch) / "quantized"
        freebits.quantize(demo_model(), quantized, bits=4)
        runs: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
        for _ in range(3):
            for way in WAYS:
                folder = demo_model() if way == WAYS[0] else quantized
                command = [sys.executable, "-m", "benchmarks.tokens", way, str(folder)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[way].append(tuple(map(float, output.split()[-3:])))
    rows = []
    for way, measured in runs.items():
        written, read, memory = (median(of) for of in zip(*measured, strict=True))
        rows.append((way, f"{written:.1f}", f"{read:.0f}", f"{memory / 1e6:.0f}"))
    print_table(HEADER, rows)
    save_csv("tokens", HEADER, rows)


if __name__ == "__main__":
    main()
