"""Models that differ from Llama give the logits of transformers, and nearly all of their weights are quantized."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import freebits
from freebits.calibration.engine import Engine
from freebits.calibration.groups import RunningModel
from freebits.calibration.streamed import window_logits
from freebits.execution.executor import Parallel
from freebits.execution.work_store import Work, WorkStore
from freebits.integrations.naming import TransformersView
from freebits.quantization.measuring import measure_matrices
from freebits.storage.checkpoint import Checkpoint
from freebits.types import CPU
from tests.model_types import plain_logits, random_text, save_tiny_type
from tests.tiny import Make, change_config

TOKENS = torch.randint(5, 250, (2, 32), generator=torch.Generator().manual_seed(0))
TEXT = random_text(700)
TYPES = {
    "bloom": "attention that multiplies activations by baddbmm",
    "dbrx": "experts stacked by rows in one matrix",
    "deepseek_v3": "low-rank attention, a router with a correction",
    "dory": "blocks that run several times",
    "falcon_h1": "attention and Mamba in the same block",
    "gemma3n_text": "per-layer embeddings, shared key-value states",
    "gpt2": "matrices stored as (inputs, outputs)",
    "gpt_oss": "stacked experts with biases",
    "granitemoehybrid": "Mamba blocks and a mixture",
    "lfm2": "short convolutions",
    "llama4_text": "experts multiplied all at once",
    "mamba2": "no attention, an infinity in its config",
    "opt": "position embeddings, dropout that must be off",
    "qwen3_next": "linear attention, a mixture with a shared expert",
    "recurrent_gemma": "a linear recurrence",
    "zamba": "blocks that share a transformer",
}
"""Model type → what is special about it."""


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_type(request.param, tmp_path_factory.mktemp("type") / "dense")


@pytest.mark.parametrize("folder", TYPES, indirect=True)
class TestType:
    """Tests of one tiny model of each type."""

    def test_the_engine_gives_the_logits_of_transformers(self, folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder)
        engine = Engine(TransformersView(Checkpoint(folder), config), config, torch.device("cpu"), max_resident_bytes=0)
        expected = plain_logits(folder, TOKENS)[:, :-1]
        actual = torch.stack(list(engine.logits(TOKENS)))
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()

    def test_nearly_all_weights_are_quantized(self, folder: Path, tmp_path: Path) -> None:
        facts = freebits.quantize(folder, tmp_path / "q", bits=8, calibration=TEXT, samples=8, seq_len=64)
        assert facts["coverage"]["share"] > 0.9
        freebits.unpack(tmp_path / "q", tmp_path / "plain")
        before, after = Checkpoint(folder), Checkpoint(tmp_path / "plain")
        assert before.specs == after.specs
        changed = sum(spec.numel for name, spec in before.specs.items() if not torch.equal(before[name], after[name]))
        assert changed > 0.9 * sum(spec.numel for spec in before.specs.values())
        assert relative_error(plain_logits(folder, TOKENS), plain_logits(tmp_path / "plain", TOKENS)) < 0.35


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the deviations of `expected` from its mean."""
    return ((actual - expected).norm() / (expected - expected.mean((0, 1))).norm()).item()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_both_layouts_of_a_mixture_have_the_same_coverage(model_type: str, tmp_path: Path) -> None:
    shares = []
    for original in (True, False):
        dense = save_tiny_type(model_type, tmp_path / f"dense-{original}", original_format=original)
        out = tmp_path / f"q-{original}"
        facts = freebits.quantize(dense, out, bits=8, calibration=TEXT, samples=8, seq_len=64)
        shares.append(facts["coverage"]["share"])
        assert relative_error(plain_logits(dense, TOKENS), packed_logits(out)) < 0.35
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)


def packed_logits(path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits


def set_tensor(folder: Path, name: str, tensor: Tensor) -> None:
    """Add a tensor to a checkpoint, or replace the tensor of that name."""
    state = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_stored_head_is_used_even_if_the_config_ties_it(save_tiny: Make) -> None:
    folder = save_tiny(tie_word_embeddings=True, dtype=torch.float32)
    set_tensor(folder, "lm_head.weight", torch.randn(96, 32, generator=torch.Generator().manual_seed(3)))
    tokens = TOKENS % 96
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    actual = torch.stack(list(window_logits(folder, tokens)))
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_infinite_or_nan_weight_is_refused_even_if_no_text_uses_it(value: float, save_tiny: Make) -> None:
    folder = save_tiny()
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    table[95, 3] = value
    set_tensor(folder, "model.embed_tokens.weight", table)
    text = " ".join(f"w{number % 90}" for number in range(400))
    with pytest.raises(freebits.CheckpointError, match=r"model\.embed_tokens\.weight has 1 weights"):
        freebits.quantize(folder, folder.with_name("q"), calibration=text, samples=4, seq_len=32)
    assert not folder.with_name("q").exists()


def test_a_text_with_fewer_windows_than_requested_gives_a_warning(
    save_tiny: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder, text = save_tiny(), " ".join(f"w{number % 96}" for number in range(100))
    freebits.quantize(folder, folder.with_name("q"), calibration=text, samples=32, seq_len=32)
    assert "3 windows of 32 tokens" in caplog.text


def test_a_first_token_outside_the_vocabulary_is_refused(save_tiny: Make) -> None:
    folder = save_tiny()
    change_config(folder, bos_token_id=1000)
    with pytest.raises(freebits.UsageError, match="1000"):
        freebits.quantize(folder, folder.with_name("q"), samples=2, seq_len=8)


def test_coverage_lists_what_is_not_quantized_and_what_is_not_calibrated(save_tiny: Make) -> None:
    folder = save_tiny()
    set_tensor(folder, "table", torch.zeros(200, 300, dtype=torch.int16))
    set_tensor(folder, "vision.weight", torch.randn(200, 300).half())
    facts = freebits.quantize(folder, folder.with_name("q"), calibration="w1 w2 " * 200, samples=4, seq_len=32)
    assert facts["coverage"]["share"] < 0.9
    assert facts["coverage"]["left"][0] == {"tensors": "table", "weights": 60000, "reason": "its dtype is I16"}
    assert facts["coverage"]["alone"][0]["tensors"] == "vision.weight"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_routers_are_recognized(model_type: str, tmp_path: Path) -> None:
    folder = save_tiny_type(model_type, tmp_path / "dense")
    running = RunningModel(folder, CPU)
    with Parallel(jobs=1).executor() as executor:
        work = Work(executor, WorkStore(tmp_path / "store"))
        measurements = measure_matrices(running, TOKENS, work, 0, None, lambda *_: None)
    routers = {name for name in Checkpoint(folder).specs if name.endswith((".gate.weight", ".router.weight"))}
    assert routers
    assert measurements.router_tensors == routers


def test_an_infinity_in_a_config_is_kept(tmp_path: Path) -> None:
    dense = save_tiny_type("mamba2", tmp_path / "dense")
    assert "__float__" in (dense / "config.json").read_text()
    freebits.compress(dense, tmp_path / "exact", lossless=True)
    assert freebits.load(tmp_path / "exact").config.time_step_limit[1] == float("inf")
    assert freebits.estimate(dense)["bytes"]["dense"] > 0
