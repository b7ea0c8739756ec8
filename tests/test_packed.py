"""Packed checkpoints give the model back, and damage to them is noticed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freebits
from freebits.codecs.base import Check, Coded
from freebits.codecs.corrections import read_corrections
from freebits.codecs.registry import CODES
from freebits.errors import CheckpointError, UsageError
from freebits.execution.executor import threads
from freebits.limits import RECIPE_STEPS
from freebits.models.sliced import SlicedLlamaConfig, SlicedLlamaForCausalLM
from freebits.options import CODECS
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from freebits.types import TensorSpec, bytes_of
from tests.tiny import VARIANTS, Make, change_config, flip, random_text, redigest, tensors_of, tiny_config

THRESHOLD = 0.005
SITES = 6
pack = partial(freebits.pack, codec="bits-back", entropy="none")


@pytest.fixture
def sliced(save_tiny: Make, slice_tiny: Make) -> Path:
    return slice_tiny(save_tiny(hidden_size=64, intermediate_size=160, tie_word_embeddings=True), untie=True)


@pytest.fixture
def packed(sliced: Path, pack_tiny: Make) -> Path:
    return pack_tiny(sliced, codec="bits-back", entropy="none", threshold=THRESHOLD)


def without_history(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "freebits"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unpacking_restores_the_config_and_all_tensors_of_the_sliced_model(
    variant: str, dtype: torch.dtype, save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    sliced = slice_tiny(save_tiny(dtype=dtype, hidden_size=64, intermediate_size=160, **VARIANTS[variant]), untie=True)
    facts = pack(sliced, tmp_path / "packed", threshold=0.3)
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    before, after = Checkpoint(sliced), Checkpoint(tmp_path / "unpacked")
    assert after.specs == before.specs
    assert without_history(after.config) == without_history(before.config)
    assert [site.get("code") for site in facts["sites"]] == [None] + ["bits-back"] * SITES
    assert facts["bytes"]["packed"] < facts["bytes"]["sliced"]


def test_the_saving_is_that_of_the_paper_and_every_byte_is_counted(packed: Path, sliced: Path) -> None:
    before, after = Checkpoint(sliced), PackedFolder(packed)
    n_values = sum(spec.numel for spec in before.specs.values())
    side = {name: spec for name, spec in after.stored.items() if name.endswith((".signs", ".corrections"))}
    n_stored_values = sum(spec.numel for name, spec in after.stored.items() if name not in side)
    sizes = [48, 48, 48, 48, 48, 64]
    assert n_values - n_stored_values == sum(k * (k - 1) // 2 for k in sizes)
    files = (packed / name for name in ("packed.safetensors", "config.json", "freebits.json"))
    facts = freebits.inspect(packed)
    assert facts["bytes"]["packed"] == sum(file.stat().st_size for file in files) == sum(facts["groups"].values())
    corrections = [spec.n_bytes for name, spec in side.items() if name.endswith("corrections")]
    assert facts["bytes"]["corrections"] == sum(corrections) > 0
    assert facts["groups"]["side data"] == sum(spec.n_bytes for spec in side.values())
    assert facts["bytes"]["sliced"] == freebits.inspect(sliced)["bytes"]["sliced"]


def test_a_tensor_is_decoded_from_only_the_parts_of_its_recipe(packed: Path) -> None:
    expected = tensors_of(packed)
    folder = PackedFolder(packed)
    name = "model.layers.1.self_attn.k_proj.weight"
    [recipe] = [recipe for recipe in folder.manifest.recipes if name in recipe.makes]
    assert recipe.makes.keys() == {
        f"model.layers.1.{module}.weight"
        for module in ("attention_shortcut", *(f"self_attn.{proj}_proj" for proj in "qkvo"))
    }
    damaged = bytearray((packed / "packed.safetensors").read_bytes())
    start = int.from_bytes(damaged[:8], "little") + 8
    for stored, entry in folder.files[0].entries.items():
        if stored not in recipe.takes.values():
            damaged[start + entry.begin : start + entry.end] = bytes(entry.end - entry.begin)
    (packed / "packed.safetensors").write_bytes(damaged)
    damaged_folder = PackedFolder(packed)
    assert all(torch.equal(damaged_folder[made_name], expected[made_name]) for made_name in recipe.makes)
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\."):
        damaged_folder["model.layers.0.self_attn.k_proj.weight"]


def test_the_number_of_corrections_is_the_number_of_values_that_they_change(sliced: Path, tmp_path: Path) -> None:
    exact, coarse = tmp_path / "exact", tmp_path / "coarse"
    pack(sliced, exact, threshold=0.005)
    pack(sliced, coarse, threshold=1e9)
    corrected, raw = tensors_of(exact), tensors_of(coarse)
    errors = torch.cat([(corrected[name].double() - raw[name].double()).abs().flatten() for name in corrected])
    n_corrected = sum(site.get("corrections", 0) for site in freebits.inspect(exact)["sites"])
    assert n_corrected == (errors > 0).sum() > 0
    assert freebits.inspect(coarse)["bytes"]["corrections"] == 0


def test_the_number_of_jobs_does_not_change_the_packed_file(sliced: Path, packed: Path, tmp_path: Path) -> None:
    pack(sliced, tmp_path / "one", threshold=THRESHOLD, parallel=freebits.Parallel(jobs=1))
    assert (tmp_path / "one" / "packed.safetensors").read_bytes() == (packed / "packed.safetensors").read_bytes()


def test_a_site_with_an_infinite_nan_or_huge_weight_is_stored_unchanged(sliced: Path, tmp_path: Path) -> None:
    state = load_file(sliced / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    state[name][3, 5] = float("nan")
    state["model.layers.2.mlp.up_proj.weight"][0, 0] = 65504  # finite, but a rotation could overflow
    save_file(state, sliced / "model.safetensors", metadata={"format": "pt"})
    facts = pack(sliced, tmp_path / "packed", threshold=THRESHOLD)
    plain = {site["site"]: site["reason"] for site in facts["sites"] if "code" not in site}
    assert plain.keys() == {0, 3, 5}
    assert name in plain[3]
    unpacked = tensors_of(tmp_path / "packed")
    assert torch.equal(unpacked[name].view(torch.int16), state[name].view(torch.int16))


def test_a_site_whose_corrections_exceed_the_gain_is_stored_unchanged(sliced: Path, tmp_path: Path) -> None:
    facts = pack(sliced, tmp_path / "packed", threshold=0.0)
    assert not [site for site in facts["sites"] if "code" in site]
    assert "corrections" in facts["sites"][1]["reason"]
    assert facts["bytes"]["packed"] < facts["bytes"]["sliced"] + 12_000  # the manifest


def test_one_flipped_byte_anywhere_is_noticed(packed: Path) -> None:
    size = (packed / "packed.safetensors").stat().st_size
    header = int.from_bytes((packed / "packed.safetensors").read_bytes()[:8], "little")
    positions = [("packed.safetensors", position) for position in range(header + 8, size, size // 40)]
    for name in ("freebits.json", "config.json"):
        positions += [(name, position) for position in range(3, 900, 90)]
    for name, position in positions:
        undamaged = (packed / name).read_bytes()
        flip(packed / name, position)
        with pytest.raises(CheckpointError):
            tensors_of(packed)
        (packed / name).write_bytes(undamaged)
    tensors_of(packed)


def test_a_flipped_byte_in_the_header_is_noticed_or_harmless(packed: Path) -> None:
    undamaged = (packed / "packed.safetensors").read_bytes()
    expected = tensors_of(packed)
    header = json.loads(undamaged[8 : 8 + int.from_bytes(undamaged[:8], "little")])
    for position in range(0, len(json.dumps(header)), 37):
        damaged = bytearray(undamaged)
        damaged[position] ^= 1
        (packed / "packed.safetensors").write_bytes(damaged)
        try:
            actual = tensors_of(packed)
        except CheckpointError:
            continue
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("n_bytes", [0, 5, 100, 20_000])
def test_a_truncated_file_is_refused(packed: Path, n_bytes: int, tmp_path: Path) -> None:
    content = (packed / "packed.safetensors").read_bytes()
    (packed / "packed.safetensors").write_bytes(content[:n_bytes])
    with pytest.raises(CheckpointError, match=r"packed\.safetensors"):
        freebits.unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_manifest_with_another_format_or_codec_is_refused(packed: Path, tmp_path: Path) -> None:
    manifest = json.loads((packed / "freebits.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [({"format": 99}, "format 99"), ({"codec": "other"}, r"freebits\.json")]
    for change, fact in changes:
        (packed / "freebits.json").write_text(json.dumps(manifest | change))
        with pytest.raises(CheckpointError, match=fact):
            freebits.unpack(packed, tmp_path / "out")


def test_a_failed_write_leaves_no_files_behind(sliced: Path, tmp_path: Path) -> None:
    content = (sliced / "model.safetensors").read_bytes()
    before = sorted(tmp_path.iterdir())

    def stop(_step: str, _unit: str, _done: int, _total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"out .*No space left on device"):
        pack(sliced, tmp_path / "out", progress=stop)
    with pytest.raises(CheckpointError, match=re.escape(str(sliced))):
        pack(sliced, sliced)
    assert sorted(tmp_path.iterdir()) == before
    assert (sliced / "model.safetensors").read_bytes() == content


def test_corrections_can_be_read_without_the_other_parts(packed: Path) -> None:
    folder = PackedFolder(packed)
    counts = {note["name"]: note["corrections"] for note in folder.manifest.notes if "corrections" in note}
    assert counts
    stored = load_file(packed / "packed.safetensors")
    for name, count in counts.items():
        positions, values = read_corrections(stored[f"{name}.corrections"], torch.float16)
        assert len(positions) == len(values) == count
        assert (positions.diff() > 0).all()


def test_a_packed_model_computes_nearly_the_same_as_the_sliced_one(sliced: Path, packed: Path) -> None:
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        outputs: list[Tensor] = [freebits.load(path, dtype=torch.float64)(tokens).logits for path in (sliced, packed)]
    assert (outputs[0] - outputs[1]).std() < 0.1 * outputs[0].std()


def test_a_manifest_that_is_written_again_unchanged_is_accepted(packed: Path) -> None:
    redigest(packed, dict.copy)
    tensors_of(packed)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(digests=["a", "b"]),
        lambda m: m.update(codec=5),
        lambda m: m.update(config=5),
        lambda m: m.update(recipes=5),
        lambda m: m.update(recipes=[]),
        lambda m: m.update(notes=5),
        lambda m: m.update(history=["x"]),
        lambda m: m.update(files=["../packed/packed.safetensors"]),
        lambda m: m.update(files=["packed.safetensors"] * 2),
        lambda m: m.update(originals={"../x": ""}),
        lambda m: m.update(unknown=1),
        lambda m: m["recipes"][0].update(code="zzz"),
        lambda m: m["recipes"][0].update(code=["a"]),
        lambda m: m["recipes"][0].update(code="lower"),
        lambda m: m["recipes"][0].update(makes=None),
        lambda m: m["recipes"][0].update(makes=["x"]),
        lambda m: m["recipes"][0].update(makes=m["recipes"][0]["makes"][-1:]),
        lambda m: m["recipes"][0]["makes"][-1].__setitem__(1, "F16[1000000000000, 160]"),
        lambda m: m["recipes"][0]["makes"][-1].__setitem__(1, "F16[0, 160]"),
        lambda m: m["recipes"][0]["makes"][-1].__setitem__(1, "F32[64, 160]"),
        lambda m: m["recipes"][0]["makes"][0].__setitem__(1, "F16[-48, -48]"),
        lambda m: m["recipes"][0]["makes"][0].__setitem__(1, "F16[48]"),
        lambda m: m["recipes"][0]["makes"][0].__setitem__(1, 48),
        lambda m: m["recipes"][0]["makes"].pop(),
        lambda m: m["recipes"][0]["makes"].pop(0),
        lambda m: m["recipes"][0]["makes"][0].__setitem__(0, "lm_head.weight"),
        lambda m: m["recipes"][0]["makes"][0].__setitem__(0, m["recipes"][0]["makes"][1][0]),
        lambda m: m["recipes"][0].update(params=None),
        lambda m: m["recipes"][0]["params"].update(rank=10**9),
        lambda m: m["recipes"][0]["takes"].update(message="lm_head.weight"),
        lambda m: m["recipes"][0]["takes"].pop("signs"),
        lambda m: m["recipes"][1].update(takes=m["recipes"][0]["takes"]),
        lambda m: m["recipes"].append(m["recipes"][0]),
        lambda m: m["recipes"].append(
            {"code": "symmetric", "takes": {"words": "lm_head.weight"}, "makes": [["lm_head.weight", "F16[96, 64]"]]}
        ),
        lambda m: m["digests"].pop("lm_head.weight"),
    ],
)
def test_an_invalid_manifest_is_refused_in_one_line(change: Callable[[dict[str, Any]], object], packed: Path) -> None:
    redigest(packed, change)
    with pytest.raises(CheckpointError) as caught:
        tensors_of(packed)
    assert "\n" not in str(caught.value)


def test_a_manifest_cannot_remove_a_tensor_from_the_model(packed: Path, tmp_path: Path) -> None:
    # Regression: sites and tensors shared names, so `unpack` dropped the head if a site was called lm_head.weight.
    def rename(manifest: dict[str, Any]) -> None:
        for note in manifest["notes"]:
            note["name"] = "lm_head.weight"

    redigest(packed, rename)
    assert "lm_head.weight" in tensors_of(packed)
    freebits.unpack(packed, tmp_path / "unpacked")
    assert "lm_head.weight" in Checkpoint(tmp_path / "unpacked").specs

    def reuse(manifest: dict[str, Any]) -> None:
        parts = manifest["recipes"][0]["takes"]
        manifest["recipes"][0]["takes"] = dict.fromkeys(parts, "lm_head.weight")

    redigest(packed, reuse)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        freebits.unpack(packed, tmp_path / "out")


class Reversed:
    """A code that stores the bytes of a tensor in reverse order."""

    exact = True
    check = Check.DIGEST
    param_names: frozenset[str] = frozenset()

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        return Coded({"reversed": torch.from_numpy(bytes_of(tensors[0])[::-1].copy())})

    def decode(
        self,
        parts: Mapping[str, Tensor],
        makes: Sequence[TensorSpec],
        params: Mapping[str, Any],  # noqa: ARG002
    ) -> list[Tensor]:
        return [makes[0].view(parts["reversed"].numpy()[::-1].copy())]

    def parts(self, makes: Sequence[TensorSpec], params: Mapping[str, Any]) -> dict[str, TensorSpec]:  # noqa: ARG002
        return {"reversed": TensorSpec("U8", (makes[0].n_bytes,))}


@pytest.mark.parametrize("codec", CODECS)
def test_a_new_code_needs_only_a_class_and_an_entry_in_the_registry(
    codec: str, sliced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODES, "reversed", Reversed())
    facts = freebits.pack(sliced, tmp_path / "packed", codec=codec, entropy="reversed")
    assert facts["entropy"] == "reversed"
    folder = PackedFolder(tmp_path / "packed")
    assert all(name.endswith(".reversed") for name in folder.stored)
    freebits.pack(sliced, tmp_path / "plain", codec=codec, entropy="none")
    expected = tensors_of(tmp_path / "plain")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in folder.model_tensors())
    assert freebits.verify(tmp_path / "packed")["ok"]
    assert freebits.load(tmp_path / "packed")(torch.arange(9)[None]).logits.isfinite().all()
    monkeypatch.delitem(CODES, "reversed")
    with pytest.raises(CheckpointError, match="code 'reversed'"):
        PackedFolder(tmp_path / "packed")
    with pytest.raises(UsageError, match="`entropy` is 'reversed'"):
        freebits.pack(sliced, tmp_path / "again", entropy="reversed")


def test_every_tensor_keeps_its_dtype_when_packed(save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny(hidden_size=64, intermediate_size=160)
    state = load_file(dense / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].float()
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    sliced = slice_tiny(dense)
    for codec, threshold in (("canonical", None), ("bits-back", 0.3), ("none", None)):
        facts = freebits.pack(sliced, tmp_path / codec, codec=codec, threshold=threshold)
        dtypes = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / codec).items()}
        wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert wide == {"model.layers.1.mlp.up_proj.weight"}
        if codec == "bits-back":
            plain = {site["site"]: site["reason"] for site in facts["sites"] if "code" not in site}
            assert "dtype" in plain[4]


def test_a_config_that_was_changed_after_packing_is_refused(packed: Path) -> None:
    change_config(packed, dtype="float32")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        PackedFolder(packed)


def test_a_model_is_verified_against_its_own_unpacked_form_and_histories_agree(
    packed: Path, sliced: Path, tmp_path: Path
) -> None:
    freebits.unpack(packed, tmp_path / "unpacked")
    text = random_text(300)
    result = freebits.verify(packed, against=tmp_path / "unpacked", text=text, seq_len=32)
    assert (result["ok"], result["fidelity"]) == (True, "function-preserving")
    histories = [freebits.inspect(folder)["history"] for folder in (sliced, packed, tmp_path / "unpacked")]
    freebits.load(packed).save_pretrained(tmp_path / "saved")
    histories.append(freebits.inspect(tmp_path / "saved")["history"])
    assert [[step["transform"] for step in history] for history in histories] == [
        ["slice"],
        *[["slice", "bits-back"]] * 3,
    ]


def test_an_auto_map_with_foreign_code_is_not_copied(sliced: Path, tmp_path: Path) -> None:
    change_config(sliced, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    freebits.pack(sliced, tmp_path / "packed")
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    for folder in (tmp_path / "packed", tmp_path / "unpacked"):
        classes = json.loads((folder / "config.json").read_text())["auto_map"].values()
        assert all(name.startswith("modeling_freebits.") for name in classes)


def test_a_tensor_that_no_original_header_lists_is_refused(sliced: Path, tmp_path: Path) -> None:
    freebits.pack(sliced, tmp_path / "packed", codec="none", entropy="none")
    removed: list[str] = []

    def remove_last(manifest: dict[str, Any]) -> None:
        header = json.loads(manifest["originals"]["model.safetensors"])
        last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
        del header[last]
        removed.append(last)
        manifest["originals"]["model.safetensors"] = json.dumps(header)

    redigest(tmp_path / "packed", remove_last)
    with pytest.raises(CheckpointError, match=re.escape(removed[0])):
        PackedFolder(tmp_path / "packed")


def test_an_unknown_sliced_model_can_be_packed_and_unpacked_with_codec_none(sliced: Path, tmp_path: Path) -> None:
    change_config(sliced, model_type="sliced_unheard_of")
    freebits.pack(sliced, tmp_path / "packed", codec="none")
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "config.json").read_bytes() == (sliced / "config.json").read_bytes()


def test_a_long_chain_of_recipes_is_refused(packed: Path) -> None:
    def add_chain(manifest: dict[str, Any]) -> None:
        spec = "U8[64]"
        for number in range(40):
            takes = {"entropy": f"x{number - 1}" if number else "model.layers.0.attention.signs"}
            makes = [[f"x{number}", spec.replace("64", str(64 + 8 * number))]]
            params = {"bytes": 8 if not number else 56 + 8 * number}
            manifest["recipes"].insert(number, {"code": "entropy", "takes": takes, "makes": makes, "params": params})

    redigest(packed, add_chain)
    with pytest.raises(CheckpointError, match=f"{RECIPE_STEPS} recipes"):
        PackedFolder(packed)


def test_thread_pools_restore_the_number_of_threads_even_if_nested() -> None:
    before = torch.get_num_threads()
    with threads(2), threads(2), threads(None):
        pass
    assert torch.get_num_threads() == before
    with threads(2) as executor:
        counts = list(executor.map(lambda _: torch.get_num_threads(), range(3)))
    per_job = max(1, min(before, len(os.sched_getaffinity(0))) // 2)
    assert counts == [per_job, per_job, before]  # the calling thread runs the last piece on all threads


MEASURE = """
import sys, threading, freebits, freebits.integrations.auto_classes
from pathlib import Path

