"""Write a Llama checkpoint as a GGUF file, and measure llama.cpp's speed with quantized versions of it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import torch

from freebits.storage.checkpoint import Checkpoint

TYPES = ("Q8_0", "Q4_K_M")


def write_gguf(folder: Path, out: Path) -> None:
    """Write the tensors in float16, with a config but without a tokenizer, which llama-bench does not need."""
    source, writer = Checkpoint(folder), gguf.GGUFWriter(out, "llama")
    config: Any = dict(source.config)
    heads, n_blocks = config["num_attention_heads"], config["num_hidden_layers"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(n_blocks)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_blocks)
    dtypes = {name: torch.float32 if len(spec.shape) == 1 else torch.float16 for name, spec in source.specs.items()}
    for name, spec in source.specs.items():
        stem, suffix = name.rsplit(".", 1)
        dtype = torch.empty(0, dtype=dtypes[name]).numpy().dtype
        n_bytes = spec.numel * dtype.itemsize
        writer.add_tensor_info(f"{names.get_name(stem)}.{suffix}", spec.shape, dtype, n_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in source.specs:
        writer.write_tensor_data(source[name].to(dtypes[name]).numpy())
    writer.close()


def quantize(binaries: Path, dense: Path, gguf_type: str) -> Path:
    """Quantize a GGUF file, and return the new file."""
    out = dense.with_name(f"{gguf_type}.gguf")
    command = [str(binaries / "llama-quantize"), str(dense), str(out), gguf_type]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def tokens_per_second(binaries: Path, model: Path, n_prompt: int, n_generated: int) -> tuple[float, float]:
    """Return tokens per second on as many threads as PyTorch uses: one sequence, and a prompt."""
    threads = torch.get_num_threads()
    options = {"-m": model, "-p": n_prompt, "-n": n_generated, "-t": threads, "-r": 1, "-o": "json"}
    command = [str(binaries / "llama-bench"), *(str(part) for option in options.items() for part in option)]
    runs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    prompt, generated = sorted(runs, key=lambda run: int(run["n_gen"]))
    return float(generated["avg_ts"]), float(prompt["avg_ts"])
