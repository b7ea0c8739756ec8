"""Tiny random models of every type that transformers maps to a causal or image-text model.

python -m tests.model_types [TYPE ...]   # prints which types can be built and run
"""

import importlib
import inspect
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 256
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "word_embed_proj_dim", "n_embed"), 64),
    **dict.fromkeys(("attention_hidden_size", "linear_attn_hidden_size", "lru_width", "w_lora", "embedding_size"), 64),
    "out_hidden_size": 64,
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "dff", "d_ff", "dim_ff", "ffn_hidden_size", "encoder_ffn_dim"), 128
    ),
    **dict.fromkeys(("decoder_ffn_dim", "shared_expert_intermediate_size", "shared_intermediate_size"), 96),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "block_ff_dim", "ffn_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_dim", "expert_ffn_hidden_size", "moe_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_latent_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_attention_heads_per_layer"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("swa_num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "swa_head_dim", "global_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim", "o_lora_rank"), 16),
    **dict.fromkeys(("index_n_heads", "index_topk"), 4),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("experts_per_token", "moe_top_k", "num_selected_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 512),
    **dict.fromkeys(("context_length", "n_ctx", "seq_length", "max_target_positions"), 512),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "window_size"), 32),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "embedding_dim"), 16),
    **dict.fromkeys(("first_k_dense_replace", "num_kv_shared_layers"), 1),
    **dict.fromkeys(("image_size", "max_image_size"), 32),
    "patch_size": 16,
    "num_nextn_predict_layers": 0,
    "num_mtp_modules": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": True,
}
"""Attribute of a config → its value in a tiny model."""
_NOT_RANDOM = (
    "A_log",
    "dt_bias",
    "time_decay",
    "time_first",
    "time_mix",
    ".D",
    "rg_lru",
    "dt_proj",
    "A_",
    "lambda",
    "decay",
)
"""Name fragments of the parameters that keep the values with which transformers initializes them."""
DROP: Any = ...
"""Value in `EXCEPTIONS` that omits an attribute, so that transformers sets its default."""
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "layer_types": DROP, "layers_block_type": DROP},
    "blt": {
        "encoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
        "decoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
        "encoder_hash_byte_group_vocab": 300,
        "encoder_hash_byte_group_size": [3],
    },
    "dbrx": {
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"full_attention": _ROPE},
        "num_key_value_heads": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "topk_method": "greedy"},
    "dory": {
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_loops": 2,
        "num_hidden_layers": 4,
        "layer_types": DROP,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"num_key_value_heads": 4, "text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma3n_text": {"intermediate_size": [128] * 3, "activation_sparsity_pattern": [0.0] * 3},
    "glm4v_moe": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": [2, 2, 2], "num_shared_expert": [1, 1, 1]},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "linear_attention", "linear_attention"], "hc_lowrank": 16},
    "longcat_flash": {"zero_expert_num": 2},
    "roc_bert": {
        "shape_vocab_size": 64,
        "shape_embed_dim": 32,
        "pronunciation_vocab_size": 64,
        "pronunciation_embed_dim": 32,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 48],
        "attention_head_size": 16,
        "num_buckets": 4,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "feed_forward_size": 128,
    },
    "xlm": {"n_words": VOCABULARY, "emb_dim": 64},
    "xlstm": {"num_heads": 4, "head_dim": DROP, "embedding_dim": 64, "chunk_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {"n_mamba_heads": 4, "mamba_headdim": 32, "attention_head_dim": DROP, "attention_hidden_size": DROP},
    "zaya": {"num_experts_per_tok": 1, "moe_topk": 1},
}
"""Model type → attributes that differ from `SIZES`."""


