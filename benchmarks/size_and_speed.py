"""The race: one model in every form that a user might choose, side by side, two threads each. Forty minutes.

    pip install zipnn
    python -m benchmarks.size_and_speed

DFloat11 is not in it: it decodes with a CUDA kernel, which it loads when it is imported. What its encoder comes to is
in `benchmarks.entropy`.
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
from freebits.storage.weights import WeightsWriter
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
"""Dtype, sparsity (0 is the dense model), and whether the head is untied."""
HEADER = (
    "model", "form", "bytes", "of safetensors", "compress, MB/s", "decompress, MB/s", "to a loaded model, s",
    "peak memory to compress, MB", "perplexity ratio", "fidelity",
)  # fmt: skip
KINDS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

Row = tuple[object, ...]


@dataclass(frozen=True)
class Form:
    """One way to store a model folder: make another from it, get a plain one back, or a model at once."""

    compress: Callable[[Path, Path], object]
    decompress: Callable[[Path, Path], object]
    load: Callable[[Path, Path], object] = lambda packed, _: freebits.load(packed)
    fidelity: str = "bit-exact"


def plain() -> Form:
    """Safetensors as it is."""
    return Form(shutil.copytree, shutil.copytree)


def packed(codec: str, entropy: str) -> Form:
    """Ours."""
    parallel = freebits.Parallel(jobs=2)
    pack = partial(freebits.pack, codec=codec, entropy=entropy, parallel=parallel)
    unpack = partial(freebits.unpack, parallel=parallel)
    return Form(pack, unpack, fidelity="bit-exact" if codec == "none" else "function-preserving")


def copy_beside(source: Path, out: Path) -> None:
    """What lies beside the weights."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("model.*", "packed.*"))


def zstd_file(level: int) -> Form:
    """The file as it is, through zstd, which decompresses in one thread."""
    key = zstd.CompressionParameter
    options: dict[int, int] = {key.compression_level: level, key.nb_workers: 2}

    def compress(source: Path, out: Path) -> None:
        copy_beside(source, out)
        with (
            weights_file(source).open("rb") as file,
            zstd.ZstdFile(out / "model.zst", "wb", options=options) as target,
        ):
            shutil.copyfileobj(file, target, 1 << 20)

    def decompress(packed: Path, out: Path) -> None:
        copy_beside(packed, out)
        with zstd.ZstdFile(packed / "model.zst") as file, (out / "model.safetensors").open("wb") as target:
            shutil.copyfileobj(file, target, 1 << 20)

    return Form(compress, decompress, partial(load_from_file, decompress))


def load_from_file(decompress: Callable[[Path, Path], object], packed: Path, scratch: Path) -> object:
    """By way of a plain folder."""
    decompress(packed, scratch)
    return freebits.load(scratch)


def zipnn() -> Form:
    """ZipNN on every tensor."""

    def compress(source: Path, out: Path) -> None:
        copy_beside(source, out)
        index = []
        for number, (name, tensor) in enumerate(stored_tensors(source).items()):
            raw, spec = bytes_of(tensor), KINDS.get(tensor.dtype, "")
            copy = bytearray(raw.data)  # which ZipNN writes into
            coded: Any = coder(spec).compress(copy) if spec and copy else raw
            smaller = len(coded) < len(raw)
            (out / f"model.{number}").write_bytes(coded if smaller else raw.data)
            index.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), spec if smaller else ""))
        (out / "model.json").write_text(json.dumps({"file": weights_file(source).name, "tensors": index}))

    def told(packed: Path) -> Any:
        return json.loads((packed / "model.json").read_text())

    def tensors(packed: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, dtype, shape, spec) in enumerate(told(packed)["tensors"]):
            content = (packed / f"model.{number}").read_bytes()
            data = np.frombuffer(coder(spec).decompress(content) if spec else content, np.uint8)
            yield name, torch.from_numpy(np.require(data, requirements="W")).view(getattr(torch, dtype)).reshape(shape)

    def decompress(packed: Path, out: Path) -> None:
        copy_beside(packed, out)
        shapes = {name: tuple(shape) for name, _, shape, _ in told(packed)["tensors"]}
        with WeightsWriter(out / told(packed)["file"], shapes) as file:
            for name, tensor in tensors(packed):
                file.write(name, TensorSpec.of(tensor), bytes_of(tensor))

    def load(packed: Path, _: Path) -> object:
        config = AutoConfig.from_pretrained(packed)
        with torch.device("meta"):
            model = type(AutoModelForCausalLM.from_config(config))
        return model.from_pretrained(None, config=config, state_dict=dict(tensors(packed)))

    return Form(compress, decompress, load)


