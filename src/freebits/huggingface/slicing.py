"""Slice a checkpoint folder into another."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.architecture import Architecture, dense_family
from freebits.checkpoint import Checkpoint, CheckpointWriter, carry_over, new_directory
from freebits.errors import CheckpointError, UsageError
from freebits.huggingface.loading import device_of
from freebits.huggingface.runner import BlockRunner
from freebits.huggingface.tokens import token_windows
from freebits.packed import inspect, is_packed
from freebits.packed.size import dense_bytes
from freebits.progress import Progress, silent
from freebits.slicing import sliced_size, sliced_tensors
from freebits.text import embedded_text
from freebits.version import __version__

REMOTE_CODE = "modeling_freebits.py"


def slice_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sparsity: float,
    calibration: str | None = None,
    samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    random_orientation: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Slice a dense checkpoint (SliceGPT): lossy. Memory holds one block, one embedding and the activations.

    Args:
        model: folder of a dense checkpoint.
        out: folder to create; it appears complete or not at all.
        sparsity: the part of the hidden size to remove, in [0, 1).
        calibration: text to calibrate on; by default the embedded text.
        samples: windows of calibration text, drawn without replacement; all of them where the text has fewer.
        seq_len: tokens a window.
        seed: of that draw, and of the random orientation.
        random_orientation: turn each kept subspace at random within itself.
        device: where to calibrate, in float32.
        dtype: of the sliced weights; by default the dense model's.
        progress: called after each block.

    Returns:
        What `inspect(out)` says.

    Raises:
        UsageError: an argument cannot be.
        CheckpointError: `model` is no sound checkpoint, or `out` exists.
        UnsupportedModelError: no rotation of this model's stream is free; the message says why.
    """
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: slice the dense model it was made from")
    dense = Checkpoint(model)
    dense_family(dense.config)
    architecture = Architecture.of(dense.config)
    architecture.check(dense.shapes)
    torch_device = device_of(device)
    dtype = dtype or _common_dtype(dense, architecture)
    size = sliced_size(architecture.hidden_size, sparsity)
    tokens = _draw(token_windows(dense.path, calibration or embedded_text()[0], seq_len), samples, seed)
    slicing = {
        "sparsity": sparsity,
        "samples": len(tokens),
        "seq_len": seq_len,
        "seed": seed,
        "random_orientation": random_orientation,
        "bytes": dense_bytes(dense, architecture),
        "producer": f"freebits {__version__}",
    }
    with new_directory(out) as directory:
        carry_over(dense.path, directory, but=[REMOTE_CODE])
        config = _sliced_config(dense.config, architecture, size, dtype) | {"slicing": slicing}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_remote_code(directory, architecture)
        parts = sliced_tensors(
            dense,
            BlockRunner(dense.path, architecture, torch_device),
            tokens,
            sparsity,
            dtype=dtype,
            orientation=torch.Generator().manual_seed(seed) if random_orientation else None,
        )
        with CheckpointWriter.like(dense, directory, architecture.axes) as writer:
            for done, tensors in enumerate(parts, start=1):
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                progress(done, architecture.n_blocks + 2)
    return inspect(out)


def _common_dtype(dense: Checkpoint, architecture: Architecture) -> torch.dtype:
    names = architecture.without_ignored(dense.files)
    for name in names:
        if not dense.dtypes[name].is_floating_point:
            raise CheckpointError(f"tensor {name} is {dense.dtypes[name]}: slicing needs floating-point weights")
    return torch.promote_types(*(dense.dtypes[names[i]] for i in (0, -1)))


def _draw(windows: Tensor, samples: int, seed: int) -> Tensor:
    if samples < 1:
        raise UsageError(f"samples {samples}: calibration needs at least one window")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]]


def _sliced_config(config: dict[str, Any], architecture: Architecture, size: int, dtype: torch.dtype) -> dict[str, Any]:
    family = architecture.family
    module = Path(REMOTE_CODE).stem
    return {key: value for key, value in config.items() if key != "torch_dtype"} | {
        "model_type": family.sliced_model_type,
        "architectures": [family.sliced_causal_lm],
        "auto_map": {
            "AutoConfig": f"{module}.{family.sliced_config}",
            "AutoModelForCausalLM": f"{module}.{family.sliced_causal_lm}",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "site_sizes": list(architecture.site_sizes(size)),
    }


def _write_remote_code(directory: Path, architecture: Architecture) -> None:
    """So that `trust_remote_code=True` works without `import freebits`, once freebits is installed."""
    family = architecture.family
    names = f"{family.sliced_config}, {family.sliced_causal_lm}"
    (directory / REMOTE_CODE).write_text(
        f'"""The sliced {family.model_type} model of freebits: pip install freebits."""\n\n'
        f"from freebits.huggingface.modeling import {names}  # noqa: F401\n",
        encoding="utf-8",
    )
