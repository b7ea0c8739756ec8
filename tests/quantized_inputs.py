"""Checkpoints quantized as other tools do it, if possible with the package that defines the format."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import Tensor

from freebits.storage.checkpoint import Checkpoint

Quantized = tuple[dict[str, Tensor], Tensor | None]
"""The last part of a tensor name → stored tensor, and the matrix that these decode to; None if it is not computed."""
FP8_MAX, FP4_MAX = 448.0, 6.0
BLOCK = 128


def fp8_blocks(W: Tensor, *, powers: bool = False) -> Quantized:
    """Quantize as DeepSeek does, with one scale for each block of 128 x 128: a float32, or a power of two."""
    rows, columns = (-(-size // BLOCK) for size in W.shape)
    padded = W.new_zeros(rows * BLOCK, columns * BLOCK)
    padded[: W.shape[0], : W.shape[1]] = W
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / FP8_MAX
    scale = scale.log2().ceil().exp2() if powers else scale
    values = (blocks / scale[:, None, :, None]).reshape_as(padded)[: W.shape[0], : W.shape[1]]
    stored = scale.to(torch.float8_e8m0fnu) if powers else scale
    return {"weight": values.to(torch.float8_e4m3fn).contiguous(), "weight_scale_inv": stored}, None


def compressed(W: Tensor, format_: str, **arguments: Any) -> Quantized:
    """Quantize with the package compressed-tensors."""
    weights = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor: Any = BaseCompressor.get_value_from_registry(format_)
    group = weights.group_size if weights.group_size and weights.group_size > 0 else W.shape[1]
    groups = W.reshape(len(W), -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    state = {"weight": W}
    if format_ == "nvfp4-pack-quantized":
        state["weight_global_scale"] = generate_gparam(W.min(), W.max())
    scale, zeros = calculate_qparams(low, high, weights, state.get("weight_global_scale"))
    if format_ == "mxfp4-pack-quantized":  # because this format stores only the exponent of a scale
        scale = (groups.abs().amax(-1) / FP4_MAX).log2().ceil().exp2()
    state |= {"weight_scale": scale, "weight_zero_point": zeros}
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def modelopt_nvfp4(W: Tensor) -> Quantized:
    """Quantize as NVIDIA's ModelOpt does, with an FP8 scale for each 16 values, times a global scale."""
    stored, matrix = compressed(
        W, "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    )
    global_scale = 1 / stored["weight_global_scale"].float()
    tensors = {
        "weight": stored["weight_packed"],
        "weight_scale": stored["weight_scale"],
        "weight_scale_2": global_scale,
    }
    return tensors | {"input_scale": torch.tensor(1.0)}, matrix


def packed_pairs(W: Tensor) -> Quantized:
    """Quantize as the experts of DeepSeek V4 are: pairs of MXFP4 values in INT8, and scales in E8M0."""
    stored, matrix = compressed(W, "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
    scale = stored["weight_scale"].view(torch.float8_e8m0fnu)
    return {"weight": stored["weight_packed"].view(torch.int8), "scale": scale}, matrix


def four_bits(W: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to unsigned 4-bit integers, (n, m). Return them, the zero points and the scales, both (n, groups)."""
    groups = W.reshape(len(W), -1, group)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(1e-8).half().float()
    zeros = (-low / scale).round().clamp(0, 15)
    integers = (groups / scale[..., None] + zeros[..., None]).round().clamp(0, 15).reshape_as(W)
    return integers.int(), zeros.int(), scale


def pack_eights(integers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack each eight 4-bit integers of the last dimension into one 32-bit integer, the first in the lowest bits."""
    eights = integers.long().reshape(*integers.shape[:-1], -1, 8)
    total = sum(eights[..., index] << 4 * position for position, index in enumerate(order))
    assert isinstance(total, Tensor)
    return (total - ((total >> 31) << 32)).int()


def gptq(W: Tensor, group: int = 64) -> Quantized:
    """Quantize as GPTQ does: integers are packed along the inputs, and zero points are stored less one."""
    integers, zeros, scale = four_bits(W, group)
    matrix = ((integers.reshape(len(W), -1, group) - zeros[..., None]) * scale[..., None]).reshape_as(W)
    tensors = {
        "qweight": pack_eights(integers).T.contiguous(),
        "qzeros": pack_eights(zeros.T - 1),
        "scales": scale.T.half().contiguous(),
        "g_idx": (torch.arange(W.shape[1]) // group).int(),
    }
    return tensors, matrix


def awq(W: Tensor, group: int = 64) -> Quantized:
    """Quantize as AWQ does: integers are packed along the outputs, in an order of its own."""
    integers, zeros, scale = four_bits(W, group)
    matrix = ((integers.reshape(len(W), -1, group) - zeros[..., None]) * scale[..., None]).reshape_as(W)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": pack_eights(integers.T, order),
        "qzeros": pack_eights(zeros.T, order),
        "scales": scale.T.half().contiguous(),
    }
    return tensors, matrix


def _groups(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "quantization_status": "compressed"}


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
MAKERS: dict[str, tuple[Callable[[Tensor], Quantized], Mapping[str, Any]]] = {
    "FP8, blocks, float32 scales": (fp8_blocks, _BLOCKS),
    "FP8, blocks, E8M0 scales": (lambda W: fp8_blocks(W, powers=True), _BLOCKS),
    "FP8, rows": (
        lambda W: compressed(W, "float-quantized", num_bits=8, type="float", strategy="channel"),
        _groups(num_bits=8, type="float", strategy="channel"),
    ),
    "INT8, rows": (
        lambda W: compressed(W, "int-quantized", num_bits=8, type="int", strategy="channel"),
        _groups(num_bits=8, type="int", strategy="channel"),
    ),
    "INT4, groups of 32": (lambda W: compressed(W, "pack-quantized", **_INT4), _groups(**_INT4)),
    "INT4, zero points": (
        lambda W: compressed(W, "pack-quantized", **_INT4, symmetric=False),
        _groups(**_INT4, symmetric=False),
    ),
    "MXFP4": (lambda W: compressed(W, "mxfp4-pack-quantized", **_MXFP4), _groups(**_MXFP4)),
    "MXFP4, DeepSeek V4": (packed_pairs, _BLOCKS),
    "NVFP4, compressed-tensors": (lambda W: compressed(W, "nvfp4-pack-quantized", **_NVFP4), _groups(**_NVFP4)),
    "NVFP4, ModelOpt": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "GPTQ, 4 bits": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 64}),
    "AWQ, 4 bits": (awq, {"quant_method": "awq", "bits": 4, "group_size": 64}),
}
"""Format → the function that quantizes a matrix, and the `quantization_config`."""


def save_quantized(dense: Path, folder: Path, format_: str) -> dict[str, Tensor]:
    """Save a checkpoint with the linear layers of its blocks quantized.

    Returns:
        Name of a matrix → the matrix that its stored tensors decode to. Empty for formats that do not compute it.
    """
    quantize, settings = MAKERS[format_]
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(settings)}))
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in Checkpoint(dense).items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor.clone()
            continue
        stored, matrix = quantize(tensor.float())
        stem = name.removesuffix("weight")
        tensors |= {f"{stem}{suffix}": part.contiguous() for suffix, part in stored.items()}
        if matrix is not None:
            expected[name] = matrix
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return expected
