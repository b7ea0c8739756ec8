"""Make the test vectors of the codes, `vectors.json`: `python -m tests.golden.vectors`. Run it once per version.

The file is a list. Each entry has the recipe, with the name of a part in the place of each stored tensor; the spec and
the bytes of each part; and the bytes of each decoded tensor. Bytes are in hexadecimal.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.codecs.base import Code, Coded
from freebits.codecs.bits_back import BitsBack
from freebits.codecs.columns import Columns
from freebits.codecs.entropy import Entropy
from freebits.codecs.hadamard import Hadamard
from freebits.codecs.integers import Integers
from freebits.codecs.pivots import Pivots
from freebits.codecs.rearranging import Joined, Transposed
from freebits.codecs.registry import CODES
from freebits.codecs.trellis import POLYNOMIALS
from freebits.codecs.triangles import Lower, Symmetric
from freebits.packed.recipe import Recipe
from freebits.quantization.pyramids import round_to_pyramids
from freebits.quantization.trellis import trellis_round
from freebits.types import TensorSpec, bytes_of

VECTORS = Path(__file__).parent / "vectors.json"
_generator = torch.Generator()


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


def _scales(n: int) -> Tensor:
    return torch.randint(-200, 60, (n,), generator=_generator).short()


def _integers(n_states: int) -> tuple[Code, list[Tensor], list[str]]:
    """Two matrices with rows and columns of several levels, escapes, and integers with raw bits."""
    targets = _normal(24, 9) * 2 ** (4 * torch.rand(24, 1, generator=_generator, dtype=torch.float64))
    targets[3, 4], targets[5, 1], targets[:, 8] = 1e6, -2e6, targets[:, 8] * 2.0**23
    integers = trellis_round(targets, n_states) if n_states else targets.round().int()
    small = trellis_round(_normal(5, 12), n_states) if n_states else _normal(5, 12).round().int()
    tensors = [integers, _scales(24), _scales(9), small, _scales(5), _scales(12)]
    return Integers(n_states), tensors, ["F32[24, 9]", "BF16[5, 12]"]


def _entries() -> Iterator[tuple[str, Code, list[Tensor], list[str]]]:
    """Yield the name of a code, an encoder, what it encodes, and the specs that decoding makes."""
    triangle = _normal(4, 4).half().tril()
    yield "lower", Lower(), [_normal(5, 3).float().tril()], ["F32[5, 3]"]
    yield "lower", Lower(), [triangle], ["F16[4, 4]"]
    yield "symmetric", Symmetric(), [triangle + triangle.tril(-1).T], ["F16[4, 4]"]
    W = torch.linalg.qr(_normal(24, 8)).Q * torch.linspace(0.2, 2, 8, dtype=torch.float64)
    yield "bits-back", BitsBack(0.0005), [_normal(9, 8).half() / 8, W.T], ["F16[9, 8]", "F16[8, 24]"]
    message = [_normal(40, 16).bfloat16() / 8, _normal(3).bfloat16()]
    tall = torch.linalg.qr(_normal(64, 16)).Q * torch.linspace(0.2, 2, 16, dtype=torch.float64)
    yield "bits-back", BitsBack(0.004), [*message, tall.T], ["BF16[40, 16]", "BF16[3]", "BF16[16, 64]"]
    yield "entropy", Entropy(), [(_normal(64, 40) / 64).bfloat16()], ["BF16[64, 40]"]
    yield "pivots", Pivots([(1, 2)], 1), [_with_pivots().T.contiguous()], ["F32[5, 4]"]
    yield "pivots", Pivots([(0, 1), (2, 2)]), [_with_two_spaces()], ["F32[5, 6]"]
    yield "joined", Joined(), [_normal(6, 5).half()[:2], _normal(6, 5).half()[:4]], ["F16[3, 2, 5]"]
    yield "transposed", Transposed(), [_normal(3, 5).half()], ["F16[3, 5]"]
    yield "columns", Columns(), _two_columns(), ["U8[4, 5]"]
    yield "hadamard", Hadamard(3), [_normal(12, 20).float()], ["F32[12, 20]"]
    for n_states in (0, *POLYNOMIALS):
        yield ("integers", *_integers(n_states))


def _deltas() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tensors and their bases. Some bases have more rows, fewer rows, one or three dimensions, or no floats."""
    for dtype, n_rows in (
        (torch.bfloat16, 40),
        (torch.float16, 26),
        (torch.float8_e4m3fn, 32),
        (torch.float8_e5m2, 32),
    ):
        base = (_normal(n_rows, 24) * 2 ** _normal(n_rows, 1)).to(dtype)
        start = torch.cat([base.double(), torch.zeros(6, 24)])[:32]
        yield (start + _normal(32, 24) * 2 ** (4 * _normal(32, 1) - 8)).to(dtype), base
    vector = _normal(500).float()
    yield torch.where(vector > 1, -vector, vector * 1.0001), vector
    yield vector.double() * 1.5, vector.double()
    numbers = torch.randint(256, (5, 6, 40), generator=_generator)
    changes = torch.randint(-3, 4, (5, 6, 40), generator=_generator) * torch.tensor([0, 1, 1, 1, 9])[:, None, None]
    yield (numbers + changes).to(torch.uint8), numbers.to(torch.uint8)
    yield numbers.reshape(-1)[:300] + 1, numbers.reshape(-1)[:300]


def _with_pivots() -> Tensor:
    matrix = _normal(4, 5).float()
    matrix[1:3, [0, 3]] = torch.eye(2)
    return matrix


def _with_two_spaces() -> Tensor:
    matrix = _normal(5, 6).float()
    matrix[0, 3], matrix[2:4, [1, 5]] = 1, torch.eye(2)
    return matrix


def _two_columns() -> list[Tensor]:
    return [_normal(4, 1).half(), torch.randint(256, (4, 3), generator=_generator).to(torch.uint8)]


def _entry(name: str, coded: Coded, specs: list[TensorSpec]) -> dict[str, Any]:
    decoded = CODES[name].decode(coded.parts, specs, coded.params)
    makes = {str(number): spec for number, spec in enumerate(specs)}
    recipe = Recipe(name, {part: part for part in coded.parts}, makes, coded.params).checked(decoded)
    parts = {
        part: [str(TensorSpec.of(tensor)), bytes_of(tensor).tobytes().hex()] for part, tensor in coded.parts.items()
    }
    return {"recipe": recipe.facts, "parts": parts, "tensors": [bytes_of(tensor).tobytes().hex() for tensor in decoded]}


def main() -> None:
    """Write one entry for each code, and one for `integers` with each number of states."""
    _generator.manual_seed(0)
    entries = []
    for name, encoder, tensors, texts in _entries():
        specs = [TensorSpec.parse(text) for text in texts]
        entries.append(_entry(name, encoder.encode(tensors, specs), specs))
    pyramid_parts = round_to_pyramids(_normal(4, 32).float(), torch.eye(32, dtype=torch.float64), 3.5)
    specs = [TensorSpec("F32", (4, 32))]
    entries.append(_entry("pyramid", CODES["pyramid"].encode(pyramid_parts, specs), specs))
    for tensor, base in _deltas():
        specs = [TensorSpec.of(tensor)]
        coded = CODES["delta"].encode([tensor, base], specs)
        entries.append(_entry("delta", replace(coded, parts={**coded.parts, "base": base}), specs))
    base = _normal(3, 4).half()
    added = CODES["added"].encode([(base.float() * 1.01).half(), base], [TensorSpec.of(base)])
    entries.append(_entry("added", added, [TensorSpec.of(base)]))
    VECTORS.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
