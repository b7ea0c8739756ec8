"""Fold the norms into the matrices around them (SliceGPT, section 3.2).

After folding, the norms of the residual stream are bare: `x / rms(x)`. The scale and the bias of a norm go into the
weights and biases of the layers that read the norm's output. The mean that a LayerNorm subtracts is removed from the
matrices and biases that write the stream.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from freebits.models.architecture import Architecture, Module, Role, Sublayer

Tensors = Mapping[str, Tensor]


def fold_embeddings(tensors: Tensors, architecture: Architecture) -> dict[str, Tensor]:
    """Return the embeddings and, if the head is tied, the factor that follows the token embedding.

    If the norms are LayerNorms, all these tensors are centered in float64, except a tied embedding.
    """
    folded = {}
    for name, weight in architecture.parts[0].weights.items():
        if weight.role is Role.FACTOR:
            token = tensors[architecture.embedding.weight]
            folded[name] = torch.eye(token.shape[1], dtype=torch.float64, device=token.device)
        else:
            folded[name] = tensors[name]
        if architecture.family.centred and weight.axes:
            folded[name] = _center(folded[name], weight.axes[0].dim)
    return folded


def fold_sublayers(tensors: Tensors, architecture: Architecture, sublayers: Iterable[Sublayer]) -> dict[str, Tensor]:
    """Return the tensors of one block in float64, with its norms folded in and an identity for each shortcut.

    Matrices are returned as (outputs, inputs). If a block multiplies the results of its branches by a factor, the
    matrices and biases that write the stream include this factor.

    Args:
        tensors: tensors of the dense block, including its norms, by full name.
        architecture: architecture of the model.
        sublayers: sublayers of the block.

    Returns:
        The tensors in the order of `Sublayer.weights`, without the norms.
    """
    centred, folded = architecture.family.centred, dict[str, Tensor]()
    for sub in sublayers:
        weights = {weight.name: weight for weight in sub.weights(architecture.family)}
        inputs = {
            name: tensors[name].T if weight.transposed else tensors[name]
            for name, weight in weights.items()
            if name in tensors
        }
        folded[sub.shortcut.weight] = torch.eye(architecture.hidden_size, dtype=torch.float64, device=_device(tensors))
        for branch in sub.branches:
            scale, shift = _norm(inputs, branch.norm)
            for module in (*branch.reads, *branch.writes):
                if module.side:
                    folded[module.inner_weight] = inputs[module.inner_weight].double()
            for read in branch.reads:
                folded |= _fold_into_reader(inputs, read, scale, shift)
            for write in branch.writes:
                for name in {write.weight, write.bias} & inputs.keys():
                    scaled = inputs[name].double() * architecture.branch_scale
                    folded[name] = _center(scaled, weights[name].axes[0].dim) if centred else scaled
            folded |= {name: inputs[name].double() for name in branch.inner if name in inputs}
    order = (weight.name for sub in sublayers for weight in sub.weights(architecture.family))
    return {name: folded[name] for name in order if name in folded}


def fold_head(tensors: Tensors, architecture: Architecture) -> dict[str, Tensor]:
    """Return the head in float64 with the final norm folded in, or the unchanged final norm if the head stays tied.

    Args:
        tensors: the final norm and the head, or the token embedding if there is no head.
        architecture: architecture of the resulting model.
    """
    norm, head = architecture.final_norm, architecture.head
    if architecture.tied:
        return {name: tensors[name] for name in (norm.weight, norm.bias, head.bias) if name in tensors}
    source = head.weight if head.weight in tensors else architecture.embedding.weight
    return _fold_into_reader({**tensors, head.weight: tensors[source]}, head, *_norm(tensors, norm))


def _norm(tensors: Tensors, norm: Module) -> tuple[Tensor, Tensor | None]:
    """Return the scale of a norm and its bias, or None for the bias if the norm has none."""
    shift = tensors.get(norm.bias)
    return tensors[norm.weight].double(), None if shift is None else shift.double()


def _fold_into_reader(tensors: Tensors, read: Module, scale: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    """Return the weight and bias that read a bare norm instead of the given norm; empty if the matrix is missing."""
    if read.weight not in tensors:
        return {}
    weight = tensors[read.weight].double()
    bias = {read.bias: tensors[read.bias].double()} if read.bias in tensors else {}
    if shift is not None:
        shifted = weight @ shift
        shifted = tensors[read.inner_weight].double() @ shifted if read.side else shifted
        bias = {read.bias: shifted + bias.get(read.bias, 0)}
    return {read.weight: weight * scale} | bias


def _device(tensors: Tensors) -> torch.device:
    return next(iter(tensors.values())).device


def _center(tensor: Tensor, dim: int) -> Tensor:
    """Return a tensor that writes the stream along `dim`, minus its mean along `dim`: `W (I - 1 1ᵀ / D)`."""
    return tensor.double() - tensor.double().mean(dim, keepdim=True)
