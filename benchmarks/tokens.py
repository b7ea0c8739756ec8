"""Measure memory and speed of models that keep their integers in memory. Ten minutes.

    python -m benchmarks.tokens SCRATCH [--model llama-3.2-1b] [--blocks N] [--bits 4] [--rounds 3] [--binaries BIN]

The model has the exact shapes of a published one. Its weights are random integers along a trellis, because only shapes
matter for memory and speed. Each form runs in bfloat16 in a child process of its own. All figures are medians of
interleaved rounds. Memory is private memory without mapped files, after loading and at its peak. `dense` is the same
model as an ordinary checkpoint, loaded by transformers. BIN contains llama.cpp's `llama-quantize` and `llama-bench`;
without it, the rows of llama.cpp are left out. The memory of llama.cpp is not measured. If torchao is installed, its
8-bit linear layers are measured, too; it keeps embeddings in bfloat16.
"""

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, TorchAoConfig

import freebits
from benchmarks import llama_cpp
from benchmarks.results import print_table, save_csv, saved_rows
from benchmarks.scale import CONFIGS, SHARD
from freebits.api.estimate import dense_shapes
from freebits.codecs.integers import Integers
from freebits.codecs.trellis import transitions
from freebits.packed.contents import STEM, Contents, digested
from freebits.packed.encoded_piece import Piece, plain
from freebits.packed.packing import publish
from freebits.packed.recipe import Recipe
from freebits.storage.checkpoint import write_json
from freebits.storage.writer import CheckpointWriter
from freebits.types import TensorSpec

DENSE, TORCHAO, LATE = "dense", "torchao int8", "stays packed"
FORMS = (DENSE, "expanded", "integers kept", LATE, *([TORCHAO] if find_spec("torchao") else []))
"""`stays packed` generates no text, because it decodes the model for every token."""
N_TOKENS, PROMPT, BATCH = 16, 512, 8
N_STATES = 32
MAX_WEIGHTS = 1 << 24
"""Weights that are encoded together, as by `quantize`."""
HEADER = (
    *("model", "blocks", "bits", "form", "seconds to load", "MB after loading", "MB at the peak"),
    *("tokens per second, one sequence", "tokens per second, batch of 8", "tokens per second, prompt of 512"),
)


