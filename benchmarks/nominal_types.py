"""Measure llama.cpp's K types on the off-grid demo model at their nominal bits, in the same way as `benchmarks.peers`.

    python -m benchmarks.nominal_types --data DATA --ggml LIBRARY

DATA contains `wikitext-2-raw`. LIBRARY is ggml's shared library, `libggml-base.so`.

A K type stores blocks of 256 weights. Most matrices of the demo model have rows of 576 weights, and llama.cpp falls
back to larger types for them. This script pads each row with zeros to a multiple of 256, quantizes it with ggml, and
cuts off the padding. Bytes are those of the real weights at the bits of their types, and 4 bytes for each entry of a
norm; headers and the tokenizer are not counted. Importances are the mean squares of each layer's inputs, as in
llama-imatrix. The last columns interpolate the rows of `benchmarks.quantize` to the same KL divergence; they are empty
outside the range of these rows.
"""

import argparse
import ctypes
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.off_grid import off_grid
from benchmarks.peers import IMPORTANCE
from benchmarks.quantize import WINDOWS, compare
from benchmarks.results import print_table, save_csv, saved_rows
from freebits.calibration.tokens import token_windows
from freebits.integrations.loading import load

HEADER = (
    *("row", "bits per weight", "bytes", "perplexity", "ratio", "mean_kl"),
    *("freebits bytes at this KL", "ratio of bytes"),
    *("freebits bytes without trellis", "ratio of bytes without trellis"),
)
MIXES = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
TYPES = {"q3_K": 11, "q4_K": 12, "q5_K": 13, "q6_K": 14}
"""Name of a type in ggml's functions → its number in `ggml_type`."""
BLOCK = 256
"""Weights per block of each K type."""
NORM_BYTES = 4
"""Bytes of each entry of a norm, which llama.cpp stores in float32."""


def main() -> None:
    """Measure each mix with and without importances, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ggml", type=Path, required=True)
    arguments = parser.parse_args()
    ggml = Ggml(arguments.ggml)
    valid, train = (
        (arguments.data / "wikitext-2-raw" / name).read_text(encoding="utf-8")
        for name in ("wiki.valid.raw", "wikitext2_train.txt")
    )
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        dense = off_grid(Path(scratch) / "off-grid")
        windows = token_windows(dense, valid, 1024, WINDOWS)
        reference, model = (load(dense, dtype=torch.float32).eval() for _ in range(2))
        importances = mean_squares(reference, token_windows(dense, train[: train.rindex("\n")], 512, 100))
    for mix in MIXES:
        for name, used in ((mix, {}), (f"{mix}, {IMPORTANCE}", importances)):
            bits, n_bytes = quantize(model, reference, ggml, mix, used)
            result = compare(reference, model, windows)
            peers = (at_same_kl(start, float(result["mean_kl"]), n_bytes) for start in ("whole, ", "no trellis, "))
            rows.append(
                (name, f"{bits:.3f}", str(n_bytes), *result.values(), *(cell for pair in peers for cell in pair))
            )
            print(rows[-1], flush=True)
            save_csv("nominal_types", HEADER, rows)
    print_table(HEADER, rows)


class Ggml:
    """ggml's shared library, which quantizes and dequantizes matrices."""

    def __init__(self, path: Path) -> None:
        self._ggml = ctypes.CDLL(str(path.resolve()))
        size, count, pointer = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
        self._ggml.ggml_row_size.argtypes, self._ggml.ggml_row_size.restype = (ctypes.c_int, count), size
        self._ggml.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, count, count, count, pointer)
        self._ggml.ggml_quantize_chunk.restype = size
        for name, number in TYPES.items():
            self._ggml.ggml_quantize_init(number)
            dequantize = getattr(self._ggml, f"dequantize_row_{name}")
            dequantize.argtypes, dequantize.restype = (pointer, pointer, count), None

    def bits(self, name: str) -> float:
        """Return the bits per weight of a type."""
        return float(8 * self._ggml.ggml_row_size(TYPES[name], BLOCK) / BLOCK)

    def rounded(self, weights: Tensor, name: str, importances: Tensor | None) -> Tensor:
        """Quantize a matrix, (n, m), and decode it. Use the importances of its columns, (m,), if given."""
        n, m = weights.shape
        padding = (0, -m % BLOCK)
        padded = pad(weights.float(), padding).contiguous()
        factors = None if importances is None else pad(importances.float(), padding).contiguous()
        row_size = self._ggml.ggml_row_size(TYPES[name], padded.shape[1])
        blocks = torch.empty(n * row_size, dtype=torch.uint8)
        n_bytes = self._ggml.ggml_quantize_chunk(
            TYPES[name],
            padded.data_ptr(),
            blocks.data_ptr(),
            0,
            *padded.shape,
            None if factors is None else factors.data_ptr(),
        )
        assert n_bytes == len(blocks), f"ggml wrote {n_bytes} bytes, not {len(blocks)}"
        restored = torch.empty_like(padded)
        getattr(self._ggml, f"dequantize_row_{name}")(blocks.data_ptr(), restored.data_ptr(), padded.numel())
        return restored[:, :m]


