"""Fold the norms into the matrices around them (SliceGPT, section 3.2).

After folding, the norms of the residual stream are bare: `x / rms(x)`. A norm's scale and bias go into the
matrices that read it. A LayerNorm's subtraction of the mean goes into the matrices that write the stream.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from freebits.models.table import Architecture, Module, Role, Sublayer

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


def fold_sublayers(tensors: Tensors, architecture: Architecture, sublayers: Iterable[Sublayer]) -> dict[str, Tensor]:
    """One block's tensors in float64, its norms folded in, with an identity for each shortcut.

    Matrices come out as (outputs, inputs), and a number by which a block multiplies its branches goes into the matrices
    that write them.

    Args:
        tensors: the dense block, by full names, norms included.
        architecture: the model they belong to.
        sublayers: the block's sublayers.

    Returns:
        The tensors in the order of the table's rows, without the norms.
    """
    centred, folded = architecture.family.centred, dict[str, Tensor]()
    for sub in sublayers:
        rows = {row.name: row for row in sub.weights(architecture.family)}
        ours = {
            name: tensors[name].T if row.transposed else tensors[name] for name, row in rows.items() if name in tensors
        }
        folded[sub.shortcut.weight] = torch.eye(architecture.hidden_size, dtype=torch.float64, device=_device(tensors))
        for branch in sub.branches:
            scale, shift = _norm(ours, branch.norm)
            for module in (*branch.reads, *branch.writes):
                if module.side:
                    folded[module.other] = ours[module.other].double()
            for read in branch.reads:
                folded |= _fold_into_reader(ours, read, scale, shift)
            for write in branch.writes:
                for name in {write.weight, write.bias} & ours.keys():
                    written = ours[name].double() * architecture.branch_scale
                    folded[name] = _centre(written, rows[name].axes[0].dim) if centred else written
            folded |= {name: ours[name].double() for name in branch.inner if name in ours}
    order = (row.name for sub in sublayers for row in sub.weights(architecture.family))
    return {name: folded[name] for name in order if name in folded}


def fold_head(tensors: Tensors, architecture: Architecture) -> dict[str, Tensor]:
    """The head in float64 with the final norm folded in; where the head stays tied, the final norm as it is.

    Args:
        tensors: the final norm and the head; where there is no head, it is the token embedding.
        architecture: the model they are to belong to.
    """
    norm, head = architecture.final_norm, architecture.head
    if architecture.tied:
        return {name: tensors[name] for name in (norm.weight, norm.bias, head.bias) if name in tensors}
    source = head.weight if head.weight in tensors else architecture.embedding.weight
    return _fold_into_reader({**tensors, head.weight: tensors[source]}, head, *_norm(tensors, norm))


def _norm(tensors: Tensors, norm: Module) -> tuple[Tensor, Tensor | None]:
    """Scale and, of a LayerNorm, bias."""
    shift = tensors.get(norm.bias)
    return tensors[norm.weight].double(), None if shift is None else shift.double()


def _fold_into_reader(tensors: Tensors, read: Module, scale: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    """Weight and bias of `y = norm(x) Wᵀ + b` for a bare norm; nothing where there is no such matrix."""
    if read.weight not in tensors:
        return {}
    weight = tensors[read.weight].double()
    bias = {read.bias: tensors[read.bias].double()} if read.bias in tensors else {}
    if shift is not None:
        shifted = weight @ shift
        shifted = tensors[read.other].double() @ shifted if read.side else shifted
        bias = {read.bias: shifted + bias.get(read.bias, 0)}
    return {read.weight: weight * scale} | bias


def _device(tensors: Tensors) -> torch.device:
    return next(iter(tensors.values())).device


def _centre(tensor: Tensor, dim: int) -> Tensor:
    """`W (I - 1 1ᵀ / D)`: what a tensor writes into the stream along `dim`, less its mean."""
    return tensor.double() - tensor.double().mean(dim, keepdim=True)
