"""The packed checkpoint: what goes in comes out, and damage is noticed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

import freebits
from freebits.checkpoint import Checkpoint
from freebits.coding.corrections import read_corrections
from freebits.errors import CheckpointError, UsageError
from freebits.huggingface.modeling import SlicedLlamaConfig, SlicedLlamaForCausalLM
from freebits.packed import PackedCheckpoint, open_packed
from freebits.packed.packing import CODECS
from freebits.packed.storage import StoredTensors
from tests.tiny import VARIANTS, tiny_config

Make = Callable[..., Path]
THRESHOLD = 0.1
SITES = 6
pack = partial(freebits.pack, codec="bits-back", entropy="none")


@pytest.fixture
def sliced(save_tiny: Make, slice_tiny: Make) -> Path:
    return slice_tiny(save_tiny(hidden_size=64, intermediate_size=160, tie_word_embeddings=True), untie=True)


@pytest.fixture
def packed(sliced: Path, tmp_path: Path) -> Path:
    pack(sliced, tmp_path / "packed", threshold=THRESHOLD)
    return tmp_path / "packed"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unpacking_gives_back_every_tensor_of_the_sliced_model(
    variant: str, dtype: torch.dtype, save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(dtype=dtype, hidden_size=64, intermediate_size=160, **VARIANTS[variant]), untie=True)
    facts = pack(sliced, tmp_path / "packed", threshold=0.3)
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    before, after = Checkpoint(sliced), Checkpoint(tmp_path / "unpacked")
    assert after.shapes == before.shapes
    assert after.dtypes == before.dtypes
    assert after.config == before.config
    assert [site["codec"] for site in facts["sites"]] == ["bits-back"] * SITES
    assert facts["bytes"]["packed"] < facts["bytes"]["sliced"]


def test_the_saving_is_the_papers_count_and_every_byte_is_counted(packed: Path, sliced: Path) -> None:
    before, after = Checkpoint(sliced), PackedCheckpoint(packed)
    words = sum(tensor.numel() for _, tensor in before.items())
    side = [name for name in after.stored.files if name.endswith((".signs", ".corrections"))]
    stored = sum(tensor.numel() for name, tensor in after.stored.items() if name not in side)
    sizes = [48, 48, 48, 48, 48, 64]
    assert words - stored == sum(k * (k - 1) // 2 for k in sizes)
    files = (packed / name for name in ("model.safetensors", "config.json", "freebits.json"))
    facts = freebits.inspect(packed)
    assert facts["bytes"]["packed"] == sum(file.stat().st_size for file in files)
    assert facts["bytes"]["corrections"] == sum(after.stored[n].nbytes for n in side if n.endswith("corrections"))
    assert facts["bytes"]["sliced"] == freebits.inspect(sliced)["bytes"]["sliced"]


def test_a_single_block_can_be_decoded_alone(packed: Path, tmp_path: Path) -> None:
    everything = dict(open_packed(packed).tensors())
    checkpoint = PackedCheckpoint(packed)
    site = checkpoint.manifest.sites[2]
    assert site.name == "model.layers.1.attention"
    parts = {name: checkpoint.stored[name] for name in checkpoint.parts(site).values()}
    alone = tmp_path / "alone"  # a folder with this block's parts and nothing else of the model
    shutil.copytree(packed, alone)
    save_file(parts, alone / "model.safetensors")
    checkpoint.stored = StoredTensors(alone, {})
    decoded = checkpoint.decode_site(site)
    assert set(decoded) == {
        f"model.layers.1.{name}.weight"
        for name in ("attention_shortcut", *(f"self_attn.{proj}_proj" for proj in "qkvo"))
    }
    assert all(torch.equal(tensor, everything[name]) for name, tensor in decoded.items())


def test_corrected_words_come_back_exactly_and_the_others_within_the_threshold(sliced: Path, tmp_path: Path) -> None:
    exact, coarse = tmp_path / "exact", tmp_path / "coarse"
    pack(sliced, exact, threshold=0.005)
    pack(sliced, coarse, threshold=1e9)
    right, raw = dict(open_packed(exact).tensors()), dict(open_packed(coarse).tensors())
    errors = torch.cat([(right[name].double() - raw[name].double()).abs().flatten() for name in right])
    n_corrected = sum(site.get("corrections", 0) for site in freebits.inspect(exact)["sites"])
    assert n_corrected == (errors > 0).sum() > 0
    assert freebits.inspect(coarse)["bytes"]["corrections"] == 0


def test_every_number_of_jobs_writes_the_same_model(sliced: Path, packed: Path, tmp_path: Path) -> None:
    pack(sliced, tmp_path / "one", threshold=THRESHOLD, jobs=1)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()


def test_no_jobs_are_refused(sliced: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="jobs 0"):
        pack(sliced, tmp_path / "out", jobs=0)
    with pytest.raises(UsageError, match="jobs 0"):
        freebits.unpack(packed, tmp_path / "out", jobs=0)
    assert not (tmp_path / "out").exists()


def test_a_site_that_is_not_finite_is_stored_plain_bit_for_bit(sliced: Path, tmp_path: Path) -> None:
    state = load_file(sliced / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    state[name][3, 5] = float("nan")
    state["model.layers.2.mlp.up_proj.weight"][0, 0] = 65504  # finite, but a rotation could overflow
    save_file(state, sliced / "model.safetensors", metadata={"format": "pt"})
    facts = pack(sliced, tmp_path / "packed", threshold=THRESHOLD)
    plain = {site["site"]: site["reason"] for site in facts["sites"] if site["codec"] == "plain"}
    assert plain.keys() == {3, 5}
    assert name in plain[3]
    unpacked = dict(open_packed(tmp_path / "packed").tensors())
    assert torch.equal(unpacked[name].view(torch.int16), state[name].view(torch.int16))


def test_a_site_whose_corrections_outweigh_the_gain_is_stored_plain(sliced: Path, tmp_path: Path) -> None:
    facts = pack(sliced, tmp_path / "packed", threshold=0.0)
    assert {site["codec"] for site in facts["sites"]} == {"plain"}
    assert "more than the" in facts["sites"][0]["reason"]
    assert facts["bytes"]["packed"] < facts["bytes"]["sliced"] + 12_000  # the manifest


def test_files_beside_the_weights_are_carried_over(save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    (dense / "LICENSE").write_text("free")
    (dense / "pytorch_model.bin").write_bytes(b"pickle")
    (dense / "modeling_maker.py").write_text("import os")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (dense / "another").mkdir()
    (dense / "another" / "config.json").write_text("{}")
    sliced = slice_tiny(dense)
    pack(sliced, tmp_path / "packed", threshold=0.3)
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    for folder in (sliced, tmp_path / "packed", tmp_path / "unpacked"):
        assert (folder / "LICENSE").read_text() == "free"
        assert (folder / "tokenizer.json").exists()
        assert (folder / "additional_chat_templates" / "tools.jinja").exists()
        assert [file.name for file in folder.glob("*.py")] == ["modeling_freebits.py"]
        assert not (folder / "pytorch_model.bin").exists()
        assert not (folder / "another").exists()
    assert not (tmp_path / "unpacked" / "freebits.json").exists()


def test_one_flipped_byte_anywhere_is_noticed(packed: Path) -> None:
    size = (packed / "model.safetensors").stat().st_size
    header = int.from_bytes((packed / "model.safetensors").read_bytes()[:8], "little")
    places = [("model.safetensors", at) for at in range(header + 8, size, size // 40)]
    places += [(name, at) for name in ("freebits.json", "config.json") for at in range(3, 900, 90)]
    for name, position in places:
        sound = (packed / name).read_bytes()
        damaged = bytearray(sound)
        damaged[position % len(sound)] ^= 1
        (packed / name).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            dict(open_packed(packed).tensors())
        (packed / name).write_bytes(sound)
    dict(open_packed(packed).tensors())


def test_a_flipped_byte_in_the_header_is_noticed_or_harmless(packed: Path) -> None:
    sound = (packed / "model.safetensors").read_bytes()
    expected = dict(open_packed(packed).tensors())
    header = json.loads(sound[8 : 8 + int.from_bytes(sound[:8], "little")])
    for position in range(0, len(json.dumps(header)), 37):
        damaged = bytearray(sound)
        damaged[position] ^= 1
        (packed / "model.safetensors").write_bytes(damaged)
        try:
            found = dict(open_packed(packed).tensors())
        except CheckpointError:
            continue
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kept", [0, 5, 100, 20_000])
def test_a_truncated_file_is_noticed(packed: Path, kept: int, tmp_path: Path) -> None:
    content = (packed / "model.safetensors").read_bytes()
    (packed / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        freebits.unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_packing_is_noticed(packed: Path, tmp_path: Path) -> None:
    manifest = json.loads((packed / "freebits.json").read_text())
    for change in ({"format": 99}, {"codec": "other"}):
        (packed / "freebits.json").write_text(json.dumps(manifest | change))
        with pytest.raises(CheckpointError, match=r"format 99|damaged"):
            freebits.unpack(packed, tmp_path / "out")


def test_nothing_is_left_behind_when_writing_fails(sliced: Path, tmp_path: Path) -> None:
    content = (sliced / "model.safetensors").read_bytes()
    before = sorted(tmp_path.iterdir())

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(sliced, tmp_path / "out", progress=stop)
    with pytest.raises(CheckpointError, match="exists already"):
        pack(sliced, sliced)
    assert sorted(tmp_path.iterdir()) == before
    assert (sliced / "model.safetensors").read_bytes() == content


def test_corrections_are_readable_on_their_own(packed: Path) -> None:
    checkpoint = PackedCheckpoint(packed)
    for site in checkpoint.manifest.sites:
        if site.corrections:
            name = checkpoint.parts(site)["corrections"]
            positions, words = read_corrections(checkpoint.read(name), checkpoint.dtype)
            assert len(positions) == len(words) == site.corrections
            assert (positions.diff() > 0).all()


def test_a_rotated_model_is_the_same_function(sliced: Path, packed: Path) -> None:
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        outputs: list[Tensor] = [freebits.load(path, dtype=torch.float64)(tokens).logits for path in (sliced, packed)]
    assert (outputs[0] - outputs[1]).std() < 0.1 * outputs[0].std()


WATCH = """
import sys, threading, freebits
from pathlib import Path
from typing import Any