def causal_types() -> list[str]:
    """Return the model types of the mapping to causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_text_types() -> list[str]:
    """Return the model types of the mapping to image-text models that have no causal language model."""
    return sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_config(model_type: str, settings: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedConfig:
    """Return a config of a model type with small sizes and with `settings`."""
    defaults = AutoConfig.for_model(model_type)
    attributes = shrunk(defaults)
    exceptions = EXCEPTIONS.get(model_type, {})
    if "rope_parameters" in exceptions:
        attributes.pop("rope_parameters", None)
    attributes = merged(merged(attributes, exceptions), settings)
    return type(defaults)(**{key: value for key, value in attributes.items() if value is not DROP})


def merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a nested dict into another one in place, and return the latter."""
    for key, value in changes.items():
        inner = base.get(key)
        base[key] = merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return base


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Return attributes that make a config small: those in `SIZES`, and those that must match them."""
    defaults = config.to_dict()
    changes: dict[str, Any] = {}
    always = ("bos_token_id", "eos_token_id")
    for key, value in defaults.items():
        inner = None if value is None or not isinstance(value, dict) else getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            changes[key] = shrunk(inner)
        elif key in SIZES and (value is not None or key in always) and not isinstance(value, list | dict):
            changes[key] = SIZES[key]
        elif key in ("rope_scaling", "rope_parameters") and "mrope_section" in str(value):
            changes[key] = value | {"mrope_section": [2, 3, 3]}
        elif key == "rope_parameters" and _has_sections(config):
            changes[key] = (value or _ROPE) | {"mrope_section": [2, 3, 3]}
    n_blocks = next((changes[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in changes), 3)
    for key, value in defaults.items():
        if key.endswith(("layer_types", "layers_block_type", "block_types", "_layers_types")) and isinstance(
            value, list
        ):
            layer_types = sorted(set(map(str, value)), key=list(map(str, value)).index)
            changes[key] = [layer_types[number % len(layer_types)] for number in range(n_blocks)]
    if "qk_rope_head_dim" in changes:
        changes |= {"head_dim": changes["qk_rope_head_dim"]} if "head_dim" in changes else {}
        changes |= {"num_key_value_heads": changes["num_attention_heads"]} if "num_key_value_heads" in changes else {}
    if "pad_token_id" in defaults:
        changes["pad_token_id"] = None if defaults["pad_token_id"] is None else 0
    return changes


def _has_sections(config: PreTrainedConfig) -> bool:
    """Return whether the model in transformers splits rotary frequencies by time, height and width."""
    try:
        modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return False
    return '"mrope_section"' in inspect.getsource(modeling)


def fill(model: Any, seed: int) -> None:
    """Set all parameters to random values, except those in `_NOT_RANDOM`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if any(fragment in name for fragment in _NOT_RANDOM):
                continue
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * values if is_norm else 0.1 * values)


def save_tiny_type(
    model_type: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    original_format: bool = True,
    seed: int = 0,
    auto: Any = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Save a tiny model of a type, with a tokenizer whose tokens are bytes, and return its folder."""
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = auto or (AutoModelForCausalLM if causal else AutoModelForImageTextToText)
    torch.manual_seed(seed)
    model = auto.from_config(tiny_config(model_type, settings))
    fill(model, seed)
    model._apply(
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    )  # `to` would make complex tensors real
    model.save_pretrained(folder, save_original_format=original_format)
    vocabulary = {character: token for token, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="Ā").save_pretrained(folder)
    return folder


def random_text(n: int, seed: int = 1) -> str:
    """Return `n` random characters that take one or two bytes each."""
    code_points = torch.randint(32, 0x7FF, (n,), generator=torch.Generator().manual_seed(seed))
    return "".join(map(chr, code_points.tolist()))


def plain_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits of the transformers model in a folder, (windows, T, V), in float32."""
    is_causal = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto: Any = AutoModelForCausalLM if is_causal else AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def main(types: list[str]) -> None:
    """Build and run a model of each type, and print one line for each."""
    warnings.simplefilter("ignore")
    tokens = torch.randint(5, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    n_built = n_finite = 0
    for model_type in types:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                folder = save_tiny_type(model_type, Path(scratch) / "model")
                n_built += 1
                size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2
                logits = plain_logits(folder, tokens)
                finite = bool(logits.isfinite().all())
                n_finite += finite
                print(f"{model_type}: {size:,} weights, logits {tuple(logits.shape)}, finite {finite}", flush=True)
            except Exception as error:
                print(f"{model_type}: {type(error).__name__}: {str(error)[:300]!r}", flush=True)
    print(f"{n_built} of {len(types)} types can be built, {n_finite} have finite logits")


if __name__ == "__main__":
    main(sys.argv[1:] or [*causal_types(), *image_text_types()])