def anonymous_memory():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

def measure():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous_memory())

folders, one_job = [Path(folder) for folder in sys.argv[2:]], freebits.Parallel(jobs=1)
text = " ".join(f"w{number % 96}" for number in range(2000))
peaks = []
for statement in sys.argv[1].splitlines():
    start, peak, done = anonymous_memory(), 0, threading.Event()
    thread = threading.Thread(target=measure)
    thread.start()
    exec(statement)
    done.set()
    thread.join()
    peaks.append(peak - start)
print(*peaks)
"""


def peak_memory(statements: Iterable[str], *folders: Path) -> list[int]:
    """Run statements in a new process. Return by how many bytes its memory grows at most during each statement."""
    # The settings make the allocator return small matrices to the system at once, as it returns large ones.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, "-c", MEASURE, "\n".join(statements), *map(str, folders)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [int(peak) for peak in output.split()]


SLICED_COMMANDS = {
    f"{command} {codec}": statement.format(f"folders[1] / {codec!r}", f"folders[2] / {codec!r}", repr(codec))
    for codec in CODECS
    for command, statement in (
        ("pack", "freebits.pack(folders[0], {0}, codec={2}, parallel=one_job)"),
        ("unpack", "freebits.unpack({0}, {1}, parallel=one_job)"),
    )
}
"""Command and codec → statement that runs the command."""


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path, report: Callable[[str], None]) -> None:
    peaks = []
    for n_blocks in (2, 8):
        config = tiny_config(hidden_size=512, intermediate_size=1024, num_hidden_layers=n_blocks, head_dim=64)
        values = config.to_dict() | {"site_sizes": [408] * 2 * n_blocks + [512]}
        values = {key: value for key, value in values.items() if key != "model_type"}
        folders = [tmp_path / f"{name} {n_blocks}" for name in ("sliced", "packed", "unpacked")]
        SlicedLlamaForCausalLM(SlicedLlamaConfig(**values)).half().save_pretrained(folders[0])
        peaks.append(peak_memory(SLICED_COMMANDS.values(), *folders))
    block = freebits.inspect(folders[0])["bytes"]["sliced"] // 8
    for name, shallow, deep in zip(SLICED_COMMANDS, *peaks, strict=True):
        report(f"{name}: peak memory in blocks of 16-bit values: {shallow / block:.1f}, {deep / block:.1f}")
        assert deep - shallow < 4 * block  # the model has 6 more blocks; the allocator's overhead varies by a few


DENSE_COMMANDS = {
    "slice": "freebits.slice_model(folders[0], folders[1], sparsity=0.2, calibration=text, samples=2, seq_len=32)",
    "quantize": "freebits.quantize(folders[0], folders[2], calibration=text, samples=2, seq_len=32, parallel=one_job)",
    "verify": "assert freebits.verify(folders[2], against=folders[0], text=text, seq_len=32, limit=2)",
    "pack": "freebits.pack(folders[0], folders[3], codec='none')",
    "load": "model = freebits.load(folders[3])",
}
"""Command → statement that runs it; `verify` checks the result of `quantize`, and `load` loads that of `pack`."""


def test_commands_on_a_dense_model_hold_only_a_few_blocks_in_memory(
    save_tiny: Make, report: Callable[[str], None]
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    peaks = []
    for n_blocks in (2, 8):
        dense = save_tiny(f"dense {n_blocks}", num_hidden_layers=n_blocks, shard="20MB", **sizes)
        outs = (dense.with_name(f"{name} {n_blocks}") for name in ("sliced", "quantized", "packed"))
        peaks.append(peak_memory(DENSE_COMMANDS.values(), dense, *outs))
    model = freebits.inspect(dense)["bytes"]["dense"]
    block = model // 8
    for command, shallow, deep in zip(DENSE_COMMANDS, *peaks, strict=True):
        report(f"{command}: peak memory in blocks of 16-bit values: {shallow / block:.1f}, {deep / block:.1f}")
        n_models = {"verify": 2, "pack": 0}.get(command, 1)
        resident_bytes = n_models * 2 * 6 * block  # small models stay in memory in float32; see test_engine.py
        assert deep - shallow < resident_bytes + 5 * block, command  # the model has 6 more blocks
        assert command != "load" or deep < 1.5 * model
