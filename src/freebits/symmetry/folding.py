"""Fold the norms into the matrices around them (SliceGPT, section 3.2).

After folding, the norms of the residual stream are bare: `x / rms(x)`. A norm's scale and bias go into the
matrices that read it. A LayerNorm's subtraction of the mean goes into the matrices that write the stream.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from freebits.architecture import Architecture, Module, Role, Sublayer

Tensors = Mapping[str, Tensor]


def fold_embeddings(tensors: Tensors, architecture: Architecture) -> dict[str, Tensor]:
    """The embeddings, centred where the norms are LayerNorms; for a tied one its factor is centred instead."""
    folded = {}
    for name, weight in architecture.parts[0].weights.items():
        if weight.role is Role.FACTOR:
            token = tensors[architecture.embedding.weight]
            folded[name] = torch.eye(token.shape[1], dtype=torch.float64, device=token.device)
        else:
            folded[name] = tensors[name]
        if architecture.family.centred and weight.axes:
            folded[name] = _centre(folded[name], weight.axes[0].dim)
    return folded


def fold_sublayers(tensors: Tensors, sublayers: Iterable[Sublayer]) -> dict[str, Tensor]:
    """One block's tensors in float64, its norms folded in, with an identity for each shortcut.

    Args:
        tensors: the dense block, by full names, norms included; norms with a bias are LayerNorms.
        sublayers: the block's sublayers.

    Returns:
        The tensors in the order of the table's rows, without the norms.
    """
    folded: dict[str, Tensor] = {}
    for sub in sublayers:
        scale, shift = _norm(tensors, sub.norm)
        folded[sub.shortcut.weight] = torch.eye(len(scale), dtype=torch.float64, device=scale.device)
        readers = [_fold_into_reader(tensors, read, scale, shift) for read in sub.reads]
        folded |= {read.weight: weight for read, (weight, _) in zip(sub.reads, readers, strict=True)}
        folded |= {read.bias: bias for read, (_, bias) in zip(sub.reads, readers, strict=True) if bias is not None}
        for name in (sub.write.weight, sub.write.bias):
            if name in tensors:
                folded[name] = tensors[name].double() if shift is None else _centre(tensors[name], dim=0)
    return folded


def fold_head(tensors: Tensors, architecture: Architecture) -> dict[str, Tensor]:
    """The head in float64 with the final norm folded in; where the head stays tied, the final norm as it is.

    Args:
        tensors: the final norm and the head; where there is no head, it is the token embedding.
        architecture: the model they are to belong to.
    """
    norm, head = architecture.final_norm, architecture.head
    if architecture.tied:
        return {name: tensors[name] for name in (norm.weight, norm.bias) if name in tensors}
    source = head.weight if head.weight in tensors else architecture.embedding.weight
    weight, bias = _fold_into_reader({head.weight: tensors[source]}, head, *_norm(tensors, norm))
    return {head.weight: weight} | ({} if bias is None else {head.bias: bias})


def _norm(tensors: Tensors, norm: Module) -> tuple[Tensor, Tensor | None]:
    """Scale and, of a LayerNorm, bias."""
    shift = tensors.get(norm.bias)
    return tensors[norm.weight].double(), None if shift is None else shift.double()


def _fold_into_reader(
    tensors: Tensors, read: Module, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of `y = norm(x) Wᵀ + b` for a bare norm."""
    weight = tensors[read.weight].double()
    bias = tensors[read.bias].double() if read.bias in tensors else None
    if shift is not None:
        moved = weight @ shift
        bias = moved if bias is None else bias + moved
    return weight * scale, bias


def _centre(tensor: Tensor, dim: int) -> Tensor:
    """`W (I - 1 1ᵀ / D)`: what a tensor writes into the stream along `dim`, less its mean."""
    return tensor.double() - tensor.double().mean(dim, keepdim=True)
