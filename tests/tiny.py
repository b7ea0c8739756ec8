"""Tiny random models and text for them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "llama tied": {"tie_word_embeddings": True},
    "llama untied": {"tie_word_embeddings": False},
    "llama gqa": {"num_key_value_heads": 2},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama narrow heads": {"head_dim": 4},  # the attention's output matrix has rank 16 < 32
    "opt tied": {"model_type": "opt"},
    "opt untied": {"model_type": "opt", "tie_word_embeddings": False},
}
"""What distinguishes the tiny models."""


def tiny_config(model_type: str = "llama", **changes: Any) -> PreTrainedConfig:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": None,
    } | changes
    if model_type == "opt":
        sizes |= {"ffn_dim": sizes.pop("intermediate_size"), "word_embed_proj_dim": sizes["hidden_size"]}
        sizes.pop("rms_norm_eps")
    return AutoConfig.for_model(model_type, **sizes)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A dense model whose every parameter is random, norms and biases too."""
    model: Any = AutoModelForCausalLM.from_config(tiny_config(**changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(1 + 0.3 * random if "norm.weight" in name else 0.3 * random)
    return model.eval()


def random_text(n_words: int, seed: int = 0) -> str:
    """Text for the tiny models' tokenizer."""
    numbers = torch.randint(96, (n_words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())
