"""Compare the entropy stage with other coders on the same tensors, in memory, with one thread. Eight minutes.

    pip install zipnn pcodec dahuffman && pip install --no-deps dfloat11
    python -m benchmarks.entropy

Only the encoder of DFloat11 is measured; its decoder needs a GPU.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

import freebits
from benchmarks.folders import stored_tensors
from benchmarks.results import print_table, save_csv
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text
from freebits.codecs.bits import zstd
from freebits.codecs.entropy import compress, decompress
from freebits.codecs.planes import merge, split
from freebits.types import Bytes

RUNS = 7
HEADER = ("tensors", "coder", "bytes", "of the tensors", "of ZipNN", "compress, MB/s", "decompress, MB/s")
DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16"}
TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Coder:
    """A coder of tensors.

    Attributes:
        compress: takes bytes and the name of their dtype; returns None for tensors that the coder skips.
        decompress: takes encoded bytes, the name of the dtype and the number of decoded bytes.
        prepare: makes the input of `compress` from bytes; not timed.
    """

    compress: Callable[[Bytes, str], bytes | None]
    decompress: Callable[[bytes, str, int], object] | None
    prepare: Callable[[Bytes], Any] = lambda data: data


def freebits_() -> Coder:
    """Return the entropy stage of freebits."""
    return Coder(compress, lambda coded, dtype_name, n: decompress(np.frombuffer(coded, np.uint8), dtype_name, n))


def zipnn() -> Coder:
    """Return ZipNN on copies of the tensors, because ZipNN overwrites its input."""
    zipnn_class = import_module("zipnn").ZipNN
    coders = {name: zipnn_class(bytearray_dtype=torch_name, threads=1) for name, torch_name in TORCH_NAMES.items()}
    return Coder(
        lambda data, dtype_name: coders[dtype_name].compress(data),
        lambda coded, dtype_name, _: coders[dtype_name].decompress(coded),
        prepare=lambda data: bytearray(data.data),
    )


def zstd_file(level: int) -> Coder:
    """Return zstd on the bytes of the values."""
    return Coder(lambda data, _: zstd.compress(data.data, level), lambda coded, *_: zstd.decompress(coded))


def zstd_planes(level: int) -> Coder:
    """Return zstd, with its search for matches, on the exponents. Signs and mantissas are stored without coding."""

    def pack(data: Bytes, dtype_name: str) -> bytes:
        exponents, mantissas = split(data, dtype_name)
        return zstd.compress(exponents.data, level) + mantissas.tobytes()

    def unpack(coded: bytes, dtype_name: str, n_bytes: int) -> Bytes:
        mantissas = np.frombuffer(coded, np.uint8)[len(coded) - n_bytes // 2 :]
        exponents = zstd.decompress(memoryview(coded)[: len(coded) - n_bytes // 2])
        data = np.empty(n_bytes, np.uint8)
        merge([np.frombuffer(exponents, np.uint8), mantissas], dtype_name, data)
        return data

    return Coder(pack, unpack)


def pcodec() -> Coder:
    """Return pcodec at its default level, on float16 values or, for bfloat16, on unsigned integers."""
    pco = import_module("pcodec")
    config = pco.ChunkConfig(compression_level=8)

    def pack(data: Bytes, dtype_name: str) -> bytes:
        values = data.view(np.float16 if dtype_name == "F16" else np.uint16)
        coded: bytes = pco.standalone.simple_compress(values, config)
        return coded

    return Coder(pack, lambda coded, *_: pco.standalone.simple_decompress(coded))


def dfloat11() -> Coder:
    """Return DFloat11's encoder, imported without its package, which needs a GPU. Its tables are not counted."""
    package = find_spec("dfloat11")
    sys.path.extend((package and package.submodule_search_locations) or [])
    utils = import_module("dfloat11_utils")

    def pack(data: Bytes, _: str) -> bytes | None:
        if len(data) < 1 << 14:
            return None
        weight = torch.from_numpy(data).view(torch.bfloat16)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            codec, *_ = utils.get_32bit_codec(utils.get_codec(weight)[1])
            *parts, _ = utils.encode_weights([weight], codec, bytes_per_thread=8, threads_per_block=512)
            return b"".join(part.numpy().tobytes() for part in parts)

    return Coder(pack, None)


CODERS: dict[str, Callable[[], Coder]] = {
    "freebits": freebits_,
    "ZipNN": zipnn,
    "zstd -3": partial(zstd_file, 3),
    "planes, zstd -3": partial(zstd_planes, 3),
    "pcodec": pcodec,
    "DFloat11": dfloat11,
}


def race(name: str, source: Path) -> list[tuple[object, ...]]:
    """Measure every coder on all 16-bit tensors of a checkpoint, in interleaved runs."""
    halves = [tensor for tensor in stored_tensors(source).values() if tensor.dtype in DTYPE_NAMES]
    tensors = [(tensor.reshape(-1).view(torch.uint8).numpy().copy(), DTYPE_NAMES[tensor.dtype]) for tensor in halves]
    total = sum(len(data) for data, _ in tensors)
    only_float16 = {dtype_name for _, dtype_name in tensors} == {"F16"}
    coders = {label: make() for label, make in CODERS.items() if not (only_float16 and label == "DFloat11")}
    times: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in coders}
    sizes: dict[str, int] = {}
    for run in range(RUNS):
        for label, coder in coders.items():
            if not coder.decompress and run:
                continue  # DFloat11 takes minutes, which hardly vary
            prepared = [(coder.prepare(data), dtype_name) for data, dtype_name in tensors]
            start = time.perf_counter()
            coded = [coder.compress(data, dtype_name) for data, dtype_name in prepared]
            times[label][0].append(time.perf_counter() - start)
            pairs = [(content, *tensor) for content, tensor in zip(coded, tensors, strict=True)]
            sizes[label] = sum(
                len(data) if content is None else min(len(content), len(data)) for content, data, _ in pairs
            )
            if coder.decompress:
                times[label][1].append(decompression(coder.decompress, pairs, check=not run))
    rows: list[tuple[object, ...]] = []
    for label in coders:
        speeds = [f"{total / statistics.median(values) / 1e6:.0f}" if values else "" for values in times[label]]
        shares = (f"{sizes[label] / total:.4f}", f"{sizes[label] / sizes['ZipNN']:.5f}")
        rows.append((name, label, sizes[label], *shares, *speeds))
        print(rows[-1], flush=True)
    return rows


def decompression(
    decompress: Callable[[bytes, str, int], object], pairs: list[tuple[bytes | None, Bytes, str]], check: bool
) -> float:
    """Decompress all tensors and return the seconds; with `check`, compare the results with the originals."""
    start = time.perf_counter()
    for content, data, dtype_name in pairs:
        decoded: Any = data if content is None else decompress(content, dtype_name, len(data))
        if check:
            assert np.array_equal(np.frombuffer(memoryview(decoded).cast("B"), np.uint8), data)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and save."""
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as directory:
        for dtype in (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            sliced, canonical = Path(directory) / f"sliced {name}", Path(directory) / f"canonical {name}"
            freebits.slice_model(
                demo_model(), sliced, sparsity=0.2, calibration=embedded_text()[0], dtype=dtype, samples=32
            )
            freebits.pack(sliced, canonical, entropy="none")
            rows += race(f"20%, {name}, sliced", sliced) + race(f"20%, {name}, canonical", canonical)
        rows += race("dense (was 4 bits), float16", demo_model())
    save_csv("entropy", HEADER, rows)
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