def anonymous():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

start, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch, daemon=True)
thread.start()
freebits.pack(sys.argv[1], sys.argv[2], codec=sys.argv[4], jobs=1)
freebits.unpack(sys.argv[2], sys.argv[3], jobs=1)
done.set()
thread.join()
print(peak - start)
"""


@pytest.mark.parametrize("codec", CODECS)
def test_memory_does_not_grow_with_the_number_of_blocks(
    codec: str, tmp_path: Path, report: Callable[[str], None]
) -> None:
    peaks = {}
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    for n_blocks in (4, 36):
        config = tiny_config(hidden_size=512, intermediate_size=1024, num_hidden_layers=n_blocks, head_dim=64)
        values = config.to_dict() | {"site_sizes": [408] * 2 * n_blocks + [512]}
        values = {key: value for key, value in values.items() if key != "model_type"}
        sliced = tmp_path / f"sliced {n_blocks}"
        SlicedLlamaForCausalLM(SlicedLlamaConfig(**values)).half().save_pretrained(sliced)
        folders = [str(tmp_path / f"{name} {n_blocks}") for name in ("sliced", "packed", "unpacked")]
        command = [sys.executable, "-c", WATCH, *folders, codec]
        peaks[n_blocks] = int(
            subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        )
    block = freebits.inspect(sliced)["bytes"]["sliced"] // 36
    report(
        f"{codec}: peak memory to pack and unpack, in blocks of 16-bit words: { {n: peaks[n] / block for n in peaks} }"
    )
    assert peaks[36] - peaks[4] < 12 * block  # 32 more blocks in the model; the allocator's waste varies by a few


def redigest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and make its digest right again, as damage would not but a foe might."""
    manifest = json.loads((folder / "freebits.json").read_text())
    manifest.pop("digest")
    change(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    (folder / "freebits.json").write_text(json.dumps(manifest | {"digest": digest}))


def test_a_manifest_left_as_it_was_is_read(packed: Path) -> None:
    redigest(packed, dict.copy)
    dict(open_packed(packed).tensors())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(tensors=["a", "b"]),
        lambda m: m.update(dtype="foo"),
        lambda m: m.update(dtype=5),
        lambda m: m.update(codec="huffman"),
        lambda m: m.update(entropy="zstd"),
        lambda m: m.update(sites=5),
        lambda m: m.update(sites=[]),
        lambda m: m.update(unknown=1),
        lambda m: m["sites"][0].update(codec="zzz"),
        lambda m: m["sites"][0].update(codec="plain"),
        lambda m: m["sites"][0].update(name=["a"]),
        lambda m: m["sites"][0].update(codec=["a"]),
        lambda m: m["sites"][0].update(codec="lower"),
        lambda m: m["sites"][0].update(tensors=None),
        lambda m: m["sites"][0].update(tensors=["x"]),
        lambda m: m["sites"][0].update(tensors=m["sites"][0]["tensors"][-1:]),
        lambda m: m["sites"][0]["tensors"][-1][1].__setitem__(0, 10**12),
        lambda m: m["sites"][0]["tensors"][-1][1].__setitem__(0, 0),
        lambda m: m["sites"][0]["tensors"][0].__setitem__(1, [-48, -48]),
        lambda m: m["sites"][0]["tensors"][0].__setitem__(1, ["48", "48"]),
        lambda m: m["sites"][0]["tensors"][0].__setitem__(1, 48),
        lambda m: m["sites"][0]["tensors"].pop(),
        lambda m: m["sites"][0]["tensors"].pop(0),
        lambda m: m["sites"][0]["tensors"][0].__setitem__(0, "lm_head.weight"),
        lambda m: m["sites"][0]["tensors"][0].__setitem__(0, m["sites"][0]["tensors"][1][0]),
        lambda m: m["sites"][1].update(name=m["sites"][0]["name"]),
        lambda m: m["sites"][1].update(site=m["sites"][0]["site"]),
        lambda m: m["sites"][0].update(corrections="x"),
        lambda m: m["bytes"].update(dense="x"),
        lambda m: m["sites"][0].update(codec="symmetric", tensors=[["lm_head.weight", [96, 64]]]),
        lambda m: m["tensors"].pop("lm_head.weight"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(change: Callable[[dict[str, Any]], object], packed: Path) -> None:
    redigest(packed, change)
    with pytest.raises(CheckpointError) as caught:
        dict(open_packed(packed).tensors())
    assert "\n" not in str(caught.value)
