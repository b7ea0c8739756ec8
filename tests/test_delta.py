"""A folder that was packed with a base restores every byte, and needs exactly that base."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import freebits
from freebits.cli.main import main
from freebits.codecs import symbol_stream
from freebits.codecs.base import Declined
from freebits.codecs.delta import Delta, are_partners
from freebits.codecs.integers import scales_of
from freebits.errors import CheckpointError, UnsupportedModelError, UsageError
from freebits.execution.executor import Parallel
from freebits.limits import BASES
from freebits.packed.base import BASE_PATH
from freebits.packed.manifest import Manifest
from freebits.packed.reader import PackedFolder
from freebits.quantization.error_compensation import inverse_factor
from freebits.quantization.scales import scaled_integers
from freebits.storage.checkpoint import Checkpoint
from freebits.types import DTYPES, TensorSpec, bytes_of
from tests.tiny import Make, random_text, redigest

FLOATS = ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2")
STEP = 1e-3


def random_tensor(seed: int, dtype_name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype_name in FLOATS:
        return (torch.randn(shape, generator=generator) / 8).to(DTYPES[dtype_name])
    return torch.randint(100, shape, generator=generator).to(DTYPES[dtype_name])


def changed(tensor: Tensor, seed: int, size: float) -> Tensor:
    """Return a tensor whose values differ a little, as after training."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return (tensor.double() + size * noise).to(tensor.dtype)


def round_trip(tensor: Tensor, base: Tensor) -> int:
    """Encode and decode a tensor. Return the number of bytes of the message."""
    code, spec = Delta(), TensorSpec.of(tensor)
    coded = code.encode([tensor, base], [spec])
    specs = code.parts([spec], coded.params)
    assert specs == {"message": TensorSpec.of(coded.parts["message"]), "base": TensorSpec.of(base)}
    [decoded] = code.decode({**coded.parts, "base": base}, [spec], coded.params)
    assert TensorSpec.of(decoded) == spec
    assert (bytes_of(decoded) == bytes_of(tensor)).all()
    return int(coded.params["bytes"])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    dtype_name=st.sampled_from([*FLOATS, "I64", "U8", "I16"]),
    shape=st.sampled_from([(2000,), (40, 60), (3, 30, 25), (1, 3000)]),
    size=st.sampled_from([0.0, 1e-5, 1e-3, 0.1]),
    rows=st.sampled_from([0, -1, 1]),
)
def test_decoding_restores_every_bit(
    seed: int, dtype_name: str, shape: tuple[int, ...], size: float, rows: int
) -> None:
    base = random_tensor(seed, dtype_name, shape)
    tensor = changed(base, seed + 1, size)
    if len(shape) > 1 and shape[0] + rows:
        base = random_tensor(seed, dtype_name, (shape[0] + rows, *shape[1:]))
    try:
        round_trip(tensor, base)
    except Declined:
        assert size > 0 or rows


@pytest.mark.parametrize("dtype_name", FLOATS)
def test_all_bit_patterns_are_restored(dtype_name: str) -> None:
    """Among them are zeros of both signs, infinities and NaNs."""
    width = DTYPES[dtype_name].itemsize
    bits = np.random.default_rng(0).permutation(1 << 16).astype(f"<u{width}")
    bits <<= 16 * (width == 4)  # the upper half of a value has its exponent
    base = torch.from_numpy(bits.copy()).view(DTYPES[dtype_name]).reshape(256, -1)
    tensor = base.clone()
    tensor[64:128] = base[:64]
    assert round_trip(tensor, base) < tensor.nbytes / 2


def test_chunks_are_coded_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freebits.codecs.delta.CHUNK", 640)
    base = random_tensor(0, "BF16", (101, 64))
    round_trip(changed(base, 1, STEP), base)


def test_equal_tensors_take_almost_no_bytes() -> None:
    base = random_tensor(0, "BF16", (512, 512))
    assert round_trip(base.clone(), base) < 400


def test_differences_take_about_their_entropy() -> None:
    """The differences are normal with a known deviation, in units of the last bit of each value."""
    base = torch.full((1024, 1024), 1.5).bfloat16()
    steps = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).mul_(4).round_()
    tensor = (base.float() + steps * 2**-7).bfloat16()
    entropy = np.log2(4 * np.sqrt(2 * np.pi * np.e))
    assert 8 * round_trip(tensor, base) / tensor.numel() < 1.02 * entropy


