"""Models that are built otherwise than Llama: measured as transformers runs them, quantized nearly whole."""

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
    # type: why it is here
    "bloom": "its attention is a baddbmm of activations",
    "dbrx": "experts below each other in one matrix",
    "deepseek_v3": "low-rank attention, a router with a correction",
    "dory": "blocks that run several times",
    "falcon_h1": "attention and Mamba side by side",
    "gemma3n_text": "per-layer embeddings, shared key-value states",
    "gpt2": "matrices stored as (inputs, outputs)",
    "gpt_oss": "stacked experts with biases",
    "granitemoehybrid": "Mamba blocks and a mixture",
    "lfm2": "short convolutions",
    "llama4_text": "experts multiplied all at once",
    "mamba2": "no attention; an infinity in its config",
    "opt": "position embeddings; dropout that must not act",
    "qwen3_next": "linear attention, a mixture with a shared expert",
    "recurrent_gemma": "a linear recurrence",
    "zamba": "blocks that share a transformer",
}


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_type(request.param, tmp_path_factory.mktemp("type") / "dense")


@pytest.mark.parametrize("folder", TYPES, indirect=True)
class TestType:
    """One tiny model of a type."""

    def test_the_engine_gives_the_librarys_logits(self, folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder)
        engine = Engine(TransformersView(Checkpoint(folder), config), config, torch.device("cpu"), max_resident_bytes=0)
        expected = plain_logits(folder, TOKENS)[:, :-1]
        found = torch.stack(list(engine.logits(TOKENS)))
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()

    def test_nearly_all_of_it_is_quantized(self, folder: Path, tmp_path: Path) -> None:
        made = freebits.quantize(folder, tmp_path / "q", bits=8, calibration=TEXT, samples=8, seq_len=64)
        assert made["coverage"]["share"] > 0.9
        freebits.unpack(tmp_path / "q", tmp_path / "plain")
        before, after = Checkpoint(folder), Checkpoint(tmp_path / "plain")
        assert before.specs == after.specs
        changed = sum(spec.numel for name, spec in before.specs.items() if not torch.equal(before[name], after[name]))
        assert changed > 0.9 * sum(spec.numel for spec in before.specs.values())
        assert relative(plain_logits(folder, TOKENS), plain_logits(tmp_path / "plain", TOKENS)) < 0.35


def relative(expected: Tensor, found: Tensor) -> float:
    """The norm of a difference in norms of what varies."""
    return ((found - expected).norm() / (expected - expected.mean((0, 1))).norm()).item()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_both_layouts_of_a_mixture_are_quantized_alike(model_type: str, tmp_path: Path) -> None:
    shares = []
    for original in (True, False):
        dense = save_tiny_type(model_type, tmp_path / f"dense-{original}", original_format=original)
        out = tmp_path / f"q-{original}"
        made = freebits.quantize(dense, out, bits=8, calibration=TEXT, samples=8, seq_len=64)
        shares.append(made["coverage"]["share"])
        assert relative(plain_logits(dense, TOKENS), plain_logits_of_packed(out)) < 0.35
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)


def plain_logits_of_packed(path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits


def with_tensor(folder: Path, name: str, tensor: Tensor) -> None:
    state = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_beside_a_tied_config_is_the_head(save_tiny: Make) -> None:
    folder = save_tiny(tie_word_embeddings=True, dtype=torch.float32)
    with_tensor(folder, "lm_head.weight", torch.randn(96, 32, generator=torch.Generator().manual_seed(3)))
    tokens = TOKENS % 96
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    found = torch.stack(list(window_logits(folder, tokens)))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_no_text_reaches_and_is_not_finite_is_refused(value: float, save_tiny: Make) -> None:
    folder = save_tiny()
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    table[95, 3] = value
    with_tensor(folder, "model.embed_tokens.weight", table)
    text = " ".join(f"w{number % 90}" for number in range(400))
    with pytest.raises(freebits.CheckpointError, match=r"model\.embed_tokens\.weight has 1 weights"):
        freebits.quantize(folder, folder.with_name("q"), calibration=text, samples=4, seq_len=32)
    assert not folder.with_name("q").exists()


def test_less_text_than_asked_for_is_said(save_tiny: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder, text = save_tiny(), " ".join(f"w{number % 96}" for number in range(100))
    freebits.quantize(folder, folder.with_name("q"), calibration=text, samples=32, seq_len=32)
    assert "3 windows of 32 tokens" in caplog.text


def test_a_token_to_begin_with_outside_the_vocabulary_is_refused(save_tiny: Make) -> None:
    folder = save_tiny()
    change_config(folder, bos_token_id=1000)
    with pytest.raises(freebits.UsageError, match="1000"):
        freebits.quantize(folder, folder.with_name("q"), samples=2, seq_len=8)


def test_what_is_not_quantized_is_said(save_tiny: Make) -> None:
    folder = save_tiny()
    with_tensor(folder, "table", torch.zeros(200, 300, dtype=torch.int16))
    with_tensor(folder, "vision.weight", torch.randn(200, 300).half())
    made = freebits.quantize(folder, folder.with_name("q"), calibration="w1 w2 " * 200, samples=4, seq_len=32)
    assert made["coverage"]["share"] < 0.9
    assert made["coverage"]["left"][0] == {"tensors": "table", "weights": 60000, "reason": "its dtype is I16"}
    assert made["coverage"]["alone"][0]["tensors"] == "vision.weight"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_routers_stay_as_they_are(model_type: str, tmp_path: Path) -> None:
    folder = save_tiny_type(model_type, tmp_path / "dense")
    running = RunningModel(folder, CPU)
    with Parallel(jobs=1).executor() as executor:
        work = Work(executor, WorkStore(tmp_path / "store"))
        measured = measure_matrices(running, TOKENS, work, 0, None, lambda *_: None)
    routers = {name for name in Checkpoint(folder).specs if name.endswith((".gate.weight", ".router.weight"))}
    assert routers
    assert measured.router_tensors == routers


def test_an_infinity_in_a_config_survives(tmp_path: Path) -> None:
    dense = save_tiny_type("mamba2", tmp_path / "dense")
    assert "__float__" in (dense / "config.json").read_text()
    freebits.compress(dense, tmp_path / "exact", lossless=True)
    assert freebits.load(tmp_path / "exact").config.time_step_limit[1] == float("inf")
    assert freebits.estimate(dense)["bytes"]["dense"] > 0
