"""Models whose matrices stay integers in memory."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import freebits
from freebits.codecs.integers import Integers, ScaledIntegers
from freebits.codecs.trellis import transitions
from freebits.errors import CheckpointError, UsageError
from freebits.integrations.integer_blocks import GROUP, IntegerBlock
from freebits.integrations.integer_layers import IntegerEmbedding, IntegerLinear, IntegerMatrix
from freebits.packed.reader import PackedFolder
from freebits.types import TensorSpec
from tests.conftest import Build
from tests.model_types import save_tiny_type
from tests.tiny import Make, random_text

TOKENS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def random_blocks(
    sizes: list[int], m: int, seed: int, n_outliers: int = 0, largest: int = 127, n_states: int = 0
) -> list[ScaledIntegers]:
    """Return random matrices, (n, m) for each `n` in `sizes`. The first has integers that do not fit 8 bits.

    If `n_states` is not 0, the columns are paths through a trellis with this number of states.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks: list[ScaledIntegers] = []
    for n in sizes:
        integers = torch.randint(-largest, largest + 1, (n, m), generator=generator, dtype=torch.int32)
        if not blocks:
            places = torch.randint(n * m, (n_outliers,), generator=generator)
            integers.view(-1)[places] = torch.randint(-1000, 1000, (n_outliers,), generator=generator).int()
        following, states = torch.from_numpy(transitions(n_states)), torch.zeros(m, dtype=torch.int64)
        for row in integers if n_states else ():
            symbols, odd_states = row.clone(), states & 1
            row.copy_(2 * symbols + odd_states)
            states = following[states, symbols & 1].long()
        scales = (torch.randint(-80, -20, (size,), generator=generator).short() for size in (n, m))
        blocks.append(ScaledIntegers(integers, *scales))
    return blocks


def filled(blocks: list[ScaledIntegers], n_states: int = 0) -> IntegerMatrix:
    matrix = IntegerMatrix([len(block.rows) for block in blocks], len(blocks[0].columns), torch.float32)
    encoded = Integers(n_states).encode(
        [tensor for block in blocks for tensor in (block.integers, block.rows, block.columns)], []
    )
    makes = [TensorSpec("F32", tuple(block.integers.shape)) for block in blocks]
    for chunk in Integers().chunks(encoded.parts, makes, encoded.params, GROUP):
        matrix.blocks[chunk.index].add(chunk)
    for block in matrix.blocks:
        block.finish()
    return matrix


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    m=st.integers(1, 70),
    k=st.integers(1, 20),
    n_outliers=st.integers(0, 3),
    largest=st.sampled_from([7, 40]),
    n_states=st.sampled_from([0, 4, 32, 256]),
    seed=st.integers(0, 9),
)
def test_products_and_lookups_are_those_of_the_expanded_matrix(
    sizes: list[int], m: int, k: int, n_outliers: int, largest: int, n_states: int, seed: int
) -> None:
    blocks = random_blocks(sizes, m, seed, n_outliers, largest, n_states)
    matrix = filled(blocks, n_states)
    for block in matrix.blocks[1:]:
        assert bool(block.nibbles.numel()) == (not block.integers.numel())
        assert block.nibbles.numel() or largest > 7
    W = torch.cat([block.floats(torch.float32) for block in blocks])
    assert torch.allclose(matrix.floats(), W, rtol=1e-6)
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, n, generator=generator) for n in (m, len(W)))
    assert_close(matrix.product(x), x @ W.T)
    assert_close(matrix.transposed_product(y), y @ W)
    numbers = torch.randint(len(W), (2, k), generator=generator)
    assert torch.allclose(matrix.lookup(numbers), W[numbers], rtol=1e-6)
    assert torch.equal(copy.deepcopy(matrix).half().floats(), matrix.floats().half())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-12)


def test_a_matrix_with_many_large_integers_is_not_accepted() -> None:
    assert filled(random_blocks([30], 40, 0)).fits
    assert not filled(random_blocks([30], 40, 0, 100)).fits


@pytest.fixture
def quantized(save_tiny: Make, cached_folder: Callable[[object, Build], Path]) -> Path:
    dense = save_tiny(attention_bias=True, mlp_bias=True, hidden_size=64, tie_word_embeddings=True)

    def build(folder: Path) -> None:
        freebits.quantize(dense, folder, bits=3, calibration=random_text(900), samples=8, seq_len=32)

    return cached_folder("quantized to integers", build)


def blocks_of(model: Any) -> list[IntegerBlock]:
    return [module for module in model.modules() if isinstance(module, IntegerBlock)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS).logits.float()
        return result


def expanded(model: Any, path: Path) -> Any:
    """Return the model in `path` in float32, with the unrounded weights of the integer layers of `model`."""
    result = freebits.load(path, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, IntegerLinear | IntegerEmbedding):
            module.matrix.dtype = torch.float32
            result.get_submodule(name).weight.data = module.weight
    return result


def test_all_matrices_stay_integers(quantized: Path) -> None:
    model = freebits.load(quantized, keep_integers=True)
    assert {bool(block.nibbles.numel()) for block in blocks_of(model)} == {True, False}
    assert all(bool(block.nibbles.numel()) != bool(block.integers.numel()) for block in blocks_of(model))
    assert all(parameter.dim() == 1 for parameter in model.parameters())
    assert not [module for module in model.modules() if type(module) in (nn.Linear, nn.Embedding)]
    assert model.lm_head.matrix is model.model.embed_tokens.matrix


