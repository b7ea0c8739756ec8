"""Make the golden files of the current format: `python -m tests.golden.make`, once for each format version."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import freebits
from freebits.huggingface.modeling import SlicedLlamaConfig, SlicedLlamaForCausalLM
from freebits.packed import unpacked_tensors
from freebits.packed.format import FORMAT
from tests.tiny import tiny_config

GOLDEN = Path(__file__).parent / f"v{FORMAT}"


def main() -> None:
    """A sliced model of one block with biases and grouped queries, 32 → 24, packed with a few corrections."""
    dense = tiny_config(vocab_size=16, num_hidden_layers=1, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    values = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "transformers_version")}
    torch.manual_seed(0)
    model = SlicedLlamaForCausalLM(SlicedLlamaConfig(**values, site_sizes=[24, 24, 32])).half()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    model.save_pretrained(GOLDEN / "sliced")
    (GOLDEN / "sliced" / "generation_config.json").unlink()
    config = json.loads((GOLDEN / "sliced" / "config.json").read_text())
    config.pop("transformers_version")
    (GOLDEN / "sliced" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    freebits.pack(GOLDEN / "sliced", GOLDEN / "packed", threshold=0.001)
    save_file(dict(unpacked_tensors(GOLDEN / "packed")), GOLDEN / "decoded.safetensors")


if __name__ == "__main__":
    main()
