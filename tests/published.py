"""Small checkpoints with the layouts of published ones: tensor names, tied heads, quantized and unloaded tensors.

`published_layouts.json` describes checkpoints on the hub: their model type and the patterns of their tensor names, with
`*` for numbers. `extra` lists tensors that the class in transformers does not load, such as layers that predict several
tokens at once.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from freebits.storage.checkpoint import Checkpoint
from tests.model_types import save_tiny_type
from tests.quantized_inputs import MAKERS

LAYOUTS: dict[str, dict[str, Any]] = {
    layout["model"].partition("/")[2]: layout
    for layout in json.loads(Path(__file__).with_name("published_layouts.json").read_text(encoding="utf-8"))
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma-4-26B-A4B-it": {
        "text_config": {
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_kv_shared_layers": 0,
            "top_k_experts": 2,
        }
    },
    "GLM-4.5-Air": {"attention_bias": True},
    "granite-4.0-h-tiny": {"layer_types": ["mamba", "attention", "mamba"]},
    "LFM2-1.2B": {"layer_types": ["conv", "full_attention", "conv"]},
}
"""Name of a checkpoint → attributes of its config that decide which tensors it has."""
RENAMED: dict[str, list[tuple[str, str]]] = {
    "gemma-3-4b-it": [("vision_tower.", "vision_tower.vision_model.")],
    "Kimi-K2.5": [
        ("model.blocks.", "model.layers."),
        ("model.mm_projector.", "mm_projector."),
        ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
    ],
}
"""Prefixes that `save_pretrained` of transformers 5.24 writes, and the published prefixes that replace them."""
STACKED = ("Qwen3.5-35B-A3B",)
"""Checkpoints published with stacked experts, which `save_pretrained` would split."""
_WIDTH = 64
_FP8, _INT4 = "FP8, blocks, float32 scales", "INT4, groups of 32"
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pattern(name: str) -> str:
    """Return a name with `*` in the place of each number."""
    return re.sub(r"(?<![a-zA-Z_])\d+(?![a-zA-Z_])", "*", name)


def auto_of(layout: dict[str, Any]) -> Any:
    """Return the Auto class that loads the model."""
    is_image_text = layout["architectures"][0].endswith("ForConditionalGeneration")
    return AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM


def save_layout(name: str, folder: Path) -> set[str]:
    """Save a small checkpoint with a published layout. Return the name patterns in which the two differ."""
    layout = LAYOUTS[name]
    model_type = "deepseek_v3" if layout["model_type"] == "kimi_k2" else layout["model_type"]
    settings = SETTINGS.get(name, {}) | ({"tie_word_embeddings": True} if layout["tied"] else {})
    save_tiny_type(model_type, folder, auto=auto_of(layout), settings=settings, original_format=name not in STACKED)
    config = json.loads((folder / "config.json").read_text())
    text_config = config.get("text_config", config)
    published = set(layout["names"])
    tensors: dict[str, Tensor] = {}
    for tensor_name, tensor in Checkpoint(folder).items():
        published_name = tensor_name
        for saved_prefix, published_prefix in RENAMED.get(name, []):
            published_name = published_name.replace(saved_prefix, published_prefix)
        tensors |= _as_published(published_name, tensor.clone(), published)
    depth = text_config.get("num_hidden_layers", 3)
    if "model.layers.*.*" in layout["extra"]:  # an additional block that predicts the token after the next one
        last = f"model.layers.{depth - 1}."
        tensors |= {n.replace(last, f"model.layers.{depth}."): t.clone() for n, t in tensors.items() if last in n}
    missing = published - {pattern(tensor_name) for tensor_name in tensors} - {"model.layers.*.*"}
    generator = torch.Generator().manual_seed(0)
    for missing_pattern in sorted(missing):
        is_extra_layer = missing_pattern.startswith("model.layers.*.") and missing_pattern in layout["extra"]
        number = depth if is_extra_layer else 0
        fragments = ("norm", "bias", "inv_freq", "embedding_vlm")
        is_vector = any(fragment in missing_pattern for fragment in fragments)
        shape = (_WIDTH,) if is_vector or missing_pattern.endswith("class_embedding") else (_WIDTH, _WIDTH)
        new = 0.1 * torch.randn(shape, generator=generator).bfloat16()
        if missing_pattern.endswith("lm_head.weight"):
            new = next(tensor for n, tensor in tensors.items() if n.endswith("embed_tokens.weight")).clone()
        tensors[missing_pattern.replace("*", str(number))] = new
    if layout["model_type"] == "kimi_k2":
        config |= {
            "model_type": "kimi_k2",
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        }
    if layout["quantized"]:
        is_int4 = layout["quantized"] == "compressed-tensors"
        is_mxfp4 = layout["quantized"] == "mxfp4"
        quantization = {"quant_method": "mxfp4"} if is_mxfp4 else dict(MAKERS[_INT4 if is_int4 else _FP8][1])
        (text_config if is_int4 else config)["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {n: tensor.contiguous() for n, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    patterns = {pattern(tensor_name) for tensor_name in tensors}
    return (patterns ^ published) - {"model.layers.*.*"}


def _as_published(name: str, tensor: Tensor, published: set[str]) -> dict[str, Tensor]:
    """Return a tensor as the tensors that are published in its place."""
    name_pattern, stem = pattern(name), name.removesuffix("weight")
    if f"{name_pattern}_scale_inv" in published:
        quantized = MAKERS[_FP8][0](tensor.float())[0]
    elif f"{name_pattern}_packed" in published:
        quantized = MAKERS[_INT4][0](tensor.float())[0]
    elif f"{name_pattern}_blocks" in published:
        return {f"{name}_{suffix}": stored for suffix, stored in mxfp4_stack(tensor.float()).items()}
    else:
        return {name: tensor}
    return {f"{stem}{suffix}": stored for suffix, stored in quantized.items()}


def mxfp4_stack(experts: Tensor) -> dict[str, Tensor]:
    """Quantize experts, (n, inputs, outputs), like those of gpt-oss.

    Each block of 32 values along the inputs has a scale that is a power of two.
    """
    blocks = experts.transpose(1, 2).unflatten(-1, (-1, 32))
    scale = (blocks.abs().amax(-1) / _E2M1[-1]).clamp_min(1e-30).log2().ceil()
    scaled = blocks / scale.exp2()[..., None]
    codes = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    return {"blocks": packed.to(torch.uint8), "scales": (scale + 127).to(torch.uint8)}
