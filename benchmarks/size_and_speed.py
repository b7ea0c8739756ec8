"""Compare every form in which a user might store a model, with two threads each. Forty minutes.

    pip install zipnn
    python -m benchmarks.size_and_speed

DFloat11 is left out because importing it loads a CUDA kernel. `benchmarks.entropy` measures its encoder.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import freebits
from benchmarks.folders import stored_tensors, weights_file
from benchmarks.results import RESULTS, print_table, save_csv
from benchmarks.timing import timed
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text
from freebits.codecs.bits import zstd
from freebits.storage.safetensors_files import WeightsWriter
from freebits.types import TensorSpec, bytes_of

RUNS = 5
WINDOWS = 8
CASES = (
    ("float16", 0.2, True),
    ("bfloat16", 0.2, True),
    ("float16", 0.0, False),
    ("float16", 0.3, True),
    ("bfloat16", 0.3, True),
)
"""(dtype, sparsity (0 is the dense model), whether the head is untied)."""
HEADER = (
    "model", "form", "bytes", "of safetensors", "compress, MB/s", "decompress, MB/s", "to a loaded model, s",
    "peak memory to compress, MB", "perplexity ratio", "fidelity",
)  # fmt: skip
TORCH_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

Row = tuple[object, ...]


@dataclass(frozen=True)
class Form:
    """One way to store a model.

    Attributes:
        compress: takes the model's folder and the folder to write.
        decompress: takes the compressed folder and the plain folder to write.
        load: takes the compressed folder and a folder for temporary files, and returns the loaded model.
        fidelity: what the form preserves.
    """

    compress: Callable[[Path, Path], object]
    decompress: Callable[[Path, Path], object]
    load: Callable[[Path, Path], object] = lambda packed, _: freebits.load(packed)
    fidelity: str = "bit-exact"


def plain() -> Form:
    """Return plain copying."""
    return Form(shutil.copytree, shutil.copytree)


def packed(codec: str, entropy: str) -> Form:
    """Return the form that `freebits.pack` writes."""
    parallel = freebits.Parallel(jobs=2)
    pack = partial(freebits.pack, codec=codec, entropy=entropy, parallel=parallel)
    unpack = partial(freebits.unpack, parallel=parallel)
    return Form(pack, unpack, fidelity="bit-exact" if codec == "none" else "function-preserving")


def copy_auxiliary_files(source: Path, out: Path) -> None:
    """Copy all files except the weights."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("model.*", "packed.*"))


def zstd_file(level: int) -> Form:
    """Return zstd on the whole weights file. Decompression uses one thread."""
    key = zstd.CompressionParameter
    options: dict[int, int] = {key.compression_level: level, key.nb_workers: 2}

    def compress(source: Path, out: Path) -> None:
        copy_auxiliary_files(source, out)
        with (
            weights_file(source).open("rb") as file,
            zstd.ZstdFile(out / "model.zst", "wb", options=options) as target,
        ):
            shutil.copyfileobj(file, target, 1 << 20)

    def decompress(packed: Path, out: Path) -> None:
        copy_auxiliary_files(packed, out)
        with zstd.ZstdFile(packed / "model.zst") as file, (out / "model.safetensors").open("wb") as target:
            shutil.copyfileobj(file, target, 1 << 20)

    return Form(compress, decompress, partial(load_from_file, decompress))


def load_from_file(decompress: Callable[[Path, Path], object], packed: Path, scratch: Path) -> object:
    """Decompress to a plain folder, then load it."""
    decompress(packed, scratch)
    return freebits.load(scratch)