@torch.no_grad()
def quantize(model: Any, dense: Any, ggml: Ggml, mix: str, importances: Mapping[str, Tensor]) -> tuple[float, int]:
    """Overwrite a model's matrices with those of the dense model after quantization.

    Returns:
        The bits per weight of the matrices, and the bytes of all parameters.
    """
    exact = dict(dense.named_parameters())
    n_weights, n_bits, n_norm = 0, 0.0, 0
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            n_norm += parameter.numel()
            continue
        k_type = type_in_mix(mix, name, model.config.num_hidden_layers)
        parameter.copy_(ggml.rounded(exact[name], k_type, importances.get(name)))
        assert parameter.isfinite().all(), f"{name} is not finite in {k_type}"
        n_weights += parameter.numel()
        n_bits += parameter.numel() * ggml.bits(k_type)
    return n_bits / n_weights, round(n_bits / 8) + NORM_BYTES * n_norm


def type_in_mix(mix: str, name: str, n_layers: int) -> str:
    """Return the type that llama.cpp chooses for a matrix of a dense Llama with tied embeddings.

    These are the rules of `llama_tensor_get_type_impl` in llama.cpp's `llama-quant.cpp`. The tied embedding counts as
    the output matrix, which is in Q6_K in all these mixes.
    """
    default = f"q{mix[1]}_K"
    if ".layers." not in name:
        return "q6_K"
    layer, matrix = int(name.split(".")[2]), name.split(".")[-2]
    if mix == "Q3_K_M":
        n_first = {"v_proj": 2, "down_proj": n_layers // 16, "o_proj": 0}
        if matrix in n_first:
            return "q5_K" if layer < n_first[matrix] else "q4_K"
    if mix in ("Q4_K_M", "Q5_K_M") and matrix in ("v_proj", "down_proj") and layer in layers_with_more_bits(n_layers):
        return "q6_K"
    return default


def layers_with_more_bits(n_layers: int) -> set[int]:
    """Return the first and the last eighth of the layers, and every third layer between them."""
    n_first = n_layers // 8
    return {*range(n_first), *range(n_first + 2, n_layers, 3), *range(7 * n_layers // 8, n_layers)}


@torch.no_grad()
def mean_squares(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """Return the name of each linear layer's matrix in the blocks → the mean square of each of its inputs, (m,)."""
    layers = {name: module for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    sums = {
        f"model.{name}.weight": torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()
    }
    with observed(layers, sums):
        for window in windows:
            model.model(window[None], use_cache=False)
    return {name: total / windows.numel() for name, total in sums.items()}


@contextmanager
def observed(layers: Mapping[str, torch.nn.Module], sums: Mapping[str, Tensor]) -> Iterator[None]:
    """Add the squares of the inputs of layers to their sums."""

    def observer(total: Tensor) -> Any:
        def add(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total.add_(inputs[0].double().square().flatten(0, -2).sum(0))

        return add

    handles = [
        layer.register_forward_pre_hook(observer(sums[f"model.{name}.weight"])) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_same_kl(start: str, mean_kl: float, n_bytes: int) -> tuple[str, str]:
    """Return the bytes of freebits' folders at a KL divergence, and their ratio to `n_bytes`.

    The logarithm of the KL divergence is interpolated linearly over the bytes of the rows that begin with `start`.
    Both cells are empty if these rows do not reach the KL divergence.
    """
    rows = sorted((float(kl), int(size)) for name, _, size, *_, kl in saved_rows("quantize") if name.startswith(start))
    divergences, sizes = zip(*rows, strict=True)
    if not divergences[0] <= mean_kl <= divergences[-1]:
        return "", ""
    size = float(np.interp(np.log(mean_kl), np.log(divergences), sizes))
    return f"{size:.0f}", f"{size / n_bytes:.3f}"


if __name__ == "__main__":
    main()
