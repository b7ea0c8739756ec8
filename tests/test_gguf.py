"""GGUF files are packed losslessly."""

import filecmp
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize

import freebits
from freebits.cli.main import main
from freebits.codecs.columns import Columns, fields_of
from freebits.packed.reader import PackedFolder
from freebits.types import TensorSpec

TYPES = ("F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "TQ1_0")
_BLOCK_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "MXFP4": 17}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A GGUF file with a tensor of each type and metadata of several types."""
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.add_block_count(2)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_token_list([f"token {number}" for number in range(300)])
    writer.add_token_types([1] * 300)
    generator = np.random.default_rng(0)
    for number, name in enumerate(TYPES):
        tensor_type = gguf.GGMLQuantizationType[name]
        values = quantize(generator.standard_normal((48 + number, 256)).astype(np.float32), tensor_type)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=tensor_type)
    for name, size in _BLOCK_BYTES.items():
        blocks = generator.integers(256, size=(60, size), dtype=np.uint8)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_a_file_is_restored_byte_for_byte(file: Path, tmp_path: Path) -> None:
    result = freebits.compress(file, tmp_path / "small", lossless=True)
    assert result["plan"]["model"] == str(file)
    assert result["bytes"]["packed"] < file.stat().st_size
    freebits.unpack(tmp_path / "small", tmp_path / "back")
    assert filecmp.cmp(file, tmp_path / "back" / file.name, shallow=False)
    specs = PackedFolder(tmp_path / "small").specs
    assert {f"{name}.weight" for name in (*TYPES, *_BLOCK_BYTES)} < specs.keys()
    assert specs["Q4_K.weight"] == TensorSpec("U8", (60, 144))


def test_the_fields_of_blocks_are_coded_separately(file: Path, tmp_path: Path) -> None:
    freebits.pack(file, tmp_path / "small")
    fields = {
        next(iter(recipe.makes)): recipe.params["fields"]
        for recipe in PackedFolder(tmp_path / "small").manifest.recipes
        if recipe.code == "columns"
    }
    assert fields["Q4_1.weight"] == [["F16", 1], ["F16", 1], ["U8", 16]]
    assert "TQ1_0.weight" not in fields


@pytest.mark.parametrize("end", [3, 20, 400, -100])
def test_a_truncated_file_is_refused(end: int, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(file.read_bytes()[:end])
    assert main(["compress", str(file), str(tmp_path / "small"), "--lossless"]) == 2
    assert file.name in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_code_columns_restores_its_tensor_and_refuses_invalid_fields() -> None:
    tensor = torch.randint(256, (7, 20), dtype=torch.uint8)
    coded = Columns().encode(fields_of(tensor, [("F16", 1), ("U8", 2), ("F32", 4)]), [TensorSpec.of(tensor)])
    assert Columns().parts([TensorSpec.of(tensor)], coded.params) == {
        name: TensorSpec.of(part) for name, part in coded.parts.items()
    }
    assert torch.equal(Columns().decode(coded.parts, [TensorSpec.of(tensor)], coded.params)[0], tensor)
    for fields in ([["F16", 1]], [["F16", 0], ["U8", 20]], [], [["U8", 21]]):
        with pytest.raises(ValueError, match="field"):
            Columns().parts([TensorSpec.of(tensor)], {"fields": fields})


def test_a_dry_run_plans_only_lossless_compression_of_an_existing_file(file: Path, tmp_path: Path) -> None:
    assert main(["compress", str(file), str(tmp_path / "small"), "--lossless", "--dry-run"]) == 0
    assert main(["compress", str(file), str(tmp_path / "small"), "--dry-run"]) == 2
    assert main(["compress", str(tmp_path / "none.gguf"), str(tmp_path / "small"), "--lossless"]) == 2
