"""Simulate activations and the KV cache at a few bits, in QuaRot's setting: computed in floats, with the error made.

Activations are quantized where a linear layer of a block reads them: per token, symmetric, clipped at 0.9 of the
largest; keys (after the rotary embedding) and values where the cache takes them: per group of 128 along the head,
asymmetric, clipped at 0.95 (QuaRot, section 4). Rotated, each is quantized in a randomised Hadamard basis and turned
back, which is what rotated weights and online transforms compute.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from freebits.codecs.hadamard import hadamard, hadamard_inverse
from freebits.errors import UsageError
from freebits.options import HADAMARD, ROTATIONS

ACTIVATION_CLIP, CACHE_CLIP, CACHE_GROUP = 0.9, 0.95, 128
_SEED = 0


def symmetric(x: Tensor, bits: int, clip: float = ACTIVATION_CLIP) -> Tensor:
    """Rounded to `2^bits - 1` points around zero, up to `clip` of the largest number of each vector, (…, n)."""
    most = 2 ** (bits - 1) - 1
    scale = (clip * x.abs().amax(-1, keepdim=True) / most).clamp_min(1e-12)
    return (x / scale).round().clamp(-most, most) * scale


def asymmetric(x: Tensor, bits: int, clip: float = CACHE_CLIP, group: int = CACHE_GROUP) -> Tensor:
    """Rounded to `2^bits` points between `clip` of the least and the largest of each group of each vector, (…, n)."""
    parts = []
    for part in x.split(group, -1):
        low, high = clip * part.amin(-1, keepdim=True), clip * part.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
        parts.append(((part - low) / scale).round().clamp(0, 2**bits - 1) * scale + low)
    return torch.cat(parts, -1)


class CoarseCache(DynamicCache):
    """A cache that rounds the keys and values it takes."""

    def __init__(self, bits: int, rotate: bool) -> None:
        super().__init__()
        self._bits, self._rotate = bits, rotate

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As in transformers, of what is left of them."""
        keys, values = (_in_basis(self._rotate, x, self._rounded) for x in (key_states, value_states))
        return super().update(keys, values, *args, **kwargs)

    def _rounded(self, x: Tensor) -> Tensor:
        return asymmetric(x, self._bits)


@dataclass(frozen=True)
class Simulation:
    """What is simulated; nothing by default.

    Attributes:
        activations: bits of what linear layers read.
        kv: bits of keys and values.
        rotate: `hadamard` for a rotated basis.

    Raises:
        UsageError: there are no such bits, or there is no such rotation.
    """

    activations: int | None = None
    kv: int | None = None
    rotate: str = "none"

    def __post_init__(self) -> None:
        if any(bits is not None and not 2 <= bits <= 16 for bits in (self.activations, self.kv)):
            raise UsageError(f"activations of {self.activations} and cache of {self.kv} bits: give 2 to 16")
        if self.rotate not in ROTATIONS:
            raise UsageError(f"there is no rotation {self.rotate!r}: choose one of {', '.join(ROTATIONS)}")

    def cache(self) -> CoarseCache | None:
        """A cache for one window."""
        return CoarseCache(self.kv, self.rotate == HADAMARD) if self.kv else None

    @contextmanager
    def activations_of(self, model: Any) -> Iterator[None]:
        """While this lasts, the model's linear layers but the head read rounded inputs."""
        head, bits = model.get_output_embeddings(), self.activations

        def read(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (_in_basis(self.rotate == HADAMARD, args[0], lambda x: symmetric(x, bits or 0)), *args[1:])

        layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        handles = [layer.register_forward_pre_hook(read) for layer in layers] if bits else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _in_basis(rotate: bool, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return hadamard_inverse(function(hadamard(x, _SEED)), _SEED) if rotate else function(x)
