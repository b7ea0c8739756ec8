"""Fold the norms into the matrices around them (SliceGPT, section 3.2).

After folding, the norms of the residual stream are bare: `x / rms(x)`. A norm's scale and bias go into the
matrices that read it. A LayerNorm's subtraction of the mean goes into the matrices that write the stream.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from freebits.architecture import Architecture, Axis, Sublayer


def fold_embeddings(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The embeddings, centred where the norms are LayerNorms, else as they are."""
    if not architecture.family.centred:
        return dict(tensors)
    return {name: _centre(tensor, architecture.embedding_axes[name]) for name, tensor in tensors.items()}


def fold(tensors: Mapping[str, Tensor], sublayers: tuple[Sublayer, ...]) -> dict[str, Tensor]:
    """One block's tensors in float64, its norms folded in, with an identity for each shortcut.

    Args:
        tensors: the dense block, by full names, norms included; norms with a bias are LayerNorms.
        sublayers: the block's sublayers.

    Returns:
        The tensors in the order of the sublayers' axes, without the norms.
    """
    folded = {}
    for sub in sublayers:
        scale = tensors[f"{sub.norm}.weight"].double()
        shift = tensors.get(f"{sub.norm}.bias")
        folded[f"{sub.shortcut}.weight"] = torch.eye(len(scale), dtype=torch.float64, device=scale.device)
        for module in sub.reads:
            folded |= _fold_into_reader(module, tensors, scale, shift)
        for name in (f"{sub.write}.weight", f"{sub.write}.bias"):
            if name in tensors:
                folded[name] = tensors[name].double() if shift is None else _centre(tensors[name], sub.axes[name])
    return folded


def fold_head(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The head in float64 with the final norm folded in; a tied head becomes a matrix of its own.

    Args:
        tensors: the final norm and the head, or the token embedding where the head is tied to it.
        architecture: the model they belong to.
    """
    family = architecture.family
    source = family.embeddings[0] if architecture.tied else family.head
    head = {f"{family.head}.weight": tensors[f"{source}.weight"]}
    scale = tensors[f"{family.final_norm}.weight"].double()
    return _fold_into_reader(family.head, head, scale, tensors.get(f"{family.final_norm}.bias"))


def _fold_into_reader(
    module: str, tensors: Mapping[str, Tensor], scale: Tensor, shift: Tensor | None
) -> dict[str, Tensor]:
    """Weight and bias of `y = norm(x) Wᵀ + b` for a bare norm."""
    weight = tensors[f"{module}.weight"].double()
    folded = {f"{module}.weight": weight * scale}
    biases = [tensors[f"{module}.bias"].double()] if f"{module}.bias" in tensors else []
    biases += [weight @ shift.double()] if shift is not None else []
    return folded | ({f"{module}.bias": sum(biases[1:], biases[0])} if biases else {})


def _centre(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """`W (I - 1 1ᵀ / D)`: what the tensor writes into the stream, less its mean."""
    wide = tensor.double()
    for axis in axes:
        if axis.writes:
            wide = wide - wide.mean(axis.dim, keepdim=True)
    return wide
