"""The entropy stage beside other coders: the same tensors, in memory, one thread. Eight minutes.

    pip install zipnn pcodec dahuffman && pip install --no-deps dfloat11
    python -m benchmarks.entropy

Of DFloat11 only the encoder runs; its decoder needs a GPU.
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
CODES = {torch.float16: "F16", torch.bfloat16: "BF16"}
KINDS = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Coder:
    """To bytes, given the dtype, or None if that is not worth it; and back, given also the number of bytes."""

    compress: Callable[[Bytes, str], bytes | None]
    decompress: Callable[[bytes, str, int], object] | None
    prepare: Callable[[Bytes], Any] = lambda data: data
    """Not timed."""


def freebits_() -> Coder:
    """Ours."""
    return Coder(compress, lambda coded, code, n: decompress(np.frombuffer(coded, np.uint8), code, n))


def zipnn() -> Coder:
    """ZipNN, which writes into what it reads: it gets a copy."""
    coders = {code: import_module("zipnn").ZipNN(bytearray_dtype=spec, threads=1) for code, spec in KINDS.items()}
    return Coder(
        lambda data, code: coders[code].compress(data),
        lambda coded, code, _: coders[code].decompress(coded),
        prepare=lambda data: bytearray(data.data),
    )


def zstd_file(level: int) -> Coder:
    """Zstd on the numbers as they are."""
    return Coder(lambda data, _: zstd.compress(data.data, level), lambda coded, *_: zstd.decompress(coded))


def zstd_planes(level: int) -> Coder:
    """Zstd on the exponents, with its search for matches on; the rest as it is."""

    def pack(data: Bytes, code: str) -> bytes:
        exponents, rest = split(data, code)
        return zstd.compress(exponents.data, level) + rest.tobytes()

    def unpack(coded: bytes, code: str, n_bytes: int) -> Bytes:
        rest = np.frombuffer(coded, np.uint8)[len(coded) - n_bytes // 2 :]
        exponents = zstd.decompress(memoryview(coded)[: len(coded) - n_bytes // 2])
        data = np.empty(n_bytes, np.uint8)
        merge([np.frombuffer(exponents, np.uint8), rest], code, data)
        return data

    return Coder(pack, unpack)


def pcodec() -> Coder:
    """Pcodec at its default level, of float16 as such, of bfloat16 as unsigned integers."""
    pco = import_module("pcodec")
    config = pco.ChunkConfig(compression_level=8)

    def pack(data: Bytes, code: str) -> bytes:
        numbers = data.view(np.float16 if code == "F16" else np.uint16)
        coded: bytes = pco.standalone.simple_compress(numbers, config)
        return coded

    return Coder(pack, lambda coded, *_: pco.standalone.simple_decompress(coded))


def dfloat11() -> Coder:
    """DFloat11's encoder, for the matrices, its tables not counted. Its package cannot be imported without a GPU."""
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
    """Every coder on every tensor of a checkpoint, taking turns."""
    found = [tensor for tensor in stored_tensors(source).values() if tensor.dtype in CODES]
    tensors = [(tensor.reshape(-1).view(torch.uint8).numpy().copy(), CODES[tensor.dtype]) for tensor in found]
    total = sum(len(data) for data, _ in tensors)
    half = {code for _, code in tensors} == {"F16"}
    coders = {label: make() for label, make in CODERS.items() if not (half and label == "DFloat11")}
    times: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in coders}
    sizes: dict[str, int] = {}
    for run in range(RUNS):
        for label, coder in coders.items():
            if not coder.decompress and run:
                continue  # minutes, which hardly vary
            prepared = [(coder.prepare(data), code) for data, code in tensors]
            start = time.perf_counter()
            coded = [coder.compress(data, code) for data, code in prepared]
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
    """Seconds for all tensors."""
    start = time.perf_counter()
    for content, data, code in pairs:
        back: Any = data if content is None else decompress(content, code, len(data))
        if check:
            assert np.array_equal(np.frombuffer(memoryview(back).cast("B"), np.uint8), data)
    return time.perf_counter() - start


def main() -> None:
    """Measure and save."""
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as directory:
        for dtype in (torch.float16, torch.bfloat16):
            spec = KINDS[CODES[dtype]]
            sliced, canonical = Path(directory) / f"sliced {spec}", Path(directory) / f"canonical {spec}"
            freebits.slice_model(
                demo_model(), sliced, sparsity=0.2, calibration=embedded_text()[0], dtype=dtype, samples=32
            )
            freebits.pack(sliced, canonical, entropy="none")
            rows += race(f"20%, {spec}, sliced", sliced) + race(f"20%, {spec}, canonical", canonical)
        rows += race("dense (was 4 bits), float16", demo_model())
    save_csv("entropy", HEADER, rows)
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
