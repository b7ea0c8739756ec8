"""Estimate sizes from a config alone."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from freebits.architecture import Architecture, dense_family
from freebits.checkpoint import read_json
from freebits.huggingface.loading import understood
from freebits.packed.estimation import word_counts
from freebits.packed.size import change
from freebits.slicing import sliced_size


def estimate(config: str | os.PathLike[str], sparsity: float) -> dict[str, Any]:
    """How large a model would become, from its `config.json` alone: nothing is downloaded or allocated.

    Args:
        config: a `config.json`, or a folder that has one.
        sparsity: the part of the hidden size to remove, in [0, 1).

    Returns:
        `hidden_size`, `sliced_size`; `params` {`dense`, `dense_untied`, `sliced`, `bits_back`, `canonical`,
        `canonical_tied`}, see `freebits.packed.estimation.word_counts`; and in percent, negative is smaller,
        `change_vs_dense_untied` and `change_vs_dense` of `sliced`, `bits_back`, `canonical` and `canonical_tied`.

    Raises:
        CheckpointError: there is no such file, or it describes no model.
        UnsupportedModelError: no rotation of this model's stream is free; the message says why.
        UsageError: the sparsity cannot be.
    """
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    content = read_json(path)
    dense_family(content)
    architecture = Architecture.of(content)
    k = sliced_size(architecture.hidden_size, sparsity)
    params = word_counts(architecture, dense_shapes(content, path), k)
    forms = ("sliced", "bits_back", "canonical", "canonical_tied")
    return {
        "hidden_size": architecture.hidden_size,
        "sliced_size": k,
        "params": params,
        **{
            f"change_vs_{base}": {form: change(params[form], params[base]) for form in forms}
            for base in ("dense_untied", "dense")
        },
    }


def dense_shapes(config: dict[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the dense model that a config describes; a tied head is left out."""
    with understood(path, "config"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
