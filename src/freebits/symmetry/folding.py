"""Fold the norms' scales into the matrices that read them (SliceGPT, section 3.2).

After folding, the norms of the residual stream are bare: `x / rms(x)`, without a scale.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from freebits.architecture import Architecture, Sublayer


def fold(tensors: Mapping[str, Tensor], sublayers: tuple[Sublayer, ...]) -> dict[str, Tensor]:
    """One block's tensors in float64, its norms folded in, with an identity for each shortcut.

    Args:
        tensors: the dense block, by full names, norms included.
        sublayers: the block's sublayers.

    Returns:
        The tensors in the order of the sublayers' axes, without the norms.
    """
    folded = {}
    for sublayer in sublayers:
        scale = tensors[f"{sublayer.norm}.weight"].double()
        for name in sublayer.axes:
            if name == f"{sublayer.shortcut}.weight":
                folded[name] = torch.eye(len(scale), dtype=torch.float64, device=scale.device)
            elif name in tensors:
                reads = name.removesuffix(".weight") in sublayer.reads
                folded[name] = tensors[name].double() * scale if reads else tensors[name].double()
    return folded


def fold_head(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The head in float64 with the final norm folded in; a tied head becomes a matrix of its own.

    Args:
        tensors: the final norm and the head, or the token embedding where the head is tied to it.
        architecture: the model they belong to.
    """
    family = architecture.family
    source = family.embeddings[0] if architecture.tied else family.head
    scale = tensors[f"{family.final_norm}.weight"].double()
    folded = {f"{family.head}.weight": tensors[f"{source}.weight"].double() * scale}
    if f"{family.head}.bias" in tensors:
        folded[f"{family.head}.bias"] = tensors[f"{family.head}.bias"].double()
    return folded
