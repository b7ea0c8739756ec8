"""Rescale the demo model so that it computes the same function, but its weights are not on a 4-bit grid.

The demo model was dequantized from blocks of 32 weights of 4 bits, so a quantizer with such blocks would recover its
grid. Random scales multiply one partner and divide the other: a norm and the layers that read it, up_proj and
down_proj, v_proj and o_proj.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo_model import demo_model

SPREAD = 0.15
"""Standard deviation of the logarithms of the scales."""


def off_grid(path: Path) -> Path:
    """Write the model as a float16 Llama checkpoint with its tokenizer, and return its folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    head_dim, repeats = config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def scales(size: int) -> Tensor:
        return torch.exp(SPREAD * torch.randn(size, generator=generator, dtype=torch.float64))

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                scale = scales(config.hidden_size)
                norm.weight /= scale
                for reader in readers:
                    reader.weight *= scale
            scale = scales(config.intermediate_size)
            mlp.up_proj.weight *= scale[:, None]
            mlp.down_proj.weight /= scale
            scale = scales(config.num_key_value_heads * head_dim)
            attention.v_proj.weight *= scale[:, None]
            attention.o_proj.weight /= scale.view(-1, 1, head_dim).expand(-1, repeats, -1).reshape(-1)
    model.half().save_pretrained(path)
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(path)
    return path
