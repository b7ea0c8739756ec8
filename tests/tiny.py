"""Tiny random models and text for them, and functions that change models and folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from freebits.packed.reader import PackedFolder

Make = Callable[..., Path]
"""Function that makes a folder: the type of the fixtures `save_tiny`, `slice_tiny` and `pack_tiny`."""

VARIANTS: dict[str, dict[str, Any]] = {
    "llama tied": {"tie_word_embeddings": True},
    "llama untied": {"tie_word_embeddings": False},
    "llama gqa": {"num_key_value_heads": 2},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama narrow heads": {"head_dim": 4},  # so the output matrix of attention has rank 16 < 32
    "opt tied": {"model_type": "opt"},
    "opt untied": {"model_type": "opt", "tie_word_embeddings": False},
}
"""Name of a tiny model → arguments of `tiny_config`."""


_MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 3": {"num_key_value_heads": 2},
    "Mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 16},
    "Qwen2": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "Qwen3": {"model_type": "qwen3", **_HEADS, "tie_word_embeddings": True},
    "SmolLM3": {"model_type": "smollm3", "num_key_value_heads": 2, "no_rope_layers": [1, 1, 0]},
    "Granite": {
        "model_type": "granite",
        "num_key_value_heads": 2,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
        "logits_scaling": 4.0,
        "tie_word_embeddings": True,
    },
    "Phi-3": {"model_type": "phi3", "num_key_value_heads": 2},
    "Mixtral": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4},
    "Qwen3-MoE": {"model_type": "qwen3_moe", **_HEADS, **_MIXTURE, "num_experts": 4, "mlp_only_layers": [1]},
    "DeepSeek V3": {
        "model_type": "deepseek_v3",
        **_MIXTURE,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "StableLM": {"model_type": "stablelm", "num_key_value_heads": 2, "use_qkv_bias": True},
    "StableLM, parallel": {"model_type": "stablelm", "num_key_value_heads": 4, "use_parallel_residual": True},
    "Phi-2": {"model_type": "phi"},
    "Pythia": {"model_type": "gpt_neox"},
    "GPT-NeoX, sequential": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "Falcon": {"model_type": "falcon"},
    "Falcon 40B": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "Falcon 2": {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
    },
    "Falcon RW": {"model_type": "falcon", "parallel_attn": False, "bias": True, "alibi": True, "multi_query": False},
    "GPT-2": {"model_type": "gpt2"},
    "OPT": {"model_type": "opt"},
    "OPT without biases": {"model_type": "opt", "enable_bias": False},
}
"""Name of a model family → arguments of `tiny_config`, for every row of the architecture table."""


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
    if model_type == "falcon":
        sizes["ffn_hidden_size"] = sizes.pop("intermediate_size")
    return AutoConfig.for_model(model_type, **sizes)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a dense model in which every parameter is random, including norms and biases."""
    model: Any = AutoModelForCausalLM.from_config(tiny_config(**changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_norm = name.endswith(".weight") and parameter.ndim == 1
        parameter.data.copy_(1 + 0.3 * random if is_norm else 0.3 * random)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words `w0` to `w95`."""
    vocabulary = {f"w{index}": index for index in range(96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")


def random_text(n_values: int, seed: int = 0) -> str:
    """Return `n_values` random words for the tokenizer of the tiny models."""
    tokens = torch.randint(96, (n_values,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{token}" for token in tokens.tolist())


def in_float64(model: Any) -> Any:
    """Make a model compute in float64, and return it.

    Norms of transformers always compute in float32, so they are replaced by norms of torch. Not all implementations of
    experts accept float64, so the model uses the eager one.
    """
    model.config._experts_implementation = "eager"
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and type(module).__name__ != "BareNorm":
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def tensors_of(packed: Path) -> dict[str, Tensor]:
    """Decode all tensors of the model in a packed folder."""
    return dict(PackedFolder(packed).model_tensors())


def change_tensors(folder: Path, **changes: Callable[[Tensor], Tensor]) -> None:
    """Change tensors of a checkpoint with one weights file. Argument names are tensor names with `__` for dots."""
    state = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        state[name.replace("__", ".")] = change(state[name.replace("__", ".")]).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """Change entries of a `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def flip(file: Path, position: int, bit: int = 1) -> None:
    """Flip a bit of a file."""
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= bit
    file.write_bytes(content)


def redigest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and recompute its digest, as an attacker can do."""
    manifest = json.loads((folder / "freebits.json").read_text())
    manifest.pop("digest")
    change(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    (folder / "freebits.json").write_text(json.dumps(manifest | {"digest": digest}))
