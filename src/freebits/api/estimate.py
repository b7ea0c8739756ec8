"""Estimate the compressed sizes of a model from its config, without its weights."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.evaluation.estimation import TYPICAL_ENTROPY, n_bytes, n_values, planned_forms
from freebits.evaluation.folder_sizes import change
from freebits.integrations.empty_models import MODEL_CREATION_LOCK
from freebits.integrations.loading import one_line_errors
from freebits.integrations.packed_models import auto_class, config_of
from freebits.limits import BLOCKS
from freebits.models.architecture import Architecture
from freebits.models.families import FAMILIES, dense_family
from freebits.storage.checkpoint import CONFIG, read_json
from freebits.storage.hub import local_folder
from freebits.transforms.slicing import sliced_size
from freebits.types import DTYPE_NAMES


def estimate(
    config: str | os.PathLike[str], sparsity: float | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Estimate the compressed sizes of a model from its `config.json`, without downloading or allocating weights.

    Args:
        config: path of a `config.json`, folder that contains one, URL of such a folder, or id of a model on the hub.
        sparsity: fraction of the hidden size to remove, in [0, 1). If None, sizes are estimated for several bits per
            weight and several sparsities.
        revision: branch, tag or commit of a model on the hub.

    Returns:
        Without `sparsity`: `dtype`, the name of the model's dtype; and `bytes` {`dense`, `lossless`, `8 bits` …
        `3 bits`, `sliced 10 %` … `sliced 30 %`}, the approximate bytes of the folders that freebits writes by default.
        The sliced sizes are missing if the model cannot be sliced.

        With `sparsity`: `hidden_size` and `sliced_size`, the widths before and after slicing; `dtype`; and four dicts
        by form. Dense forms are `dense`, `dense_untied` (with a separate head) and `dense_canonical` (packed). Sliced
        forms are `sliced`, `bits_back` and `canonical` (packed), with a separate head, and `canonical_tied`, which is
        None if the head of the model is not tied. `params`: number of parameters as in arXiv 2410.01309, without norms
        and corrections. `change_vs_dense` and `change_vs_dense_untied`: difference of this number from that of `dense`
        or `dense_untied` in percent, for all other forms. `bytes`: bytes of the tensors in `dtype`, norms included; the
        entry `default` is the approximate size after slicing and packing with default options.

    Raises:
        CheckpointError: the config does not exist, or does not describe a model.
        UnsupportedModelError: transformers has no such model, or `sparsity` is given, but the model cannot be sliced.
        UsageError: the sparsity is out of range.
    """
    path = local_folder(config, revision, config_only=True)
    path = path / CONFIG if path.is_dir() else path
    content = read_json(path)
    if sparsity is None:
        return _default_sizes(content, path)
    dense_family(content)
    architecture = Architecture.of(content)
    k = sliced_size(architecture.hidden_size, sparsity)
    dtype = _dtype(content)
    dtype_name = DTYPE_NAMES[dtype]
    try:
        planned = planned_forms(architecture, dense_shapes(content, path), k, dtype_name)
    except ValueError as error:
        raise CheckpointError(
            f"{path} describes a model too large for any machine ({error}): download the file again"
        ) from None
    params = {form: None if specs is None else n_values(architecture, specs) for form, specs in planned.items()}
    sizes = {form: None if specs is None else n_bytes(specs.values()) for form, specs in planned.items()}
    packed = sizes["canonical_tied"] or sizes["canonical"] or 0
    forms = ("dense_canonical", "sliced", "bits_back", "canonical", "canonical_tied")
    return {
        "hidden_size": architecture.hidden_size,
        "sliced_size": k,
        "dtype": str(dtype).removeprefix("torch."),
        "params": params,
        "bytes": sizes | {"default": round(TYPICAL_ENTROPY.get(dtype_name, 1.0) * packed)},
        **{
            f"change_vs_{base}": {form: change(params[form], params[base]) for form in forms}
            for base in ("dense_untied", "dense")
        },
    }


def _default_sizes(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Estimate the sizes of the dense and the lossless form, at several bits per weight, and at several sparsities."""
    dtype = _dtype(content)
    shapes = dense_shapes(content, path).values()
    n_weights = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    vector_bytes = sum(math.prod(shape) for shape in shapes if len(shape) < 2) * dtype.itemsize
    dense = n_weights * dtype.itemsize + vector_bytes
    sizes = {"dense": dense, "lossless": round(TYPICAL_ENTROPY.get(DTYPE_NAMES[dtype], 1.0) * dense)}
    sizes |= {f"{bits} bits": n_weights * bits // 8 + vector_bytes for bits in (8, 6, 5, 4, 3)}
    with suppress(UnsupportedModelError):
        dense_family(content)
        sizes |= {f"sliced {percent} %": estimate(path, percent / 100)["bytes"]["default"] for percent in (10, 20, 30)}
    return {"dtype": str(dtype).removeprefix("torch."), "bytes": sizes}


def dense_shapes(config: dict[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """Return name → shape of every tensor of the dense model that a config describes. A tied head is left out.

    Raises:
        CheckpointError: the config does not describe a model, or has more than `BLOCKS` blocks.
        UnsupportedModelError: transformers has no such model.
    """
    for key in {family.depth for family in FAMILIES} & config.keys():
        if isinstance(config[key], int) and config[key] > BLOCKS:
            raise CheckpointError(
                f"in {path}, {key} is {config[key]}, more than any model has: download the file again"
            )
    with MODEL_CREATION_LOCK, one_line_errors(path, "config"), torch.device("meta"):
        auto = getattr(transformers, auto_class(config) or "AutoModelForCausalLM")
        model = auto.from_config(config_of(config, auto), trust_remote_code=False)
    tensors = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if name in buffers}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """Return the dtype that a config names, or float16 if the config names no dtype that freebits knows."""
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype in DTYPE_NAMES else torch.float16
