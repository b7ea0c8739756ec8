"""Small models laid out as published ones: names on disk, what is tied or quantized, and what the library leaves out.

`published_layouts.json` has facts of checkpoints on the hub: their model type and the names of their tensors, numbers
as `*`; `extra` is what transformers' class does not load, such as layers that predict several tokens at once.
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
    of["model"].partition("/")[2]: of
    for of in json.loads(Path(__file__).with_name("published_layouts.json").read_text(encoding="utf-8"))
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
"""What the configs of some have that decides which tensors there are."""
RENAMED: dict[str, list[tuple[str, str]]] = {
    "gemma-3-4b-it": [("vision_tower.", "vision_tower.vision_model.")],
    "Kimi-K2.5": [
        ("model.blocks.", "model.layers."),
        ("model.mm_projector.", "mm_projector."),
        ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
    ],
}
"""Where `save_pretrained` of transformers 5.24 writes names that are not as published."""
STACKED = ("Qwen3.5-35B-A3B",)
"""Published with stacks of experts, which `save_pretrained` takes apart."""
_WIDTH = 64
_FP8, _INT4 = "FP8, blocks, float32 scales", "INT4, groups of 32"
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pattern(name: str) -> str:
    """A name with its numbers as `*`."""
    return re.sub(r"(?<![a-zA-Z_])\d+(?![a-zA-Z_])", "*", name)


def auto_of(layout: dict[str, Any]) -> Any:
    """The Auto class that people load it with."""
    sees = layout["architectures"][0].endswith("ForConditionalGeneration")
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def save_layout(name: str, folder: Path) -> set[str]:
    """A small checkpoint laid out as a published one; the patterns of its names that are not as published."""
    layout = LAYOUTS[name]
    model_type = "deepseek_v3" if layout["model_type"] == "kimi_k2" else layout["model_type"]
    settings = SETTINGS.get(name, {}) | ({"tie_word_embeddings": True} if layout["tied"] else {})
    save_tiny_type(model_type, folder, auto=auto_of(layout), settings=settings, original_format=name not in STACKED)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    published = set(layout["names"])
    tensors: dict[str, Tensor] = {}
    for tensor_name, tensor in Checkpoint(folder).items():
        as_published = tensor_name
        for theirs, ours in RENAMED.get(name, []):
            as_published = as_published.replace(theirs, ours)
        tensors |= _stored(as_published, tensor.clone(), published)
    depth = text.get("num_hidden_layers", 3)
    if "model.layers.*.*" in layout["extra"]:  # one block more, that predicts the token after the next
        last = f"model.layers.{depth - 1}."
        tensors |= {n.replace(last, f"model.layers.{depth}."): of.clone() for n, of in tensors.items() if last in n}
    missing = published - {pattern(of) for of in tensors} - {"model.layers.*.*"}
    generator = torch.Generator().manual_seed(0)
    for of in sorted(missing):
        number = depth if of.startswith("model.layers.*.") and of in layout["extra"] else 0
        is_vector = any(part in of for part in ("norm", "bias", "inv_freq", "embedding_vlm"))
        shape = (_WIDTH,) if is_vector or of.endswith("class_embedding") else (_WIDTH, _WIDTH)
        new = 0.1 * torch.randn(shape, generator=generator).bfloat16()
        if of.endswith("lm_head.weight"):
            new = next(tensor for n, tensor in tensors.items() if n.endswith("embed_tokens.weight")).clone()
        tensors[of.replace("*", str(number))] = new
    if layout["model_type"] == "kimi_k2":
        config |= {
            "model_type": "kimi_k2",
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        }
    if layout["quantized"]:
        made_by = MAKERS[_INT4 if layout["quantized"] == "compressed-tensors" else _FP8][1]
        settings_ = {"quant_method": "mxfp4"} if layout["quantized"] == "mxfp4" else dict(made_by)
        where = text if layout["quantized"] == "compressed-tensors" else config
        where["quantization_config"] = settings_
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {n: of.contiguous() for n, of in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    names = {pattern(of) for of in tensors}
    return (names ^ published) - {"model.layers.*.*"}


def _stored(name: str, tensor: Tensor, published: set[str]) -> dict[str, Tensor]:
    """A tensor in the format in which it is published."""
    of, stem = pattern(name), name.removesuffix("weight")
    if f"{of}_scale_inv" in published:
        made = MAKERS[_FP8][0](tensor.float())[0]
    elif f"{of}_packed" in published:
        made = MAKERS[_INT4][0](tensor.float())[0]
    elif f"{of}_blocks" in published:
        return {f"{name}_{part}": of for part, of in mxfp4_stack(tensor.float()).items()}
    else:
        return {name: tensor}
    return {f"{stem}{end}": of for end, of in made.items()}


def mxfp4_stack(experts: Tensor) -> dict[str, Tensor]:
    """Experts (n, inputs, outputs) as gpt-oss has them: blocks of 32 along the inputs, a power of two for each."""
    blocks = experts.transpose(1, 2).unflatten(-1, (-1, 32))
    scale = (blocks.abs().amax(-1) / _E2M1[-1]).clamp_min(1e-30).log2().ceil()
    scaled = blocks / scale.exp2()[..., None]
    codes = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    return {"blocks": packed.to(torch.uint8), "scales": (scale + 127).to(torch.uint8)}