def zipnn() -> Form:
    """Return ZipNN on every tensor."""

    def compress(source: Path, out: Path) -> None:
        copy_auxiliary_files(source, out)
        index = []
        for number, (name, tensor) in enumerate(stored_tensors(source).items()):
            raw, dtype_name = bytes_of(tensor), TORCH_NAMES.get(tensor.dtype, "")
            copy = bytearray(raw.data)  # ZipNN overwrites its input
            coded: Any = coder(dtype_name).compress(copy) if dtype_name and copy else raw
            smaller = len(coded) < len(raw)
            (out / f"model.{number}").write_bytes(coded if smaller else raw.data)
            coder_dtype = dtype_name if smaller else ""
            index.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), coder_dtype))
        (out / "model.json").write_text(json.dumps({"file": weights_file(source).name, "tensors": index}))

    def read_index(packed: Path) -> Any:
        return json.loads((packed / "model.json").read_text())

    def tensors(packed: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, dtype, shape, coder_dtype) in enumerate(read_index(packed)["tensors"]):
            content = (packed / f"model.{number}").read_bytes()
            data = np.frombuffer(coder(coder_dtype).decompress(content) if coder_dtype else content, np.uint8)
            yield name, torch.from_numpy(np.require(data, requirements="W")).view(getattr(torch, dtype)).reshape(shape)

    def decompress(packed: Path, out: Path) -> None:
        copy_auxiliary_files(packed, out)
        index = read_index(packed)
        shapes = {name: tuple(shape) for name, _, shape, _ in index["tensors"]}
        with WeightsWriter(out / index["file"], shapes) as file:
            for name, tensor in tensors(packed):
                file.write(name, TensorSpec.of(tensor), bytes_of(tensor))

    def load(packed: Path, _: Path) -> object:
        config = AutoConfig.from_pretrained(packed)
        with torch.device("meta"):
            model = type(AutoModelForCausalLM.from_config(config))
        return model.from_pretrained(None, config=config, state_dict=dict(tensors(packed)))

    return Form(compress, decompress, load)


def coder(dtype_name: str) -> Any:
    """Return a ZipNN coder for a dtype."""
    return import_module("zipnn").ZipNN(bytearray_dtype=dtype_name, threads=2)


def chained(inner: Form, outer: Form) -> Form:
    """Return the form that compresses with `inner`, then with `outer`."""

    def compress(source: Path, out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=out.parent) as directory:
            inner.compress(source, Path(directory) / "inner")
            outer.compress(Path(directory) / "inner", out)

    def decompress(packed: Path, out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=out.parent) as directory:
            outer.decompress(packed, Path(directory) / "inner")
            inner.decompress(Path(directory) / "inner", out)

    return Form(compress, decompress, partial(load_from_file, outer.decompress), inner.fidelity)


def forms(sliced: bool) -> dict[str, Form]:
    """Return the forms to compare, by name."""
    general = {
        "safetensors": plain(),
        "zstd -3": zstd_file(3),
        "zstd -19": zstd_file(19),
        "ZipNN": zipnn(),
        "freebits none": packed("none", "auto"),
    }
    only_sliced = {
        "bits-back": packed("bits-back", "none"),
        "bits-back + ZipNN": chained(packed("bits-back", "none"), zipnn()),
        "canonical": packed("canonical", "none"),
        "canonical + entropy": packed("canonical", "auto"),
    }
    return general | (only_sliced if sliced else {})


def size(folder: Path, source: Path) -> int:
    """Return the bytes of a form without the source's auxiliary files, such as the tokenizer."""
    auxiliary = {file.name for file in source.iterdir()} - {"config.json", "model.safetensors"}
    return sum(file.stat().st_size for file in folder.iterdir() if file.name not in auxiliary)


def seconds(step: Callable[[], object], *leftovers: Path) -> float:
    """Remove the output of an earlier run, then return the seconds of a step."""
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    np.ones(1 << 30, np.uint8)  # so that no step pays for memory that a virtual machine has reclaimed
    return timed(step)


def peak_memory(form: str, source: Path, scratch: Path) -> float:
    """Return the MB that compressing adds to the peak resident set of a child process."""
    out = scratch / "peak"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.size_and_speed", form, str(source), str(out)]
    measured: float = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return measured


