"""Estimate sizes from a config alone."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.evaluation.estimation import TYPICAL_ENTROPY, n_bytes, n_values, planned_forms
from freebits.evaluation.sizes import change
from freebits.integrations.empty_models import BUILDING
from freebits.integrations.loading import one_line_errors
from freebits.integrations.packed_models import auto_class, config_of
from freebits.limits import BLOCKS
from freebits.models.families import FAMILIES, dense_family
from freebits.models.table import Architecture
from freebits.storage.folder import CONFIG, read_json
from freebits.storage.hub import located
from freebits.transforms.slicing import sliced_size
from freebits.types import DTYPE_CODES


def estimate(
    config: str | os.PathLike[str], sparsity: float | None = None, revision: str | None = None
) -> dict[str, Any]:
    """How large a model would become, from its `config.json` alone: no weights are downloaded or allocated.

    Args:
        config: a `config.json`, a folder that has one, or a model's id on the hub.
        sparsity: the part of the hidden size to remove, in [0, 1); None for the ladder.
        revision: of a model on the hub.

    Returns:
        Without sparsity `dtype` and `bytes` of each step of the ladder: `dense`, `lossless`, `8 bits` … `3 bits`, and,
        where the stream can be sliced, `sliced 10 %` … `sliced 30 %`, each about as freebits writes it by default.
        Else `hidden_size`, `sliced_size`; `params` {`dense`, `dense_untied`, `dense_canonical`, `sliced`, `bits_back`,
        `canonical`, `canonical_tied`}, see `planned_forms`; and in percent, negative is smaller,
        `change_vs_dense_untied` and `change_vs_dense` of `dense_canonical` and what follows it.
        `dtype` and `bytes`: the same forms as tensors in the config's dtype, norms included, and `default`, about what
        slicing and packing write by default: ties kept, canonical, entropy-coded as weights usually are.

    Raises:
        CheckpointError: there is no such file, or it describes no model.
        UnsupportedModelError: no rotation of this model's stream is free; the message says why.
        UsageError: the sparsity makes no sense.
    """
    path = located(config, revision, config_only=True)
    path = path / CONFIG if path.is_dir() else path
    content = read_json(path)
    if sparsity is None:
        return _ladder(content, path)
    dense_family(content)
    architecture = Architecture.of(content)
    k = sliced_size(architecture.hidden_size, sparsity)
    dtype = _dtype(content)
    code = DTYPE_CODES[dtype]
    try:
        planned = planned_forms(architecture, dense_shapes(content, path), k, code)
    except ValueError as error:
        raise CheckpointError(f"{path} describes a model too large for any machine ({error})") from None
    params = {form: None if specs is None else n_values(architecture, specs) for form, specs in planned.items()}
    sizes = {form: None if specs is None else n_bytes(specs.values()) for form, specs in planned.items()}
    packed = sizes["canonical_tied"] or sizes["canonical"] or 0
    forms = ("dense_canonical", "sliced", "bits_back", "canonical", "canonical_tied")
    return {
        "hidden_size": architecture.hidden_size,
        "sliced_size": k,
        "dtype": str(dtype).removeprefix("torch."),
        "params": params,
        "bytes": sizes | {"default": round(TYPICAL_ENTROPY.get(code, 1.0) * packed)},
        **{
            f"change_vs_{base}": {form: change(params[form], params[base]) for form in forms}
            for base in ("dense_untied", "dense")
        },
    }


def _ladder(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """About what the default ways make of a model."""
    dtype = _dtype(content)
    code = DTYPE_CODES[dtype]
    shapes = dense_shapes(content, path).values()
    numbers = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    rest = sum(math.prod(shape) for shape in shapes if len(shape) < 2) * dtype.itemsize
    dense = numbers * dtype.itemsize + rest
    ladder = {"dense": dense, "lossless": round(TYPICAL_ENTROPY.get(code, 1.0) * dense)}
    ladder |= {f"{bits} bits": numbers * bits // 8 + rest for bits in (8, 6, 5, 4, 3)}
    with suppress(UnsupportedModelError):
        dense_family(content)
        ladder |= {f"sliced {part} %": estimate(path, part / 100)["bytes"]["default"] for part in (10, 20, 30)}
    return {"dtype": str(dtype).removeprefix("torch."), "bytes": ladder}


def dense_shapes(config: dict[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the dense model that a config describes; a tied head is left out.

    Raises:
        CheckpointError: it describes no model, or one of more blocks than any has.
    """
    for key in {family.depth for family in FAMILIES} & config.keys():
        if isinstance(config[key], int) and config[key] > BLOCKS:
            raise CheckpointError(f"{path}: {key} is {config[key]}, more than any model has: restore the file")
    with BUILDING, one_line_errors(path, "config"), torch.device("meta"):
        auto = getattr(transformers, auto_class(config) or "AutoModelForCausalLM")
        model = auto.from_config(config_of(config, auto), trust_remote_code=False)
    tensors = dict(model.named_parameters())
    tensors |= {name: of for name, of in model.state_dict().items() if name in dict(model.named_buffers())}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """Of the weights, as a config tells it; float16 where it does not."""
    told = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return told if isinstance(told, torch.dtype) and told in DTYPE_CODES else torch.float16
