"""The golden files of every format version can be read. Packing writes the layout of the current golden files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import freebits
from freebits.codecs.base import Check
from freebits.codecs.registry import CODES
from freebits.packed.manifest import FORMAT
from freebits.packed.reader import PackedFolder
from freebits.packed.recipe import Recipe
from freebits.types import TensorSpec
from tests.golden.make import METHODS, THRESHOLDS
from tests.golden.vectors import VECTORS
from tests.tiny import tensors_of

GOLDEN = Path(__file__).parent / "golden"
MAX_ULPS = 2


def vector_name(vector: dict[str, Any]) -> str:
    """Return the code of a test vector, and the number of states of its trellis."""
    return f"{vector['recipe']['code']} {vector['recipe'].get('params', {}).get('trellis', '')}"


def view(spec: str, data: str) -> torch.Tensor:
    """Return a tensor from its spec and its bytes in hexadecimal."""
    return TensorSpec.parse(spec).view(np.frombuffer(bytearray.fromhex(data), np.uint8))


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
@pytest.mark.parametrize("codec", [*THRESHOLDS, *METHODS])
def test_a_golden_file_decodes_to_its_golden_values(version: int, codec: str) -> None:
    folder = GOLDEN / f"v{version}"
    expected = load_file(folder / f"{codec}.safetensors")
    decoded = tensors_of(folder / codec)
    assert decoded.keys() == expected.keys()
    for name, tensor in decoded.items():
        ulps = (tensor.view(torch.int16).int() - expected[name].view(torch.int16).int()).abs()
        assert (ulps <= MAX_ULPS).all(), name  # because other machines may round differently
    n_different = sum(int((tensor != expected[name]).sum()) for name, tensor in decoded.items())
    assert n_different <= (0 if codec == "integers" else 4)  # integers decode to the same values on all machines


def test_a_golden_file_of_codec_none_is_restored_byte_for_byte(tmp_path: Path) -> None:
    for version in range(1, FORMAT + 1):
        golden = GOLDEN / f"v{version}"
        stored = PackedFolder(golden / "none").stored
        assert stored["model.layers.0.mlp.up_proj.weight.entropy"].n_bytes < 64 * 24 * 2  # entropy-coded
        assert str(stored["model.layers.0.mlp.up_proj.bias"]) == "F16[64]"  # stored unchanged
        freebits.unpack(golden / "none", tmp_path / str(version))
        files = [folder / "model.safetensors" for folder in (golden / "sliced", tmp_path / str(version))]
        assert files[0].read_bytes() == files[1].read_bytes()


def layout(folder: Path) -> dict[str, Any]:
    """Return what only a new format version may change: names, specs, recipes, and keys of the manifest."""
    manifest = json.loads((folder / "freebits.json").read_text())
    variable = {"digests", "config", "digest", "producer", "history"}  # depend on the machine or on the version
    for recipe in manifest["recipes"]:
        recipe.get("params", {}).pop("sums", None)
        recipe.get("params", {}).pop("corrections", None)
    notes = [{key: value for key, value in note.items() if key != "corrections"} for note in manifest["notes"]]
    stored = PackedFolder(folder).stored.items()
    specs = {name: str(spec) for name, spec in stored if not name.endswith("corrections")}
    fixed = {key: value for key, value in manifest.items() if key not in variable}
    return {"keys": sorted(manifest), "stored": specs, "manifest": fixed | {"notes": notes}}


@pytest.mark.parametrize("codec", THRESHOLDS)
def test_packing_writes_the_layout_of_the_golden_file(codec: str, tmp_path: Path) -> None:
    golden = GOLDEN / f"v{FORMAT}"
    freebits.pack(golden / "sliced", tmp_path / "packed", codec=codec, entropy="none", threshold=THRESHOLDS[codec])
    assert layout(tmp_path / "packed") == layout(golden / codec)


@pytest.mark.parametrize("vector", json.loads(VECTORS.read_text(encoding="utf-8")), ids=vector_name)
def test_a_test_vector_decodes_to_its_tensors(vector: dict[str, Any]) -> None:
    recipe = Recipe.parse(vector["recipe"])
    assert recipe.parts() == {part: TensorSpec.parse(spec) for part, (spec, _) in vector["parts"].items()}
    parts = {part: view(spec, data) for part, (spec, data) in vector["parts"].items()}
    decoded = CODES[recipe.code].decode(parts, list(recipe.makes.values()), recipe.params)
    recipe.check(decoded)
    expected = [view(str(spec), data) for spec, data in zip(recipe.makes.values(), vector["tensors"], strict=True)]
    if CODES[recipe.code].check is Check.DIGEST:
        assert all(torch.equal(a, b) for a, b in zip(decoded, expected, strict=True))
    else:
        assert all(
            torch.allclose(a.float(), b.float(), rtol=2e-3, atol=1e-3) for a, b in zip(decoded, expected, strict=True)
        )


def test_every_code_has_a_test_vector_and_no_other_parameter_or_value_passes() -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    assert {vector["recipe"]["code"] for vector in vectors} == {*CODES} - {"grid"}  # of a benchmark
    for vector in vectors:
        recipe = Recipe.parse(vector["recipe"])
        with pytest.raises(ValueError, match="has no parameter 'new'"):
            replace(recipe, params={**recipe.params, "new": 1}).parts()
        wrong = [
            1 + view(str(spec), data).double()
            for spec, data in zip(recipe.makes.values(), vector["tensors"], strict=True)
        ]
        if CODES[recipe.code].check is not Check.NONE:
            with pytest.raises(ValueError, match=r"digest|sums"):
                recipe.check(wrong)


def test_the_golden_file_contains_corrections_and_signs() -> None:
    packed = PackedFolder(GOLDEN / f"v{FORMAT}" / "bits-back")
    assert [note.get("code") for note in packed.manifest.notes] == [None, "bits-back", "bits-back"]
    assert any(note.get("corrections") for note in packed.manifest.notes)
    assert str(packed.stored["model.layers.0.attention.signs"]) == "U8[8]"