def main() -> None:
    """Write the folders, run each form several times, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--blocks", type=int, help="blocks of the model (default: all)")
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--binaries", type=Path)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quantized, dense = arguments.scratch / "quantized", arguments.scratch / "dense"
    if arguments.form:
        print(json.dumps(measure(arguments.form, dense if arguments.form in (DENSE, TORCHAO) else quantized)))
        return
    config = json.loads((CONFIGS / f"{arguments.model}.json").read_text())
    config |= {"num_hidden_layers": arguments.blocks or config["num_hidden_layers"], "dtype": "bfloat16"}
    config |= {"architectures": ["LlamaForCausalLM"]}
    if not dense.exists():
        write_quantized(quantized, config, arguments.bits)
        freebits.unpack(quantized, dense)
    runs: dict[str, list[list[float]]] = {form: [] for form in FORMS}
    peers = {}
    if arguments.binaries:
        llama_cpp.write_gguf(dense, arguments.scratch / "dense.gguf")
        for gguf_type in llama_cpp.TYPES:
            peers[f"llama.cpp {gguf_type}"] = llama_cpp.quantize(
                arguments.binaries, arguments.scratch / "dense.gguf", gguf_type
            )
    for _ in range(arguments.rounds):
        for form in FORMS:
            command = [sys.executable, "-m", "benchmarks.tokens", str(arguments.scratch), "--form", form]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[form].append(json.loads(output.splitlines()[-1]))
            print(form, runs[form][-1], flush=True)
        for name, path in peers.items():
            one, prompt = llama_cpp.tokens_per_second(arguments.binaries, path, PROMPT, N_TOKENS)
            runs.setdefault(name, []).append([math.nan, math.nan, math.nan, one, math.nan, prompt])
            print(name, runs[name][-1], flush=True)
    shape = (arguments.model, str(config["num_hidden_layers"]), f"{arguments.bits:g}")
    rows = [
        (*shape, form, *(f"{median(values):.4g}" for values in zip(*measured, strict=True)))
        for form, measured in runs.items()
    ]
    others = [row for row in saved_rows("tokens") if row[:3] != shape and len(row) == len(HEADER)]
    save_csv("tokens", HEADER, [*others, *rows])
    print_table(HEADER, [*others, *rows])


def write_quantized(folder: Path, config: dict[str, Any], bits: float) -> None:
    """Write a packed folder with random integers of about `bits` bits."""
    folder.mkdir(parents=True)
    shapes, generator = dense_shapes(config, folder), np.random.default_rng(0)
    contents = Contents()
    parts = {name: [name] if len(shape) == 1 else part_names(name, shape) for name, shape in shapes.items()}
    names = {f"{part}.message" for all_parts in parts.values() for part in all_parts} | shapes.keys()
    with CheckpointWriter(folder, dict.fromkeys(sorted(names), (1 << 39,)), SHARD, STEM) as writer:
        for name, shape in shapes.items():
            if len(shape) == 1:
                contents.write(writer, *digested(plain({name: torch.ones(shape, dtype=torch.bfloat16)})))
                continue
            sizes = [len(rows) for rows in np.array_split(np.arange(shape[0]), len(parts[name]))]
            for part, size in zip(parts[name], sizes, strict=True):
                contents.write(writer, *digested(random_piece(part, size, shape[1], bits, generator)))
            if len(sizes) > 1:
                takes = {str(number): part for number, part in enumerate(parts[name])}
                contents.recipes.append(Recipe("joined", takes, {name: TensorSpec("BF16", shape)}, {"rows": sizes}))
    source: Any = SimpleNamespace(path=folder, weight_files=())
    write_json(folder / "config.json", config)
    publish(folder, source, contents, config, ("integers", "none"), history=[])


def part_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the names of the parts in which a matrix is encoded."""
    n_parts = -(-shape[0] * shape[1] // MAX_WEIGHTS)
    return [name] if n_parts == 1 else [f"{name}.rows.{number}" for number in range(n_parts)]


def random_piece(name: str, n: int, m: int, bits: float, generator: np.random.Generator) -> Piece:
    """Return an encoded matrix of random paths through the trellis, with a standard deviation of about 0.02."""
    deviation = 2**bits / math.sqrt(2 * math.pi * math.e)  # a normal distribution with this entropy
    values, states, following = np.empty((n, m), np.int32), np.zeros(m, np.uint8), transitions(N_STATES)
    for row in range(n):
        targets: NDArray[np.float32] = np.float32(deviation) * generator.standard_normal(m, np.float32)
        symbols = np.round(targets - 0.5 * (states & 1)).astype(np.int32)
        values[row], states = 2 * symbols + (states & 1), following[states, symbols & 1]
    exponent = round(16 * math.log2(0.01 / deviation))
    scales = torch.full((n,), exponent, dtype=torch.int16), torch.zeros(m, dtype=torch.int16)
    makes = {name: TensorSpec("BF16", (n, m))}
    coded = Integers(N_STATES).encode([torch.from_numpy(values), *scales], list(makes.values()))
    message = coded.parts["message"]
    stored = {f"{name}.message": (TensorSpec.of(message), message)}
    return Piece(stored, (Recipe("integers", {"message": f"{name}.message"}, makes, coded.params),))


def measure(form: str, folder: Path) -> list[float]:
    """Return the figures of one form, in the order of `HEADER`."""
    before, peak = private_memory(), Peak()
    start = time.perf_counter()
    if form in (DENSE, TORCHAO):
        int8 = import_module("torchao.quantization").Int8WeightOnlyConfig if form == TORCHAO else None
        options = {"quantization_config": TorchAoConfig(int8())} if int8 else {}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    else:
        kept: dict[str, Any] = {"keep_integers": form == "integers kept", "stay_packed": form == LATE}
        model = freebits.load(folder, dtype=torch.bfloat16, **kept)
    model.eval()
    seconds, after = time.perf_counter() - start, private_memory()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, (BATCH, PROMPT), generator=generator)
    with torch.inference_mode():
        batches = () if form == LATE else (prompts[:1, :8], prompts[:, :8])
        rates = [generation_rate(model, batch) for batch in batches] or [math.nan, math.nan]
        rates.append(PROMPT / duration(lambda: model(prompts[:1], logits_to_keep=1)))
    return [seconds, (after - before) / 1e6, (peak.stop() - before) / 1e6, *rates]


def generation_rate(model: Any, prompts: torch.Tensor) -> float:
    """Return tokens per second, without the time of the prompt."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}

    def seconds(n: int) -> float:
        return duration(lambda: model.generate(prompts, max_new_tokens=n, min_new_tokens=n, **options))

    seconds(2)
    return len(prompts) * N_TOKENS / (seconds(N_TOKENS + 1) - seconds(1))


def duration(function: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Peak:
    """Records the peak of the private memory of this process until `stop`."""

    def __init__(self) -> None:
        self._value, self._stopped = private_memory(), threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def _record(self) -> None:
        while not self._stopped.wait(0.01):
            self._value = max(self._value, private_memory())

    def stop(self) -> int:
        """Return the highest memory in bytes."""
        self._stopped.set()
        self._thread.join()
        return max(self._value, private_memory())


def private_memory() -> int:
    """Return the resident bytes of this process without mapped files (Linux)."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
