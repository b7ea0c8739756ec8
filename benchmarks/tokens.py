"""Measure speed and memory of the quantized demo model, expanded and with its integers kept. Five minutes.

    python -m benchmarks.tokens

Each form runs in a child process in bfloat16. Figures are medians of three interleaved runs. Memory is what loading
adds to the resident set of the process, without mapped files, which the system can reclaim.
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

FORMS = ("dense", "expanded", "integers kept")
N_TOKENS = 64
HEADER = ("model", "tokens per second, one sequence", "tokens per second, prompt of 512", "MB in memory")


def measure(form: str, folder: str) -> None:
    """Print tokens per second of generating, tokens per second of a prompt, and bytes of memory."""
    before = own_memory()
    model: Any = freebits.load(folder, dtype=torch.bfloat16, keep_integers=form == FORMS[2]).eval()
    after = own_memory()
    prompt = torch.randint(1000, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(prompt)
        start = time.perf_counter()
        model(prompt)
        prompt_seconds = time.perf_counter() - start
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
        start = time.perf_counter()
        model.generate(prompt[:, :8], max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS, **options)
        generate_seconds = time.perf_counter() - start
    print(N_TOKENS / generate_seconds, 512 / prompt_seconds, after - before)


def own_memory() -> int:
    """Return the resident bytes of this process without mapped files (Linux)."""
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
        runs: dict[str, list[tuple[float, ...]]] = {form: [] for form in FORMS}
        for _ in range(3):
            for form in FORMS:
                folder = demo_model() if form == FORMS[0] else quantized
                command = [sys.executable, "-m", "benchmarks.tokens", form, str(folder)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[form].append(tuple(map(float, output.split()[-3:])))
    rows = []
    for form, measured in runs.items():
        generating, reading, memory = (median(values) for values in zip(*measured, strict=True))
        rows.append((form, f"{generating:.1f}", f"{reading:.0f}", f"{memory / 1e6:.0f}"))
    print_table(HEADER, rows)
    save_csv("tokens", HEADER, rows)


if __name__ == "__main__":
    main()
