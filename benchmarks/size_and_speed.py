"""The race: one sliced model in every form that a user might choose, side by side in one run. Fifteen minutes.

    pip install zipnn
    python -m benchmarks.size_and_speed

DFloat11 is not in it: its encoder and decoder are CUDA kernels.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import zstandard
from safetensors.torch import load_file, save_file

import freebits
from benchmarks.results import RESULTS, print_table, save_csv
from freebits.checkpoint import Checkpoint
from freebits.huggingface.demo_model import demo_model
from freebits.packed.size import bytes_on_disk

RUNS = 5
WINDOWS = 8
CASES = (
    ("float16", 0.2, True),
    ("bfloat16", 0.2, True),
    ("float16", 0.2, False),
    ("float16", 0.0, False),
    ("float16", 0.3, True),
    ("bfloat16", 0.3, True),
)
"""Dtype, sparsity (0 is the dense model), and whether the head is untied."""
HEADER = (
    "model", "form", "bytes", "of safetensors", "compress, MB/s", "decompress, MB/s", "to a loaded model, s",
    "peak memory, MB", "perplexity ratio", "fidelity",
)  # fmt: skip
KINDS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

Row = tuple[object, ...]


@dataclass(frozen=True)
class Form:
    """One way to store a model: make `folder` from a source, and get a plain folder back."""

    compress: Callable[[Path, Path], object]
    decompress: Callable[[Path, Path], object]
    fidelity: str = "bit-exact"


def zstd(level: int) -> Form:
    """The file as it is, through zstd; both sides use two threads where they can."""

    def compress(source: Path, out: Path) -> None:
        out.mkdir()
        with (source / "model.safetensors").open("rb") as file, (out / "model.zst").open("wb") as target:
            zstandard.ZstdCompressor(level=level, threads=2).copy_stream(file, target)

    def decompress(packed: Path, out: Path) -> None:
        out.mkdir()
        with (packed / "model.zst").open("rb") as file, (out / "model.safetensors").open("wb") as target:
            zstandard.ZstdDecompressor().copy_stream(file, target)

    return Form(compress, decompress)


def zipnn(inner: Form | None = None) -> Form:
    """ZipNN on every tensor, two threads; of a packed folder with `inner`."""

    def compress(source: Path, out: Path) -> None:
        out.mkdir()
        if inner:
            inner.compress(source, out / "inner")
            source = out / "inner"
        index = []
        for number, (name, tensor) in enumerate(Checkpoint(source).items()):
            raw = bytearray(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            kind = KINDS.get(tensor.dtype, "")
            coded = coder(kind).compress(bytearray(raw)) if kind and raw else raw
            smaller = len(coded) < len(raw)
            (out / str(number)).write_bytes(coded if smaller else raw)
            index.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), kind if smaller else ""))
        (out / "index.json").write_text(json.dumps(index))
        shutil.rmtree(out / "inner", ignore_errors=True)

    def decompress(packed: Path, out: Path) -> None:
        tensors = {}
        for number, (name, dtype, shape, kind) in enumerate(json.loads((packed / "index.json").read_text())):
            content = (packed / str(number)).read_bytes()
            data = bytearray(coder(kind).decompress(content) if kind else content)
            raw = torch.frombuffer(data, dtype=getattr(torch, dtype)) if data else torch.empty(0)
            tensors[name] = raw.reshape(shape)
        out.mkdir()
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return Form(compress, decompress, inner.fidelity if inner else "bit-exact")


def coder(kind: str) -> Any:
    """A ZipNN coder for a dtype."""
    return import_module("zipnn").ZipNN(bytearray_dtype=kind, threads=2)


def packed(codec: str, entropy: str) -> Form:
    """Ours."""
    pack = partial(freebits.pack, codec=codec, entropy=entropy)
    exact = codec == "none"
    return Form(pack, freebits.unpack, "bit-exact" if exact else "function-preserving")


def plain() -> Form:
    """Safetensors as it is."""
    return Form(shutil.copytree, shutil.copytree)


def forms(sliced: bool) -> dict[str, Form]:
    """What takes part."""
    general = {
        "safetensors": plain(),
        "zstd -3": zstd(3),
        "zstd -19": zstd(19),
        "ZipNN": zipnn(),
        "freebits none": packed("none", "auto"),
    }
    ours = {
        "bits-back": packed("bits-back", "none"),
        "bits-back + ZipNN": zipnn(packed("bits-back", "none")),
        "bits-back + entropy": packed("bits-back", "auto"),
        "canonical": packed("canonical", "none"),
        "canonical + entropy": packed("canonical", "auto"),
    }
    return general | (ours if sliced else {})


def size(folder: Path) -> int:
    """Bytes that a form takes; of a folder of ours every file that it needs."""
    if (folder / "config.json").exists():
        return bytes_on_disk(folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def load(form: str, folder: Path, source: Path, scratch: Path) -> None:
    """To a model in memory: ours and safetensors directly, the others by way of a file."""
    if (folder / "config.json").exists():
        freebits.load(folder)
        return
    shutil.copytree(source, scratch, ignore=shutil.ignore_patterns("model.safetensors"))
    forms(sliced=True)[form].decompress(folder, scratch / "weights")
    shutil.move(scratch / "weights" / "model.safetensors", scratch / "model.safetensors")
    if "bits-back" not in form:  # else the packed file, which bits-back would yet have to decode
        freebits.load(scratch)


def seconds(step: Callable[[], object], *leftovers: Path) -> float:
    """How long a step takes; what it wrote is removed."""
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_memory(form: str, source: Path, scratch: Path) -> float:
    """Largest resident set while compressing, in a process of its own, less that of the bare process."""
    out = scratch / "peak"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.size_and_speed", form, str(source), str(out)]
    measured: float = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return measured


def measured_compression(form: str, source: str, out: str) -> None:
    """The other side of `peak_memory`."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    forms(sliced=True)[form].compress(Path(source), Path(out))
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """Of this process, in MB; mapped files count."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1000


def race(name: str, source: Path, sliced: bool, scratch: Path) -> list[Row]:
    """Every form of one model, taking turns."""
    contenders = forms(sliced)
    packed_, back = scratch / "packed", scratch / "back"
    times: dict[str, list[list[float]]] = {form: [[], [], []] for form in contenders}
    sizes: dict[str, int] = {}
    for run in range(RUNS):
        for label, form in contenders.items():
            if label == "zstd -19" and run:
                continue  # a minute or more, which hardly varies
            times[label][0].append(seconds(partial(form.compress, source, packed_), packed_))
            times[label][1].append(seconds(partial(form.decompress, packed_, back), back))
            times[label][2].append(
                seconds(partial(load, label, packed_, source, scratch / "loaded"), scratch / "loaded")
            )
            sizes[label] = size(packed_)
    total = sizes["safetensors"] / 1e6
    rows: list[Row] = []
    for label, form in contenders.items():
        compress, decompress, to_model = (statistics.median(values) for values in times[label])
        ratio = "1"
        if form.fidelity != "bit-exact" and "+" not in label:
            shutil.rmtree(packed_, ignore_errors=True)
            form.compress(source, packed_)
            perplexity = freebits.verify(packed_, against=source, limit=WINDOWS)["perplexity"]
            ratio = f"{perplexity['packed'] / perplexity['reference']:.5f}"
        elif form.fidelity != "bit-exact":
            ratio = "as without"
        speeds = (f"{total / compress:.0f}", f"{total / decompress:.0f}")
        time_to_model = "" if label == "bits-back + ZipNN" else f"{to_model:.3f}"
        memory = f"{peak_memory(label, source, scratch):.0f}"
        share = f"{sizes[label] / sizes['safetensors']:.4f}"
        rows.append((name, label, sizes[label], share, *speeds, time_to_model, memory, ratio, form.fidelity))
        print(rows[-1], flush=True)
    return rows


def draw(rows: list[Row]) -> None:
    """Size against time to a loaded model, for the first case."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for model, form, n_bytes, _, _, _, to_model, *_ in rows:
        if model == rows[0][0] and to_model:
            point = (float(str(to_model)), int(str(n_bytes)) / 1e6)
            axes.plot(*point, "o")
            axes.annotate(str(form), point, fontsize=8, xytext=(5, 3), textcoords="offset points")
    title = f"SmolLM2-135M, {rows[0][0]}: better is to the lower left"
    axes.set(xscale="log", xlabel="seconds to a loaded model", ylabel="size, MB", title=title)
    figure.savefig(RESULTS / "size_and_speed.png", dpi=140)


def main() -> None:
    """Measure, draw and save."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for dtype, sparsity, untie in CASES:
            scratch = Path(directory) / f"{dtype} {sparsity} {untie}"
            scratch.mkdir()
            source, name = demo_model(), f"dense, {dtype}"
            if sparsity:
                source, name = scratch / "sliced", f"{sparsity:.0%}, {dtype}, {'untied' if untie else 'tied'}"
                options: dict[str, Any] = {"untie": untie, "dtype": getattr(torch, dtype), "samples": 32}
                freebits.slice_model(demo_model(), source, sparsity=sparsity, **options)
            load_file(source / "model.safetensors")  # into the page cache
            rows += race(name, source, bool(sparsity), scratch)
            save_csv("size_and_speed", HEADER, rows)
            shutil.rmtree(scratch)
    print_table(HEADER, rows)
    draw(rows)


if __name__ == "__main__":
    measured_compression(*sys.argv[1:]) if len(sys.argv) > 1 else main()
