"""Fold the norms into the matrices around them (SliceGPT, section 3.2).

After folding, the norms of the residual stream are bare: `x / rms(x)`. A norm's scale and bias go into the
matrices that read it. A LayerNorm's subtraction of the mean goes into the matrices that write the stream.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from freebits.architecture import Architecture, Axis, Sublayer


def fold_embeddings(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The embeddings, centred where the norms are LayerNorms; for a tied one its factor is centred instead."""
    folded = {}
    for name, axes in architecture.embedding_axes.items():
        if name == architecture.embedding_factor:
            token = tensors[architecture.embedding]
            folded[name] = torch.eye(token.shape[1], dtype=torch.float64, device=token.device)
        else:
            folded[name] = tensors[name]
        if architecture.family.centred:
            folded[name] = _centre(folded[name], axes)
    return folded


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
    """The head in float64 with the final norm folded in; where the head stays tied, the final norm as it is.

    Args:
        tensors: the final norm and the head; where there is no head, it is the token embedding.
        architecture: the model they are to belong to.
    """
    norm = {name: tensors[name] for name in architecture.norm_tensors(architecture.family.final_norm)}
    if architecture.tied:
        return norm
    scale, *shift = norm.values()
    source = architecture.head if architecture.head in tensors else architecture.embedding
    head = {architecture.head: tensors[source]}
    return _fold_into_reader(architecture.family.head, head, scale.double(), shift[0] if shift else None)


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
    """`W (I - 1 1ᵀ / D)`: what the tensor writes into the stream, less its mean; other tensors as they are."""
    for axis in axes:
        if axis.writes:
            tensor = tensor.double() - tensor.double().mean(axis.dim, keepdim=True)
    return tensor
