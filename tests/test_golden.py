"""Files of every format version are read for good, and the current version writes what its golden files show."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import freebits
from freebits.checkpoint import Checkpoint
from freebits.packed import PackedCheckpoint, open_packed
from freebits.packed.format import FORMAT
from tests.golden.make import THRESHOLDS

GOLDEN = Path(__file__).parent / "golden"
ULPS = 2


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
@pytest.mark.parametrize("codec", THRESHOLDS)
def test_a_golden_file_decodes_to_its_golden_words(version: int, codec: str) -> None:
    folder = GOLDEN / f"v{version}"
    expected = load_file(folder / f"{codec}.safetensors")
    decoded = dict(open_packed(folder / codec).tensors())
    assert decoded.keys() == expected.keys()
    for name, tensor in decoded.items():
        steps = (tensor.view(torch.int16).int() - expected[name].view(torch.int16).int()).abs()
        assert (steps <= ULPS).all(), name  # another machine's eigendecomposition may round a word the other way
    assert sum(int((tensor != expected[name]).sum()) for name, tensor in decoded.items()) <= 4


def test_a_golden_file_of_codec_none_comes_back_byte_for_byte(tmp_path: Path) -> None:
    for version in range(1, FORMAT + 1):
        golden = GOLDEN / f"v{version}"
        stored = Checkpoint(golden / "none").shapes
        assert stored["model.layers.0.mlp.up_proj.weight"][0] < 64 * 24 * 2 == 3072  # an entropy code
        assert stored["model.layers.0.mlp.up_proj.bias"] == (64 * 2,)  # its own bytes
        freebits.unpack(golden / "none", tmp_path / str(version))
        files = [folder / "model.safetensors" for folder in (golden / "sliced", tmp_path / str(version))]
        assert files[0].read_bytes() == files[1].read_bytes()


def layout(folder: Path) -> dict[str, Any]:
    """What must not change without a new format version: names, shapes, dtypes, and the manifest's fields."""
    checkpoint = Checkpoint(folder)
    manifest = json.loads((folder / "freebits.json").read_text())
    chance = {"tensors", "config", "digest", "producer", "bytes"}  # of the machine or of the version
    sites = [{k: v for k, v in site.items() if k != "corrections"} for site in manifest["sites"]]
    stored = {n: (s, checkpoint.dtypes[n]) for n, s in checkpoint.shapes.items() if not n.endswith("corrections")}
    kept = {key: value for key, value in manifest.items() if key not in chance}
    return {"keys": sorted(manifest), "stored": stored, "manifest": kept | {"sites": sites}}


@pytest.mark.parametrize("codec", THRESHOLDS)
def test_packing_writes_the_layout_of_the_golden_file(codec: str, tmp_path: Path) -> None:
    golden = GOLDEN / f"v{FORMAT}"
    freebits.pack(golden / "sliced", tmp_path / "packed", codec=codec, entropy="none", threshold=THRESHOLDS[codec])
    assert layout(tmp_path / "packed") == layout(golden / codec)


def test_the_golden_file_shows_corrections_and_signs() -> None:
    packed = PackedCheckpoint(GOLDEN / f"v{FORMAT}" / "bits-back")
    assert [site.codec for site in packed.manifest.sites] == ["bits-back", "bits-back"]
    assert any(site.corrections for site in packed.manifest.sites)
    assert packed.read("model.layers.0.attention.signs").shape == (8,)