def measured_compression(form: str, source: str, out: str) -> None:
    """Run in the child process of `peak_memory`, and print the measurement."""
    coder("float16")  # import ZipNN first, so that the import is not measured
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    forms(sliced=True)[form].compress(Path(source), Path(out))
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """Return a field of this process's status in MB; mapped files count (Linux)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1000


def race(name: str, source: Path, sliced: bool, scratch: Path) -> list[Row]:
    """Measure every form of one model in interleaved runs."""
    candidates = forms(sliced)
    compressed, decompressed = scratch / "packed", scratch / "unpacked"
    times: dict[str, list[list[float]]] = {label: [[], [], []] for label in candidates}
    sizes: dict[str, int] = {}
    for run in range(RUNS):
        for label, form in candidates.items():
            if label == "zstd -19" and run:
                continue  # takes a minute or more, which hardly varies
            times[label][0].append(seconds(partial(form.compress, source, compressed), compressed))
            times[label][1].append(seconds(partial(form.decompress, compressed, decompressed), decompressed))
            times[label][2].append(seconds(partial(form.load, compressed, scratch / "loaded"), scratch / "loaded"))
            sizes[label] = size(compressed, source)
    total = sizes["safetensors"] / 1e6
    rows: list[Row] = []
    for label, form in candidates.items():
        compress, decompress, load = (statistics.median(values) for values in times[label])
        ratio = "1"
        if form.fidelity != "bit-exact" and "+" not in label:
            shutil.rmtree(compressed, ignore_errors=True)
            form.compress(source, compressed)
            perplexity = freebits.verify(compressed, against=source, limit=WINDOWS)["perplexity"]
            ratio = f"{perplexity['packed'] / perplexity['reference']:.5f}"
        elif form.fidelity != "bit-exact":
            ratio = "as without"
        speeds = (f"{total / compress:.0f}", f"{total / decompress:.0f}")
        memory = f"{peak_memory(label, source, scratch):.0f}"
        share = f"{sizes[label] / sizes['safetensors']:.4f}"
        rows.append((name, label, sizes[label], share, *speeds, f"{load:.3f}", memory, ratio, form.fidelity))
        print(rows[-1], flush=True)
    return rows


def draw(rows: list[Row]) -> None:
    """Plot size against time to a loaded model, for the first case."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    points = [(int(str(row[2])) / 1e6, float(str(row[6])), str(row[1])) for row in rows if row[0] == rows[0][0]]
    for number, (megabytes, load, form) in enumerate(sorted(points)):
        axes.plot(load, megabytes, "o")
        offset = (5, 3 if number % 2 else -9)  # alternate, so that labels of neighbours do not overlap
        axes.annotate(form, (load, megabytes), fontsize=8, xytext=offset, textcoords="offset points")
    title = f"SmolLM2-135M, {rows[0][0]}: better is to the lower left"
    axes.set(xscale="log", xlim=(0.05, 5), xlabel="seconds to a loaded model", ylabel="size, MB", title=title)
    figure.savefig(RESULTS / "size_and_speed.png", dpi=140)


def main() -> None:
    """Measure, save, print and draw."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for dtype, sparsity, untie in CASES:
            scratch = Path(directory) / f"{dtype} {sparsity} {untie}"
            scratch.mkdir()
            source, name = demo_model(), f"dense (was 4 bits), {dtype}"
            if sparsity:
                source, name = scratch / "sliced", f"{sparsity:.0%}, {dtype}, {'untied' if untie else 'tied'}"
                options: dict[str, Any] = {"untie": untie, "dtype": getattr(torch, dtype), "samples": 32}
                freebits.slice_model(demo_model(), source, sparsity=sparsity, calibration=embedded_text()[0], **options)
            stored_tensors(source)  # read once, so that the file is in the page cache
            rows += race(name, source, bool(sparsity), scratch)
            save_csv("size_and_speed", HEADER, rows)
            shutil.rmtree(scratch)
    print_table(HEADER, rows)
    draw(rows)


if __name__ == "__main__":
    measured_compression(*sys.argv[1:]) if len(sys.argv) > 1 else main()