def test_rare_changes_take_far_less_than_a_bit_per_weight() -> None:
    """A step of reinforcement learning changes about 1 % of the values in bfloat16."""
    base = random_tensor(0, "BF16", (1024, 1024))
    bits = base.view(torch.int16).clone()
    rare = torch.rand(base.shape, generator=torch.Generator().manual_seed(1)) < 0.01
    bits[rare] += 1
    assert 8 * round_trip(bits.view(torch.bfloat16), base) / base.numel() < 0.1


def test_partners_differ_at_most_in_their_number_of_rows() -> None:
    spec = TensorSpec("BF16", (10, 4))
    assert are_partners(spec, TensorSpec("BF16", (12, 4)))
    for base in ("F16[10, 4]", "BF16[10, 5]", "BF16[40]", "BF16[10, 4, 1]", "BF16[0, 4]"):
        assert not are_partners(spec, TensorSpec.parse(base)), base


def test_rows_without_a_whole_number_of_bytes_need_as_many_partners() -> None:
    spec = TensorSpec("F4", (2, 3))
    assert Delta().parts([spec], {"bytes": 2, "rows": 2})["base"] == spec
    for rows in (4, 1, 0, True, 2.0):
        with pytest.raises(ValueError, match=r"rows|valid"):
            Delta().parts([spec], {"bytes": 2, "rows": rows})
    with pytest.raises(ValueError, match="3 rows"):
        Delta().parts([TensorSpec("F16", (30,))], {"bytes": 2, "rows": 3})


def test_unrelated_tensors_are_declined() -> None:
    noise = torch.randint(-(2**15), 2**15, (2, 64, 64), generator=torch.Generator().manual_seed(0)).short()
    with pytest.raises(Declined):
        Delta().encode([noise[0].view(torch.bfloat16), noise[1].view(torch.bfloat16)], [TensorSpec("BF16", (64, 64))])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), position=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_damaged_message_raises_a_value_error_or_decodes(seed: int, position: float, bit: int) -> None:
    base = random_tensor(seed, "BF16", (20, 30))
    tensor, code = changed(base, 1, STEP), Delta()
    coded = code.encode([tensor, base], [TensorSpec.of(tensor)])
    content = coded.parts["message"].numpy().copy()
    content[int(position * (len(content) - 1))] ^= 1 << bit
    with suppress(ValueError):
        code.decode({"message": torch.from_numpy(content), "base": base}, [TensorSpec.of(tensor)], coded.params)


def test_coded_integers_can_be_cut_nowhere() -> None:
    integers = np.arange(300, dtype=np.uint32) ** 3
    contexts = (np.arange(300) % 3).astype(np.uint8)
    content = symbol_stream.encode(integers, contexts)
    assert (symbol_stream.decode(content, contexts) == integers).all()
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"."):
            symbol_stream.decode(content[:length], contexts)


@pytest.fixture
def base(save_tiny: Make) -> Path:
    return save_tiny("base", torch.bfloat16)