def test_the_logits_are_those_of_the_expanded_model(quantized: Path) -> None:
    model = freebits.load(quantized, dtype=torch.float32, keep_integers=True)
    exact = logits(expanded(model, quantized))
    assert_close(logits(model), exact)
    errors = [
        (logits(freebits.load(quantized, dtype=torch.bfloat16, keep_integers=kept)) - exact).norm()
        for kept in (True, False)
    ]
    assert errors[0] < 1.2 * errors[1]


def test_a_model_that_stays_packed_gives_the_same_logits_and_holds_no_integers(quantized: Path) -> None:
    kept = freebits.load(quantized, dtype=torch.float32, keep_integers=True)
    packed = freebits.load(quantized, dtype=torch.float32, stay_packed=True)
    for _ in range(2):
        assert torch.equal(logits(packed), logits(kept))
        assert not any(buffer.numel() for module in blocks_of(packed) for buffer in module.buffers())


def test_a_model_that_stays_packed_runs_in_threads_and_has_no_weights_outside_a_forward_pass(quantized: Path) -> None:
    packed = freebits.load(quantized, dtype=torch.float32, stay_packed=True)
    with ThreadPoolExecutor(3) as executor:
        first, *others = executor.map(lambda _: logits(packed), range(9))
    assert all(torch.equal(first, other) for other in others)
    with pytest.raises(UsageError, match="keep_integers"):
        _ = packed.lm_head.weight


def test_a_model_that_stays_packed_can_be_run_again_after_an_error(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = freebits.load(quantized, dtype=torch.float32, stay_packed=True)
    expected = logits(packed)

    def fail(*_: object) -> None:
        raise CheckpointError("a file cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(PackedFolder, "integer_chunks", fail)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="a file cannot be read"):
                logits(packed)
    assert torch.equal(logits(packed), expected)


def test_layers_of_integers_accept_what_ordinary_layers_accept(quantized: Path) -> None:
    model = freebits.load(quantized, keep_integers=True)
    assert "IntegerEmbedding" in repr(model)
    assert not any(module.training for module in model.modules())
    embedding, layer = model.get_input_embeddings(), model.lm_head
    assert torch.equal(embedding(torch.tensor(3)), embedding(torch.tensor([3]))[0])
    assert layer(input=torch.ones(64)).shape == (layer.out_features,)
    assert embedding(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 64)
    for index in (-1, len(embedding.weight)):
        with pytest.raises(IndexError):
            embedding(torch.tensor([index]))


def test_matrices_of_large_integers_are_expanded(
    save_tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    freebits.quantize(save_tiny(), tmp_path / "out", bits=10, calibration=random_text(900), samples=8, seq_len=32)
    kept = freebits.load(tmp_path / "out", dtype=torch.float32, keep_integers=True)
    assert "do not fit 8 bits" in caplog.text
    assert_close(logits(kept), logits(expanded(kept, tmp_path / "out")))
    packed = freebits.load(tmp_path / "out", dtype=torch.float32, stay_packed=True)  # does not round to float16
    assert (logits(packed) - logits(kept)).norm() < 0.01 * logits(kept).norm()


def test_generation_with_beams_and_batches_gives_the_same_tokens(quantized: Path) -> None:
    kept = AutoModelForCausalLM.from_pretrained(quantized, keep_integers=True, dtype=torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(kept.generate(TOKENS, **options), expanded(kept, quantized).generate(TOKENS, **options))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
def test_an_adapter_can_be_trained_on_top(quantized: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = freebits.load(quantized, dtype=torch.float32, keep_integers=True)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.Adam([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = peft(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_another_dtype_does_not_round_the_scales() -> None:
    matrix = filled(random_blocks([12, 5], 9, 0, 2))
    W = matrix.floats()
    assert torch.equal(matrix.half().floats(), W.half())
    assert matrix.dtype == torch.float16
    block = matrix.blocks[0]
    assert {block.rows.dtype, block.columns.dtype, block.outlier_values.dtype} == {torch.float32}


def test_gradients_are_those_of_the_expanded_layer() -> None:
    blocks = random_blocks([12, 5], 9, 0, 2)
    layer = IntegerLinear(filled(blocks), None)
    expanded = nn.Linear(9, 17, bias=False)
    expanded.weight.data = layer.weight
    x = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0))
    gradients: list[Tensor] = []
    for module in (layer, expanded):
        inputs = x.clone().requires_grad_()
        gradients += torch.autograd.grad(module(inputs).square().sum(), inputs)
    assert_close(*gradients)


def test_saving_copies_the_packed_folder_unless_a_parameter_changed(quantized: Path, tmp_path: Path) -> None:
    model = freebits.load(quantized, keep_integers=True)
    model.save_pretrained(tmp_path / "saved")
    PackedFolder(tmp_path / "saved").check()
    assert (tmp_path / "saved" / "freebits.json").read_bytes() == (quantized / "freebits.json").read_bytes()
    next(model.parameters()).data += 1
    with pytest.raises(UsageError, match="changed since loading"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_experts_that_transformers_merges_are_expanded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense, out = save_tiny_type("mixtral", tmp_path / "dense"), tmp_path / "out"
    freebits.quantize(dense, out, bits=3, calibration=random_text(900), samples=8, seq_len=32)
    kept = freebits.load(out, dtype=torch.float32, keep_integers=True)
    assert "quantized matrices are expanded in memory" in caplog.text
    assert_close(logits(kept), logits(expanded(kept, out)))
    assert [module for module in kept.modules() if isinstance(module, IntegerLinear)]


def test_compiled_models_give_the_same_logits(quantized: Path) -> None:
    model = freebits.load(quantized, dtype=torch.float32, keep_integers=True)
    assert isinstance(model.get_input_embeddings(), IntegerEmbedding)
    assert_close(logits(torch.compile(model, backend="eager")), logits(model))
