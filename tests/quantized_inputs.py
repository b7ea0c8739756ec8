"""Checkpoints quantized as other tools do it, by the package that defines the format where there is one."""

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

Made = tuple[dict[str, Tensor], Tensor | None]
"""Tensors by the end of their names, and what the package makes of them; None where there is no package."""
FP8_MOST, FP4_MOST = 448.0, 6.0
BLOCK = 128


def fp8_blocks(W: Tensor, *, powers: bool = False) -> Made:
    """As DeepSeek's: a scale for each block of 128 x 128, a float32 or a power of two."""
    rows, columns = (-(-size // BLOCK) for size in W.shape)
    padded = W.new_zeros(rows * BLOCK, columns * BLOCK)
    padded[: W.shape[0], : W.shape[1]] = W
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / FP8_MOST
    scale = scale.log2().ceil().exp2() if powers else scale
    values = (blocks / scale[:, None, :, None]).reshape_as(padded)[: W.shape[0], : W.shape[1]]
    stored = scale.to(torch.float8_e8m0fnu) if powers else scale
    return {"weight": values.to(torch.float8_e4m3fn).contiguous(), "weight_scale_inv": stored}, None


def compressed(W: Tensor, format_: str, **arguments: Any) -> Made:
    """By compressed-tensors."""
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
    if format_ == "mxfp4-pack-quantized":  # which keeps nothing but the exponent
        scale = (groups.abs().amax(-1) / FP4_MOST).log2().ceil().exp2()
    state |= {"weight_scale": scale, "weight_zero_point": zeros}
    made = compressor.compress(state, scheme)
    return made, compressor.decompress(made, scheme)["weight"]


def modelopt_nvfp4(W: Tensor) -> Made:
    """As NVIDIA's ModelOpt: FP8 scales for each 16, and a global one to multiply with."""
    made, matrix = compressed(
        W, "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    )
    of_all = 1 / made["weight_global_scale"].float()
    tensors = {"weight": made["weight_packed"], "weight_scale": made["weight_scale"], "weight_scale_2": of_all}
    return tensors | {"input_scale": torch.tensor(1.0)}, matrix


def packed_pairs(W: Tensor) -> Made:
    """As DeepSeek V4's experts: MXFP4 in bytes of INT8, scales in E8M0."""
    made, matrix = compressed(W, "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
    scale = made["weight_scale"].view(torch.float8_e8m0fnu)
    return {"weight": made["weight_packed"].view(torch.int8), "scale": scale}, matrix


def four_bits(W: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned numbers (n, m), zero points and scales (n, groups)."""
    groups = W.reshape(len(W), -1, group)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(1e-8).half().float()
    zeros = (-low / scale).round().clamp(0, 15)
    numbers = (groups / scale[..., None] + zeros[..., None]).round().clamp(0, 15).reshape_as(W)
    return numbers.int(), zeros.int(), scale


def words(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of four bits in each 32-bit word of the last dimension."""
    eights = numbers.long().reshape(*numbers.shape[:-1], -1, 8)
    total = sum(eights[..., at] << 4 * place for place, at in enumerate(order))
    assert isinstance(total, Tensor)
    return (total - ((total >> 31) << 32)).int()


def gptq(W: Tensor, group: int = 64) -> Made:
    """As GPTQ: words down the inputs, zero points less one."""
    numbers, zeros, scale = four_bits(W, group)
    matrix = ((numbers.reshape(len(W), -1, group) - zeros[..., None]) * scale[..., None]).reshape_as(W)
    tensors = {
        "qweight": words(numbers).T.contiguous(),
        "qzeros": words(zeros.T - 1),
        "scales": scale.T.half().contiguous(),
        "g_idx": (torch.arange(W.shape[1]) // group).int(),
    }
    return tensors, matrix


def awq(W: Tensor, group: int = 64) -> Made:
    """As AWQ: words along the outputs, in its own order."""
    numbers, zeros, scale = four_bits(W, group)
    matrix = ((numbers.reshape(len(W), -1, group) - zeros[..., None]) * scale[..., None]).reshape_as(W)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": words(numbers.T, order),
        "qzeros": words(zeros.T, order),
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
MAKERS: dict[str, tuple[Callable[[Tensor], Made], Mapping[str, Any]]] = {
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
"""Format → what makes it of a matrix, and the `quantization_config`."""


def save_quantized(dense: Path, folder: Path, format_: str) -> dict[str, Tensor]:
    """A checkpoint with the linear layers of its blocks quantized; what the package makes of each."""
    make, settings = MAKERS[format_]
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(settings)}))
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in Checkpoint(dense).items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor.clone()
            continue
        made, matrix = make(tensor.float())
        tensors |= {f"{name.removesuffix('weight')}{end}": of.contiguous() for end, of in made.items()}
        if matrix is not None:
            expected[name] = matrix
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return expected
