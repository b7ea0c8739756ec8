"""Simulate quantized activations and a quantized KV cache as in QuaRot. Numbers are rounded, but stay floats.

The inputs of all linear layers except the head are rounded per token. This rounding is symmetric, and clips at 0.9
times the largest magnitude. Keys (after the rotary embedding) and values are rounded when the cache stores them, in
groups of 128 components of a head. This rounding is asymmetric, and clips at 0.95 times the minimum and the maximum
(QuaRot, section 4). With rotation, inputs, keys and values are rounded in a randomized Hadamard basis and rotated back.
The result equals that of rotated weights with online transforms.
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


def round_symmetric(x: Tensor, bits: int, clip: float = ACTIVATION_CLIP) -> Tensor:
    """Round vectors, (…, n), to `2^bits - 1` points around zero, up to `clip` times their largest magnitudes."""
    largest = 2 ** (bits - 1) - 1
    scale = (clip * x.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-12)
    return (x / scale).round().clamp(-largest, largest) * scale


def round_asymmetric(x: Tensor, bits: int, clip: float = CACHE_CLIP, group: int = CACHE_GROUP) -> Tensor:
    """Round vectors, (…, n), in groups of `group` values.

    Each group is rounded to `2^bits` points, from `clip` times its minimum to `clip` times its maximum.
    """
    parts = []
    for part in x.split(group, -1):
        low, high = clip * part.amin(-1, keepdim=True), clip * part.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
        parts.append(((part - low) / scale).round().clamp(0, 2**bits - 1) * scale + low)
    return torch.cat(parts, -1)


class RoundingCache(DynamicCache):
    """A KV cache that rounds keys and values before it stores them."""

    def __init__(self, bits: int, rotate: bool) -> None:
        super().__init__()
        self._bits, self._rotate = bits, rotate

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Round keys and values, then store them as in transformers."""
        keys, values = (_in_basis(self._rotate, x, self._rounded) for x in (key_states, value_states))
        return super().update(keys, values, *args, **kwargs)

    def _rounded(self, x: Tensor) -> Tensor:
        return round_asymmetric(x, self._bits)


@dataclass(frozen=True)
class Simulation:
    """Settings of a simulation. By default, nothing is simulated.

    Attributes:
        activations: bits to which inputs of linear layers are rounded; None if they are not rounded.
        kv: bits to which keys and values are rounded; None if they are not rounded.
        rotate: `hadamard` to round in a rotated basis, else `none`.

    Raises:
        UsageError: a number of bits is not from 2 to 16, or the rotation does not exist.
    """

    activations: int | None = None
    kv: int | None = None
    rotate: str = "none"

    def __post_init__(self) -> None:
        for name, bits in (("activations", self.activations), ("kv", self.kv)):
            if bits is not None and not 2 <= bits <= 16:
                raise UsageError(f"`{name}` is {bits}: give 2 to 16 bits")
        if self.rotate not in ROTATIONS:
            raise UsageError(f"`rotate` is {self.rotate!r}: choose {' or '.join(ROTATIONS)}")

    def cache(self) -> RoundingCache | None:
        """Return a new cache for one window, or None if keys and values are not rounded."""
        return RoundingCache(self.kv, self.rotate == HADAMARD) if self.kv else None

    @contextmanager
    def rounded_inputs(self, model: Any) -> Iterator[None]:
        """Round the inputs of the model's linear layers, except the head, inside the context."""
        head, bits = model.get_output_embeddings(), self.activations

        def round_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (_in_basis(self.rotate == HADAMARD, args[0], lambda x: round_symmetric(x, bits or 0)), *args[1:])

        layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        handles = [layer.register_forward_pre_hook(round_input) for layer in layers] if bits else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _in_basis(rotate: bool, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to `x` in the rotated basis or, without `rotate`, in the given basis."""
    return hadamard_inverse(function(hadamard(x, _SEED)), _SEED) if rotate else function(x)