def coder(spec: str) -> Any:
    """A ZipNN coder for a dtype."""
    return import_module("zipnn").ZipNN(bytearray_dtype=spec, threads=2)


def both(inner: Form, outer: Form) -> Form:
    """One after the other."""

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
    """What takes part."""
    general = {
        "safetensors": plain(),
        "zstd -3": zstd_file(3),
        "zstd -19": zstd_file(19),
        "ZipNN": zipnn(),
        "freebits none": packed("none", "auto"),
    }
    ours = {
        "bits-back": packed("bits-back", "none"),
        "bits-back + ZipNN": both(packed("bits-back", "none"), zipnn()),
        "canonical": packed("canonical", "none"),
        "canonical + entropy": packed("canonical", "auto"),
    }
    return general | (ours if sliced else {})


def size(folder: Path, source: Path) -> int:
    """Bytes of a form; everything counted but what the source has beside its weights and config: tokenizer and such."""
    auxiliary = {file.name for file in source.iterdir()} - {"config.json", "model.safetensors"}
    return sum(file.stat().st_size for file in folder.iterdir() if file.name not in auxiliary)


def seconds(step: Callable[[], object], *leftovers: Path) -> float:
    """How long a step takes; what it wrote before is removed."""
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    np.ones(1 << 30, np.uint8)  # that no step pays for memory that a virtual machine had given back
    return timed(step)


def peak_memory(form: str, source: Path, scratch: Path) -> float:
    """Largest resident set while compressing, in a process of its own, less that of the bare process."""
    out = scratch / "peak"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.size_and_speed", form, str(source), str(out)]
    measured: float = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return measured


def measured_compression(form: str, source: str, out: str) -> None:
    """The other side of `peak_memory`."""
    coder("float16")  # imports count for none
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
            times[label][2].append(seconds(partial(form.load, packed_, scratch / "loaded"), scratch / "loaded"))
            sizes[label] = size(packed_, source)
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
        memory = f"{peak_memory(label, source, scratch):.0f}"
        share = f"{sizes[label] / sizes['safetensors']:.4f}"
        rows.append((name, label, sizes[label], share, *speeds, f"{to_model:.3f}", memory, ratio, form.fidelity))
        print(rows[-1], flush=True)
    return rows


def draw(rows: list[Row]) -> None:
    """Size against time to a loaded model, for the first case."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    shown = [(int(str(row[2])) / 1e6, float(str(row[6])), str(row[1])) for row in rows if row[0] == rows[0][0]]
    for number, (megabytes, load, form) in enumerate(sorted(shown)):
        axes.plot(load, megabytes, "o")
        place = (5, 3 if number % 2 else -9)  # neighbours' names lie above and below
        axes.annotate(form, (load, megabytes), fontsize=8, xytext=place, textcoords="offset points")
    title = f"SmolLM2-135M, {rows[0][0]}: better is to the lower left"
    axes.set(xscale="log", xlim=(0.05, 5), xlabel="seconds to a loaded model", ylabel="size, MB", title=title)
    figure.savefig(RESULTS / "size_and_speed.png", dpi=140)


def main() -> None:
    """Measure, draw and save."""
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
            stored_tensors(source)  # into the page cache
            rows += race(name, source, bool(sparsity), scratch)
            save_csv("size_and_speed", HEADER, rows)
            shutil.rmtree(scratch)
    print_table(HEADER, rows)
    draw(rows)


if __name__ == "__main__":
    measured_compression(*sys.argv[1:]) if len(sys.argv) > 1 else main()
