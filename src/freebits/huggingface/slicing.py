"""Slice a checkpoint folder into another."""

import json
import os
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from freebits.architecture import Architecture, dense_family
from freebits.checkpoint import Checkpoint, CheckpointWriter, carry_over, new_directory
from freebits.errors import CheckpointError, UsageError
from freebits.huggingface.estimate import dense_shapes
from freebits.huggingface.loading import device_of
from freebits.huggingface.modeling import auto_map, write_remote_code
from freebits.huggingface.runner import BlockRunner
from freebits.huggingface.tokens import token_windows
from freebits.packed import inspect, is_packed
from freebits.packed.size import dense_bytes
from freebits.progress import Progress, silent
from freebits.slicing import sliced_size, sliced_tensors
from freebits.text import embedded_text
from freebits.version import __version__


def slice_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sparsity: float,
    untie: bool = False,
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
        untie: give a head that is tied to the token embedding a matrix of its own, as SliceGPT does. By default
            that matrix is kept once, bit for bit (unless `dtype` is another), with a factor between it and the
            sliced stream.
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
    dense = Checkpoint(model)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: slice the dense model it was made from")
    architecture = _checked_architecture(dense)
    baselines = dense_bytes(dense, architecture)
    architecture = replace(architecture, tied=architecture.tied and not untie)
    torch_device = device_of(device)
    dtype = dtype or reduce(torch.promote_types, (dense.dtypes[n] for n in dense.files if n in architecture.axes))
    size = sliced_size(architecture.hidden_size, sparsity)
    tokens = _draw(
        token_windows(dense.path, embedded_text()[0] if calibration is None else calibration, seq_len), samples, seed
    )
    slicing = {
        "sparsity": sparsity,
        "samples": len(tokens),
        "seq_len": seq_len,
        "seed": seed,
        "random_orientation": random_orientation,
        "bytes": baselines,
        "producer": f"freebits {__version__}",
    }
    with new_directory(out) as directory:
        carry_over(dense.path, directory)
        config = _sliced_config(dense.config, architecture, size, dtype) | {"slicing": slicing}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_remote_code(directory, architecture.family)
        parts = sliced_tensors(
            dense,
            architecture,
            BlockRunner(dense.path, architecture, torch_device),
            tokens,
            size,
            dtype=dtype,
            orientation=torch.Generator().manual_seed(seed) if random_orientation else None,
        )
        with CheckpointWriter.like(dense, directory, architecture.axes) as writer:
            for done, tensors in enumerate(parts, start=1):
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                progress(done, architecture.n_blocks + 2)
    return inspect(out)


def _checked_architecture(dense: Checkpoint) -> Architecture:
    """What is in a dense checkpoint, once every tensor is what its config says."""
    dense_family(dense.config)
    architecture = Architecture.of(dense.config)
    architecture.check(dense.shapes)
    expected = dense_shapes(dense.config, dense.path)
    head, embedding = architecture.head, architecture.embedding
    for name in architecture.without_ignored(dense.files):
        if dense.shapes[name] != expected.get(name, expected[embedding] if name == head else None):
            raise CheckpointError(f"tensor {name} has shape {list(dense.shapes[name])}, which config.json contradicts")
        if not dense.dtypes[name].is_floating_point:
            raise CheckpointError(f"tensor {name} is {dense.dtypes[name]}: slicing needs floating-point weights")
    for name in expected.keys() - dense.files.keys() - {head}:
        raise CheckpointError(f"tensor {name} is missing: the checkpoint is incomplete")
    if architecture.tied and head in dense.files and not torch.equal(dense[head], dense[embedding]):
        return replace(architecture, tied=False)  # transformers, too, then takes the head that is there
    return architecture


def _draw(windows: Tensor, samples: int, seed: int) -> Tensor:
    if samples < 1:
        raise UsageError(f"samples {samples}: calibration needs at least one window")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed}: give one from 0 to 2^63 - 1")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]]


def _sliced_config(config: dict[str, Any], architecture: Architecture, size: int, dtype: torch.dtype) -> dict[str, Any]:
    family = architecture.family
    return {key: value for key, value in config.items() if key != "torch_dtype"} | {
        "model_type": family.sliced_model_type,
        "architectures": [family.sliced_causal_lm],
        "auto_map": auto_map(family),
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": architecture.tied,
        "site_sizes": list(architecture.site_sizes(size)),
    }