def finetune(
    folder: Path, base: Path, seed: int = 1, change: Callable[[dict[str, Tensor]], object] | None = None
) -> Path:
    """Write a copy of a model whose weights have changed a little."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: changed(tensor, seed, STEP) for name, tensor in load_file(base / "model.safetensors").items()}
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_with_a_base_restores_every_file(base: Path, tmp_path: Path) -> None:
    model = finetune(tmp_path / "model", base)
    alone = freebits.pack(model, tmp_path / "alone", codec="none")
    facts = freebits.pack(model, tmp_path / "packed", base=base)
    n_matrices = sum(len(spec.shape) > 1 for spec in Checkpoint(model).specs.values())
    assert facts["base"] == {"tensors": n_matrices, "chain": ["../base"]}
    assert facts["bytes"]["packed"] < 0.8 * alone["bytes"]["packed"]
    freebits.unpack(tmp_path / "packed", tmp_path / "plain")
    assert content_of(tmp_path / "plain") == content_of(model)
    assert "needs its base, `../base`" in (tmp_path / "packed" / "README.md").read_text()
    assert freebits.verify(tmp_path / "packed", against=model)["ok"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    expected: Any = AutoModelForCausalLM.from_pretrained(model)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert sorted(file.name for file in (tmp_path / "packed").iterdir()) == sorted(
        file.name for file in (tmp_path / "alone").iterdir()
    )


def test_the_base_can_be_given_in_four_ways(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = finetune(tmp_path / "model", base)
    packed = tmp_path / "packed"
    freebits.pack(model, packed, base=base)
    moved = tmp_path / "elsewhere" / base.name
    moved.parent.mkdir()
    base.rename(moved)
    with pytest.raises(CheckpointError, match=rf"was at \.\./base but is not there: set {BASE_PATH}"):
        freebits.load(packed)
    expected = freebits.load(model).state_dict()
    loaded = [freebits.load(packed, base=moved), AutoModelForCausalLM.from_pretrained(packed, base=moved)]
    for value in (str(moved), os.pathsep.join(("", str(tmp_path / "none"), str(moved.parent)))):
        monkeypatch.setenv(BASE_PATH, value)
        loaded.append(freebits.load(packed))
    for form in loaded:
        assert all(torch.equal(form.state_dict()[name], tensor) for name, tensor in expected.items())
    monkeypatch.delenv(BASE_PATH)
    assert main(["unpack", str(packed), str(tmp_path / "plain"), "--base", str(moved)]) == 0
    assert content_of(tmp_path / "plain") == content_of(model)
    assert freebits.inspect(packed)["base"]["chain"] == ["../base"]


def test_another_base_is_refused_with_both_digests(base: Path, tmp_path: Path) -> None:
    freebits.pack(finetune(tmp_path / "model", base), tmp_path / "packed", base=base)
    other = finetune(tmp_path / "other", base, seed=2)
    with pytest.raises(
        CheckpointError, match=r"whose .* has the digest [0-9a-f]{32}, but in .*other it has [0-9a-f]{32}"
    ):
        freebits.load(tmp_path / "packed", base=other)
    with pytest.raises(CheckpointError, match="digest"):
        freebits.load(tmp_path / "packed", base=other, verify=False)
    finetune(
        tmp_path / "wider", base, change=lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()})
    )
    with pytest.raises(CheckpointError, match=r"needs a base whose .* is BF16\[.*but in .*wider it is F32"):
        freebits.load(tmp_path / "packed", base=tmp_path / "wider")


def test_tensors_without_a_partner_are_coded_alone(base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:8]])
        tensors["new.weight"] = embedding.clone()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    model = finetune(tmp_path / "model", base, change=change)
    facts = freebits.pack(model, tmp_path / "packed", base=base)
    n_matrices = sum(len(spec.shape) > 1 for spec in Checkpoint(base).specs.values())
    assert facts["base"]["tensors"] == n_matrices
    freebits.unpack(tmp_path / "packed", tmp_path / "plain")
    assert content_of(tmp_path / "plain") == content_of(model)


def test_a_base_can_be_packed_itself(base: Path, tmp_path: Path) -> None:
    model = finetune(tmp_path / "model", base)
    freebits.pack(base, tmp_path / "packed base", codec="none")
    freebits.pack(model, tmp_path / "packed", base=tmp_path / "packed base")
    freebits.unpack(tmp_path / "packed", tmp_path / "plain")
    assert content_of(tmp_path / "plain") == content_of(model)


def test_tensors_that_machines_round_differently_are_no_partners(base: Path, tmp_path: Path, slice_tiny: Make) -> None:
    sliced = slice_tiny(base)
    freebits.pack(sliced, tmp_path / "bits-back", codec="bits-back")
    facts = freebits.pack(sliced, tmp_path / "packed", base=tmp_path / "bits-back")
    reproducible = PackedFolder(tmp_path / "bits-back").is_reproducible
    recorded = Manifest.read(tmp_path / "packed").base
    assert recorded is not None
    names = {tensor.name for tensor in recorded.tensors.values()}
    assert facts["base"]["tensors"] == len(names) > 0
    assert all(map(reproducible, names))
    assert not all(map(reproducible, PackedFolder(tmp_path / "bits-back").specs))


@pytest.mark.parametrize("choice", ["first", "previous"])
def test_checkpoints_of_a_run_are_packed_together(choice: str, base: Path, tmp_path: Path) -> None:
    models = [base]
    for number in range(3):
        models.append(finetune(tmp_path / f"step-{number}", models[-1], seed=number))
    out = tmp_path / "out"
    assert main(["pack", *map(str, models), str(out), "--base", choice]) == 0
    for model in models:
        freebits.unpack(out / model.name, tmp_path / f"plain {model.name}")
        assert content_of(tmp_path / f"plain {model.name}") == content_of(model)
    chain = freebits.inspect(out / "step-2")["base"]["chain"]
    assert chain == (["../base"] if choice == "first" else ["../step-1", "../step-0", "../base"])
    later = finetune(tmp_path / "step-3", models[-1])
    before = {model.name: (out / model.name / "freebits.json").stat().st_mtime_ns for model in models}
    assert main(["pack", *map(str, models), str(later), str(out), "--base", choice]) == 0
    assert before == {model.name: (out / model.name / "freebits.json").stat().st_mtime_ns for model in models}
    assert "base" in freebits.inspect(out / "step-3")
    whole = freebits.pack(out / "step-2", tmp_path / "whole", base="none")
    assert "base" not in whole
    freebits.unpack(tmp_path / "whole", tmp_path / "plain whole")
    assert content_of(tmp_path / "plain whole") == content_of(models[-1])


def test_the_result_is_the_same_on_threads(base: Path, tmp_path: Path) -> None:
    model = finetune(tmp_path / "model", base)
    for jobs in (1, 2):
        freebits.pack(model, tmp_path / f"jobs {jobs}", base=base, parallel=Parallel(jobs=jobs))
    assert content_of(tmp_path / "jobs 1") == content_of(tmp_path / "jobs 2")


def test_a_stopped_run_is_resumed_only_with_the_same_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = finetune(tmp_path / "model", base), tmp_path / "packed"
    freebits.pack(model, tmp_path / "expected", base=base)
    encode, calls = Delta.encode, list[str]()

    def stopped(self: Delta, tensors: Any, makes: Any) -> Any:
        calls.append(str(makes))
        if len(calls) == 9:
            raise KeyboardInterrupt
        return encode(self, tensors, makes)

    monkeypatch.setattr(Delta, "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        freebits.pack(model, out, base=base)
    assert not out.exists()
    freebits.pack(model, out, base=base)
    n_tensors = len(Checkpoint(model).specs)
    assert len(calls) == 9 + n_tensors - 8  # eight tensors were finished
    assert content_of(out) == content_of(tmp_path / "expected")
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        freebits.pack(model, tmp_path / "again", base=base)
    os.utime(base / "model.safetensors", ns=(0, 0))
    freebits.pack(model, tmp_path / "again", base=base)
    assert len(calls) == 9 + n_tensors


def test_a_chain_has_at_most_eight_bases(base: Path, tmp_path: Path) -> None:
    out = [base]
    for number in range(BASES):
        out.append(tmp_path / f"packed {number}")
        freebits.pack(base, out[-1], base=out[-2])
    assert len(freebits.inspect(out[-1])["base"]["chain"]) == BASES
    freebits.load(out[-1])
    with pytest.raises(CheckpointError, match=r"packed 7 needs 8 or more bases"):
        freebits.pack(base, tmp_path / "one more", base=out[-1])


def test_a_cycle_of_bases_is_refused(base: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    freebits.pack(finetune(tmp_path / "model", base), packed, base=base)
    redigest(packed, lambda manifest: manifest["base"].update(model="../packed"))
    with pytest.raises(CheckpointError, match="one of the bases may be its own base"):
        freebits.load(packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "bits-back"}, "takes no base"),
        ({"base": "missing"}, "is not a folder"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises((UsageError, CheckpointError), match=message):
        freebits.pack(base, tmp_path / "packed", **{"base": base, **options})
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 3),
        ("model", "a\0b"),
        ("revision", "main"),
        ("revision", "0" * 40),
        ("tensors", []),
        ("tensors", {"x": ["y", "F16[2]"]}),
        ("tensors", {"x": ["y", "F16[-2]", "0"]}),
        ("tensors", {"x": [["y"], "F16[2]", "0"]}),
        ("tensors", {}),
        ("surplus", 1),
    ],
)
def test_a_wrong_base_in_the_manifest_is_refused(key: str, value: object, base: Path, tmp_path: Path) -> None:
    freebits.pack(finetune(tmp_path / "model", base), tmp_path / "packed", base=base)
    redigest(tmp_path / "packed", lambda manifest: manifest["base"].update({key: value}))
    with pytest.raises(CheckpointError):
        freebits.inspect(tmp_path / "packed")


def test_folders_without_a_base_do_not_mention_one(base: Path, tmp_path: Path) -> None:
    freebits.pack(base, tmp_path / "packed", codec="none")
    assert "base" not in json.loads((tmp_path / "packed" / "freebits.json").read_text())
    with pytest.raises(CheckpointError, match="has no base"):
        _ = PackedFolder(tmp_path / "packed").base


LOSSY: dict[str, Any] = {"calibration": random_text(600), "samples": 8, "seq_len": 32}


def test_the_differences_from_a_base_are_rounded(base: Path, tmp_path: Path) -> None:
    """At the same bits per weight, rounding the differences loses less than rounding the matrices."""
    model = finetune(tmp_path / "model", base)
    whole = freebits.quantize(model, tmp_path / "whole", bits=2, **LOSSY)
    facts = freebits.quantize(model, tmp_path / "packed", base=base, bits=2, **LOSSY)
    assert facts["base"]["chain"] == ["../base"]
    assert facts["coverage"]["share"] == whole["coverage"]["share"]
    expected = freebits.load(model).state_dict()
    errors = []
    for folder in ("whole", "packed"):
        state = freebits.load(tmp_path / folder).state_dict()
        errors.append(
            sum(float((state[name].double() - tensor.double()).square().sum()) for name, tensor in expected.items())
        )
    assert errors[1] < errors[0] / 1000
    loaded = freebits.load(tmp_path / "packed", keep_integers=True)
    state = freebits.load(tmp_path / "packed").state_dict()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(UnsupportedModelError, match="unpack"):
        freebits.recover(tmp_path / "packed", tmp_path / "out", against=model)


def test_error_compensation_includes_the_rounding_of_the_sum() -> None:
    """The sum of base and difference is rounded to bfloat16, which is coarse compared with the differences."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(96, 64, generator=generator).bfloat16()
    tensor = (base.float() + 4e-3 * torch.randn(96, 64, generator=generator)).bfloat16()
    inputs = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    U, difference = inverse_factor(inputs.T @ inputs, 0.01), tensor.float() - base.float()
    losses = []
    for added_to in (None, base):
        arguments = torch.full((96,), 2e-3).double(), U.diagonal() / U.diagonal().mean(), 1.0, 0, added_to
        rounded = scaled_integers(difference, U, *arguments)
        values = rounded.integers * scales_of(rounded.rows)[:, None] * scales_of(rounded.columns)
        error = (base.float() + values).bfloat16().float() - tensor.float()
        losses.append((inputs @ error.T).square().sum().item())
    assert losses[1] < 0.8 * losses[0]


