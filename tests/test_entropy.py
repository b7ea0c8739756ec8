"""Entropy coding, and packing and unpacking any checkpoint byte for byte."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import freebits
from freebits.codecs import entropy as entropy_code
from freebits.codecs.entropy import compress, decompress
from freebits.codecs.planes import merge, n_planes, split
from freebits.errors import CheckpointError
from freebits.options import CODECS, ENTROPIES
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from freebits.types import Bytes
from tests.tiny import Make, flip, random_text, redigest, tensors_of

DTYPE_NAMES = ("F16", "BF16", "F32", "F64", "I8", "U8", "BOOL", "I16", "I64", "U32", "F8_E4M3", "F4")
seeds = st.integers(0, 2**32)


def weights(dtype_name: str, count: int, seed: int) -> Bytes:
    """Return the bytes of random weights if the dtype is a float of 16 bits or more, else small random bytes."""
    generator = torch.Generator().manual_seed(seed)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}.get(dtype_name)
    if dtype is None:
        return torch.randint(0, 9, (count * n_planes(dtype_name),), generator=generator, dtype=torch.uint8).numpy()
    data: Bytes = (0.02 * torch.randn(count, generator=generator)).to(dtype).view(torch.uint8).numpy()
    return data


@settings(max_examples=80, deadline=None)
@given(dtype_name=st.sampled_from(DTYPE_NAMES), data=st.binary(max_size=400))
def test_merging_restores_the_values_that_were_split(dtype_name: str, data: bytes) -> None:
    values = np.frombuffer(data[: len(data) // n_planes(dtype_name) * n_planes(dtype_name)], np.uint8)
    planes = split(values, dtype_name)
    assert len(planes) == n_planes(dtype_name)
    out = np.empty_like(values)
    merge(planes, dtype_name, out)
    assert np.array_equal(out, values)


@settings(max_examples=60, deadline=None)
@given(
    dtype_name=st.sampled_from(DTYPE_NAMES),
    count=st.integers(0, 5000),
    seed=seeds,
    chunk=st.sampled_from([64, 1000, 1 << 20]),
)
def test_decompressing_restores_the_compressed_bytes(dtype_name: str, count: int, seed: int, chunk: int) -> None:
    data = weights(dtype_name, count, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy_code, "_chunk_size", lambda *_: chunk)
        coded = compress(data, dtype_name)
    if coded is None:
        return
    assert len(coded) < len(data)
    assert np.array_equal(decompress(np.frombuffer(coded, np.uint8), dtype_name, len(data)), data)
    with pytest.raises(ValueError, match="sizes"):
        decompress(np.frombuffer(coded + b"\0", np.uint8), dtype_name, len(data))


@pytest.mark.parametrize(("dtype_name", "ratio"), [("F16", 0.87), ("BF16", 0.68), ("F32", 0.84)])
def test_weights_are_compressed_because_their_exponents_repeat(dtype_name: str, ratio: float) -> None:
    data = weights(dtype_name, 400_000, 0)
    coded = compress(data, dtype_name)
    assert coded is not None
    assert 0.6 < len(coded) / len(data) < ratio


def test_noise_and_empty_tensors_are_not_compressed() -> None:
    assert compress(np.random.default_rng(0).integers(0, 256, 10_000, np.uint8), "F16") is None
    assert compress(np.empty(0, np.uint8), "F16") is None


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 3000), flip=st.integers(0, 40), n_bytes=st.sampled_from([0, 7, 8, 20_000, 20_002]))
def test_damaged_coded_bytes_raise_value_error_or_decode_to_the_right_length(cut: int, flip: int, n_bytes: int) -> None:
    coded = compress(weights("BF16", 10_000, 0), "BF16")
    assert coded is not None
    damaged = bytearray(coded)
    damaged[flip] ^= 0x55
    for content, length in ((coded[:cut], 20_000), (bytes(damaged), 20_000), (coded, n_bytes)):
        try:
            data = decompress(np.frombuffer(content, np.uint8), "BF16", length)
        except ValueError:
            continue
        assert len(data) == length


# Any checkpoint is restored byte for byte.

Tensors = dict[str, tuple[str, list[int], bytes]]


def write_raw(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None, padding: int = 0) -> None:
    """Write a safetensors file by hand, with content that the library might not write."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype_name, shape, data) in tensors.items():
        header[name] = {"dtype": dtype_name, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, ensure_ascii=False).encode() + b" " * padding
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def assert_restored(source: Path, folder: Path) -> dict[str, Any]:
    """Check that packing and unpacking restores every file byte for byte. Return the facts of packing."""
    facts = freebits.pack(source, folder / "packed", codec="none")
    freebits.unpack(folder / "packed", folder / "unpacked")
    before = {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    assert {file.name: file.read_bytes() for file in (folder / "unpacked").iterdir()} == before
    assert freebits.verify(folder / "packed")["ok"]
    return facts


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    """Draw tensors of any dtype and shape, filled with weights or with arbitrary bytes."""
    drawn: Tensors = {}
    for number in range(draw(st.integers(0, 4))):
        dtype_name = draw(
            st.sampled_from(["F16", "BF16", "F32", "F64", "I8", "BOOL", "I64", "U16", "F8_E4M3", "F8_E8M0"])
        )
        shape = draw(st.lists(st.integers(0, 40), max_size=3))
        size = int(np.prod(shape, dtype=np.int64)) * n_planes(dtype_name)
        data = draw(st.binary(min_size=min(size, 50), max_size=min(size, 50)))
        if draw(st.booleans()):
            data = weights(dtype_name, size // n_planes(dtype_name), draw(seeds)).tobytes()
        if dtype_name == "BOOL":
            data = bytes(byte & 1 for byte in data)
        name = draw(st.text(min_size=1, max_size=9).filter(lambda text: text != "__metadata__"))
        drawn[f"{name}{number}"] = (dtype_name, shape, (data * (size // max(1, len(data)) + 1))[:size])
    return drawn


@settings(max_examples=40, deadline=None)
@given(content=tensors(), metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=9)), padding=seeds)
def test_any_safetensors_file_is_restored_byte_for_byte(
    content: Tensors, metadata: dict[str, str] | None, padding: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("exact")
    (folder / "source").mkdir()
    (folder / "source" / "config.json").write_text('{"model_type": "unheard of"}')
    write_raw(folder / "source" / "model.safetensors", content, metadata, padding % 9)
    assert_restored(folder / "source", folder)
    shutil.rmtree(folder)


def test_unusual_values_and_shapes_are_restored(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    nans = np.array([0x7E01, 0xFE55, 0x7C00, 0x8000, 0x0001] * 3000, "<u2").tobytes()
    tied = weights("BF16", 9000, 0).tobytes()
    content: Tensors = {
        "nan payloads and minus zero": ("F16", [15000], nans),
        "empty": ("F32", [0, 7], b""),
        "scalar": ("F64", [], np.float64(-0.0).tobytes()),
        "tied": ("BF16", [90, 100], tied),
        "tied to it": ("BF16", [90, 100], tied),
        "last empty": ("I8", [0], b""),
    }
    write_raw(tmp_path / "source" / "model.safetensors", content, {"format": "pt", "ä": "\u2028\n"}, 5)
    assert_restored(tmp_path / "source", tmp_path)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dense_model_is_restored_and_runs_packed(
    shard: str, dtype: torch.dtype, save_tiny: Make, tmp_path: Path
) -> None:
    dense = save_tiny(shard=shard, dtype=dtype, tie_word_embeddings=True, hidden_size=64, intermediate_size=160)
    (dense / "modeling_maker.py").write_text("import os")
    facts = assert_restored(dense, tmp_path)
    assert (facts["kind"], facts["codec"], facts["entropy"]) == ("packed", "none", "auto")
    assert facts["bytes"]["packed"] < 0.9 * facts["bytes"]["dense"] + 45_000  # for the manifest
    tokens = torch.arange(20)[None]
    (tmp_path / "packed" / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    model = freebits.load(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, freebits.load(dense)(tokens).logits)
    assert model.generation_config.temperature == 0.25
    assert model.name_or_path == model.config.name_or_path == str(tmp_path / "packed")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert type(again) is type(model)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    text = random_text(200)
    perplexities = [
        freebits.evaluate(path, text=text, seq_len=32)["perplexity"] for path in (dense, tmp_path / "packed")
    ]
    assert perplexities[0] == perplexities[1]


def test_additional_weights_files_are_restored_but_not_loaded(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    model = dict(Checkpoint(dense).items())
    save_file({name: torch.zeros_like(tensor) for name, tensor in model.items()}, dense / "model_ema.safetensors")
    assert_restored(dense, tmp_path)
    assert freebits.inspect(tmp_path / "packed")["parameters"] == sum(tensor.numel() for tensor in model.values())
    decoded = tensors_of(tmp_path / "packed")
    assert decoded.keys() == model.keys()
    assert all(torch.equal(decoded[name], tensor) for name, tensor in model.items())
    assert any(tensor.any() for tensor in freebits.load(tmp_path / "packed").parameters())


def test_a_sliced_model_is_restored_and_runs_packed(save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> None:
    sliced = slice_tiny(save_tiny(tie_word_embeddings=True))
    assert_restored(sliced, tmp_path)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        outputs = [freebits.load(path)(tokens).logits for path in (sliced, tmp_path / "packed")]
    assert torch.equal(*outputs)


def test_damage_to_a_model_packed_with_codec_none_is_detected(save_tiny: Make, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    dense = save_tiny(hidden_size=64)
    freebits.pack(dense, packed, codec="none")
    original = (dense / "model.safetensors").read_bytes()
    for name in ("packed.safetensors", "freebits.json", "config.json"):
        size = (packed / name).stat().st_size
        start = int.from_bytes((packed / name).read_bytes()[:8], "little") + 8 if name == "packed.safetensors" else 0
        for position in range(start, size, size // 29):
            sound = (packed / name).read_bytes()
            flip(packed / name, position)
            with pytest.raises(CheckpointError):
                freebits.unpack(packed, tmp_path / "out")
            assert not (tmp_path / "out").exists()
            (packed / name).write_bytes(sound)
    freebits.unpack(packed, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == original
    sound = (packed / "packed.safetensors").read_bytes()
    for length in (0, 7, 100, len(sound) // 2, len(sound) - 1):
        (packed / "packed.safetensors").write_bytes(sound[:length])
        with pytest.raises(CheckpointError, match=r"packed\.safetensors"):
            freebits.unpack(packed, tmp_path / "again")


def _edit_header(manifest: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    """Change the entry of the first tensor in the original header that a manifest contains."""
    header = json.loads(manifest["originals"]["model.safetensors"])
    entries = (entry for name, entry in header.items() if name != "__metadata__")
    change(min(entries, key=lambda entry: entry["data_offsets"]))
    manifest["originals"]["model.safetensors"] = json.dumps(header)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(originals=5),
        lambda m: m.update(originals={}),
        lambda m: m["originals"].update({"model.safetensors": 5}),
        lambda m: m["originals"].update({"model.safetensors": "no json"}),
        lambda m: m["originals"].update({"model.safetensors": "[]"}),
        lambda m: m["originals"].update({"model.safetensors": '{"a": {"dtype": "F16", "shape": []}}'}),
        lambda m: m["originals"].update(
            {"model.safetensors": m["originals"]["model.safetensors"].replace("0,", '"0",', 1)}
        ),
        lambda m: m["originals"].update({file: text.replace(":[", ":[9", 9) for file, text in m["originals"].items()}),
        lambda m: _edit_header(m, lambda entry: entry["data_offsets"].__setitem__(1, 10**30)),
        lambda m: _edit_header(m, lambda entry: entry["data_offsets"].__setitem__(0, 0.0)),
        lambda m: _edit_header(m, lambda entry: entry.update(shape=["x"])),
        lambda m: m["originals"].update(
            {"model.safetensors": m["originals"]["model.safetensors"].replace("pt", "\ud800")}
        ),
        lambda m: m.update(originals={"../packed/model.safetensors": m["originals"]["model.safetensors"]}),
        lambda m: m["originals"].update({"/etc/x.index.json": "{}"}),
        lambda m: m["digests"].popitem(),
        lambda m: m["originals"].pop("config.json"),
        lambda m: m["originals"].update({"config.json": "no json"}),
        lambda m: m.update(auxiliary=["model.safetensors"]),
    ],
)
def test_an_invalid_manifest_of_codec_none_is_refused(
    change: Callable[[dict[str, Any]], object], save_tiny: Make, tmp_path: Path
) -> None:
    freebits.pack(save_tiny(), tmp_path / "packed", codec="none")
    redigest(tmp_path / "packed", change)
    with pytest.raises(CheckpointError) as caught:
        freebits.unpack(tmp_path / "packed", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", ["F16[10000000000000]", "F16[-1]", "F16", "[2]", "F99[4]", "F16[x]", "F16[3]"])
def test_an_invalid_tensor_spec_is_refused(spec: str, save_tiny: Make, slice_tiny: Make, pack_tiny: Make) -> None:
    packed = pack_tiny(slice_tiny(save_tiny(hidden_size=64, intermediate_size=160)))

    def spoil(manifest: dict[str, Any]) -> None:
        [made_tensor] = next(recipe["makes"] for recipe in manifest["recipes"] if recipe["code"] == "entropy")
        made_tensor[1] = spec

    redigest(packed, spoil)
    with pytest.raises(CheckpointError) as caught:
        tensors_of(packed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("codec", ["canonical", "bits-back"])
def test_entropy_coding_changes_no_value_of_any_codec(
    codec: str, save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(hidden_size=64, intermediate_size=160, vocab_size=96))
    coded_size, plain_size = (
        freebits.pack(sliced, tmp_path / entropy, codec=codec, entropy=entropy)["bytes"]["packed"]
        for entropy in ("auto", "none")
    )
    assert coded_size < plain_size
    coded, plain = (tensors_of(tmp_path / entropy) for entropy in ("auto", "none"))
    assert coded.keys() == plain.keys()
    for name, tensor in coded.items():
        assert tensor.dtype == plain[name].dtype
        assert torch.equal(tensor, plain[name])
    codes = [recipe.code for recipe in PackedFolder(tmp_path / "auto").manifest.recipes]
    assert "entropy" in codes
    assert [code for code in codes if code != "entropy"] == [
        recipe.code for recipe in PackedFolder(tmp_path / "none").manifest.recipes
    ]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("entropy", ENTROPIES)
def test_loading_a_damaged_model_is_refused(
    codec: str, entropy: str, save_tiny: Make, slice_tiny: Make, pack_tiny: Make
) -> None:
    # Regression: tensors that are stored unchanged were not checked, so 74 % of flipped bits were not detected.
    packed = pack_tiny(slice_tiny(save_tiny(hidden_size=64, intermediate_size=160)), codec=codec, entropy=entropy)
    sound = (packed / "packed.safetensors").read_bytes()
    start = int.from_bytes(sound[:8], "little") + 8
    for position in range(start, len(sound), (len(sound) - start) // 17):
        flip(packed / "packed.safetensors", position, bit=1 << position % 8)
        for load in (freebits.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(CheckpointError, match=r"digest"):
                load(packed)
        (packed / "packed.safetensors").write_bytes(sound)
    flip(packed / "packed.safetensors", len(sound) - 20)
    if entropy == "none" and codec != "bits-back":
        freebits.load(packed, verify=False)  # the caller accepts damage


def test_a_source_that_changes_during_packing_is_refused(save_tiny: Make, tmp_path: Path) -> None:
    # Regression: a source that changed while it was read gave wrong weights without an error, or ended with SIGBUS.
    dense = save_tiny(hidden_size=64)
    file, sound = dense / "model.safetensors", (dense / "model.safetensors").read_bytes()

    def overwrite() -> None:
        flip(file, len(sound) - 9)

    def truncate() -> None:
        os.truncate(file, len(sound) // 2)

    def replace() -> None:
        file.unlink()
        file.write_bytes(sound)

    for name, spoil in (("overwritten", overwrite), ("truncated", truncate), ("replaced", replace)):

        def progress(_step: str, _unit: str, done: int, _total: int, spoil: Callable[[], None] = spoil) -> None:
            if done == 1:
                spoil()

        with pytest.raises(CheckpointError, match=re.escape(str(dense))):
            freebits.pack(dense, tmp_path / name, codec="none", parallel=freebits.Parallel(jobs=1), progress=progress)
        assert not (tmp_path / name).exists()
        file.write_bytes(sound)
