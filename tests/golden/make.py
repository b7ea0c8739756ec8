"""Make the golden files of the current format version: `python -m tests.golden.make`. Run it once per version."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import freebits
from freebits.models.sliced import SlicedLlamaConfig, SlicedLlamaForCausalLM
from freebits.packed.manifest import FORMAT
from freebits.packed.reader import PackedFolder
from freebits.transforms.orthogonal import random_orthogonal
from tests.tiny import tiny_config

GOLDEN = Path(__file__).parent / f"v{FORMAT}"
THRESHOLDS = {"bits-back": 0.001, "canonical": None}
"""Codec → correction threshold. The one of bits-back is so small that a few values are corrected."""
METHODS: dict[str, dict[str, Any]] = {
    "integers": {},
    "pyramid": {"rotate": "hadamard", "only": "linear"},
}
"""Rounding method → options of `quantize`."""


def main() -> None:
    """Make a model of one block with biases and grouped-query attention, sliced from 32 to 24, and pack it."""
    dense = tiny_config(vocab_size=16, num_hidden_layers=1, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    values = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "transformers_version")}
    torch.manual_seed(0)
    model = SlicedLlamaForCausalLM(SlicedLlamaConfig(**values, site_sizes=[24, 24, 32])).half()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    model.save_pretrained(GOLDEN / "sliced")
    for file in ("generation_config.json", "modeling_freebits.py"):
        (GOLDEN / "sliced" / file).unlink()
    config = json.loads((GOLDEN / "sliced" / "config.json").read_text())
    config.pop("transformers_version")
    (GOLDEN / "sliced" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = load_file(GOLDEN / "sliced" / "model.safetensors") | sliced_shortcuts()
    save_file(tensors, GOLDEN / "sliced" / "model.safetensors", metadata={"format": "pt"})
    for codec, threshold in THRESHOLDS.items():
        freebits.pack(GOLDEN / "sliced", GOLDEN / codec, codec=codec, entropy="none", threshold=threshold)
        remove_generated(GOLDEN / codec)
        save_file(dict(PackedFolder(GOLDEN / codec).model_tensors()), GOLDEN / f"{codec}.safetensors")
    freebits.pack(
        GOLDEN / "sliced", GOLDEN / "none", codec="none"
    )  # tensors are entropy-coded if that makes them smaller
    remove_generated(GOLDEN / "none")
    quantize_model()


def remove_generated(folder: Path) -> None:
    """Remove the files that are the same in every packed folder."""
    for file in ("README.md", "modeling_freebits.py"):
        (folder / file).unlink()


def quantize_model() -> None:
    """Quantize the matrices of the sliced model with each method."""
    for method, options in METHODS.items():
        out = GOLDEN / method
        freebits.quantize(GOLDEN / "sliced", out, method=method, bits=4, samples=2, seq_len=16, **options)
        remove_generated(out)
        save_file(dict(PackedFolder(out).model_tensors()), GOLDEN / f"{method}.safetensors")


def sliced_shortcuts() -> dict[str, torch.Tensor]:
    """Return shortcuts like those that slicing makes: products of parts of orthogonal matrices."""
    rotations = [random_orthogonal(32, torch.Generator().manual_seed(seed)) for seed in range(3)]
    attention = rotations[1][:, :24].T @ rotations[0][:, :24]
    mlp = rotations[2].T @ rotations[1][:, :24]
    shortcuts = {"attention": attention, "mlp": mlp}
    return {f"model.layers.0.{name}_shortcut.weight": A.half().contiguous() for name, A in shortcuts.items()}


if __name__ == "__main__":
    main()