def test_tensors_equal_to_those_of_the_base_stay_equal(base: Path, tmp_path: Path) -> None:
    """Frozen matrices take almost no bytes, and come back bit for bit."""
    original = load_file(base / "model.safetensors")
    frozen = [name for name in original if "mlp" in name]
    model = finetune(tmp_path / "model", base, change=lambda tensors: tensors.update({n: original[n] for n in frozen}))
    freebits.quantize(model, tmp_path / "packed", base=base, bits=0.5, trellis=0, **LOSSY)
    packed = PackedFolder(tmp_path / "packed")
    for name in frozen:
        assert torch.equal(packed[name], original[name]), name
    assert packed.manifest.history[-1]["share"] < 1


def test_a_target_size_counts_what_the_manifest_says_of_the_base(base: Path, tmp_path: Path) -> None:
    model = finetune(tmp_path / "model", base)
    for size in (34_000, 42_000):
        out = tmp_path / str(size)
        facts = freebits.quantize(model, out, base=base, target_size=size, **LOSSY)
        assert 0.8 * size < facts["bytes"]["packed"] <= size


def test_compress_takes_a_base(base: Path, tmp_path: Path) -> None:
    model = finetune(tmp_path / "model", base)
    facts = freebits.compress(model, tmp_path / "exact", base=base, lossless=True)
    assert facts["base"]["chain"] == ["../base"]
    assert facts["fidelity"]["fidelity"] == "bit-exact"
    texts = random_text(4000), random_text(600, seed=1)
    facts = freebits.compress(model, tmp_path / "packed", base=base, max_kl=1e-4, calibration=texts[0], text=texts[1])
    assert facts["base"]["chain"] == ["../base"]
    assert facts["fidelity"]["mean_kl"] <= 1e-4


def test_pieces_of_a_large_matrix_are_added_to_the_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freebits.quantization.sensitivity_cache._MAX_WEIGHTS", 1000)
    model = finetune(tmp_path / "model", base)
    freebits.quantize(model, tmp_path / "packed", base=base, bits=4, **LOSSY)
    packed, expected = PackedFolder(tmp_path / "packed"), Checkpoint(model)
    assert any(recipe.code == "joined" for recipe in packed.manifest.recipes)
    for name in expected.specs:
        assert (packed[name].float() - expected[name].float()).norm() < 2 * STEP * expected[name].numel() ** 0.5, name
