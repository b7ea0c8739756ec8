"""The engine runs a model block by block with the results of transformers. Its statistics agree with autograd."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from freebits.calibration.engine import Engine
from freebits.calibration.groups import RunningModel
from freebits.calibration.observers import Product, Products, Region
from freebits.calibration.sensitivities import (
    MIN_EXPERT_VECTORS,
    InputStatistics,
    Sums,
    fisher_information,
    gram,
    measure,
    mix_experts,
)
from freebits.errors import CheckpointError
from freebits.execution.executor import Parallel
from freebits.execution.work_store import Work, WorkStore
from freebits.integrations.naming import TransformersView
from freebits.quantization.measuring import measure_matrices
from freebits.storage.checkpoint import Checkpoint
from tests.tiny import Make

CPU = torch.device("cpu")
WINDOWS = torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(0))
MIXTURE = {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}


def engine_of(folder: Path, **options: Any) -> Engine:
    config = AutoConfig.from_pretrained(folder)
    return Engine(TransformersView(Checkpoint(folder), config), config, CPU, **options)


def transformers_logits(folder: Path) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=WINDOWS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "gpt2"}, MIXTURE])
@pytest.mark.parametrize("max_resident_bytes", [0, 2**30])
def test_the_logits_are_those_of_transformers(
    changes: dict[str, Any], max_resident_bytes: int, save_tiny: Make
) -> None:
    folder = save_tiny(**changes)
    engine = engine_of(folder, max_resident_bytes=max_resident_bytes)
    expected = transformers_logits(folder)[:, :-1]
    actual = torch.stack(list(engine.logits(WINDOWS)))
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_between_runs_only_the_norms_of_a_large_model_are_in_memory(save_tiny: Make) -> None:
    engine = engine_of(save_tiny(), max_resident_bytes=0)
    list(engine.logits(WINDOWS))
    parameters = engine.model.named_parameters()
    loaded = {name for name, parameter in parameters if not parameter.is_meta and any(parameter.stride())}
    assert loaded == {"model.norm.weight"}


def test_a_missing_tensor_is_named(save_tiny: Make) -> None:
    folder = save_tiny()

    class IncompleteCheckpoint(Checkpoint):
        @property
        def specs(self) -> Any:
            return {name: spec for name, spec in super().specs.items() if "layers.1.mlp.up_proj" not in name}

    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        Engine(TransformersView(IncompleteCheckpoint(folder), config), config, CPU)


def statistics_from_autograd(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return mean outer products of inputs and sums of squared gradients at outputs, from hooks on the model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    grams, squares = dict[str, Tensor](), dict[str, Tensor]()

    def hook(name: str) -> Any:
        def run(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows = args[0].detach().flatten(0, -2)
            grams[name] = rows.T @ rows / len(rows)
            output.register_hook(lambda g: squares.__setitem__(name, g.flatten(0, -2).double().square().sum(0)))

        return run

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_hook(hook(f"{name}.weight"))
    logits = model(input_ids=WINDOWS, use_cache=False).logits
    loss = logits.new_zeros(())
    for number, row in enumerate(logits[:, :-1]):
        loss = loss + nn.functional.cross_entropy(row, sampled_labels(row, number), reduction="sum")
    loss.backward()
    return grams, squares


def sampled_labels(logits: Tensor, number: int) -> Tensor:
    from freebits.calibration.self_generated import sample_tokens

    return sample_tokens(logits.detach().softmax(-1), torch.Generator().manual_seed(number))[:, 0]


@pytest.mark.parametrize("options", [{}, {"max_resident_bytes": 0, "max_stream_bytes": 0}])
def test_the_statistics_agree_with_autograd(options: dict[str, int], save_tiny: Make, tmp_path: Path) -> None:
    folder = save_tiny(num_key_value_heads=2)
    expected_grams, expected_squares = statistics_from_autograd(folder)
    grams: dict[str, Tensor] = {}

    def finish(_: int, inputs: list[InputStatistics]) -> None:
        by_name = {region.name: statistics for statistics in inputs for region in statistics.regions}
        grams.update({name: statistics.gram for name, statistics in by_name.items()})
        keys = {name.rpartition(".")[0].rpartition(".")[2]: statistics.key for name, statistics in by_name.items()}
        assert keys["q_proj"] == keys["k_proj"] == keys["v_proj"] != keys["o_proj"]
        assert keys["gate_proj"] == keys["up_proj"]

    sums = measure(engine_of(folder, **options), WINDOWS, 0, 0, tmp_path, finish, lambda *_: None)
    assert grams.keys() == expected_grams.keys()
    for name, expected in expected_grams.items():
        assert (grams[name] - expected).norm() <= 1e-4 * expected.norm(), name
    squares = {region.name: square for region, square in sums.squares.items()}
    assert squares.keys() == expected_squares.keys()
    for name, expected in expected_squares.items():
        assert (squares[name] - expected).norm() <= 1e-3 * expected.norm(), name
    assert not [*tmp_path.glob("tmp*")]


@pytest.mark.parametrize("changes", [{}, MIXTURE])
def test_the_statistics_do_not_depend_on_the_size_of_groups_of_windows(
    changes: dict[str, Any], save_tiny: Make, tmp_path: Path
) -> None:
    running = RunningModel(save_tiny(**changes), CPU)
    measured = {}
    for name, max_activation_bytes in (("one group", 2**31), ("four groups", 1)):
        with Parallel(jobs=1).executor() as executor:
            work = Work(executor, WorkStore(tmp_path / name))
            measured[name] = measure_matrices(
                running, WINDOWS, work, 0, None, lambda *_: None, max_activation_bytes=max_activation_bytes
            )
    one, four = ({(m.tensor, m.start): m for m in measured[name].matrices} for name in ("one group", "four groups"))
    assert one.keys() == four.keys()
    for key, matrix in one.items():
        other = four[key]
        assert matrix.information is not None
        assert other.information is not None
        assert matrix.factor is not None
        assert other.factor is not None
        assert (matrix.information - other.information).norm() <= 1e-3 * matrix.information.norm(), key
        diagonal = matrix.factor.diagonal
        assert (diagonal - other.factor.diagonal).norm() <= 1e-2 * diagonal.norm(), key


def products_of(run: Any, parameter: Tensor) -> list[Product]:
    """Return the products with a parameter that occur while `run` runs."""
    products: list[Product] = []
    address = parameter.untyped_storage().data_ptr()

    def find(tensor: Any) -> tuple[str, Tensor] | None:
        is_parameter = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() == address
        return ("p", parameter) if is_parameter else None

    with Products(find, products.append):
        run()
    return products


X = torch.randn(5, 7, 6)
CASES: Mapping[str, tuple[tuple[int, ...], Any, list[Region]]] = {
    "linear": ((4, 6), lambda P: linear(X, P), [Region("p", 0, 4, False)]),
    "an expert": ((3, 4, 6), lambda P: linear(X, P[1]), [Region("p", 4, 8, False)]),
    "an expert, transposed": ((3, 6, 4), lambda P: X @ P[2], [Region("p", 12, 18, True)]),
    "rows": ((8, 6), lambda P: linear(X, P[4:8]), [Region("p", 4, 8, False)]),
    "a transposed view": ((4, 6), lambda P: X @ P.T, [Region("p", 0, 4, False)]),
    "from the left": ((4, 7), lambda P: P @ X, [Region("p", 0, 4, False)]),
    "addmm": ((6, 4), lambda P: torch.addmm(torch.zeros(4), X[0], P), [Region("p", 0, 6, True)]),
    "bmm": ((5, 6, 4), lambda P: torch.bmm(X, P), [Region("p", 6 * e, 6 * e + 6, True) for e in range(5)]),
    "einsum": (
        (2, 6, 4),
        lambda P: torch.einsum("...i,hio->...ho", X, P),
        [Region("p", 6 * e, 6 * e + 6, True) for e in range(2)],
    ),
    "einsum over two": (
        (2, 3, 4),
        lambda P: torch.einsum("bthd,hdo->bto", X.view(5, 7, 2, 3), P),
        [Region("p", 0, 6, True)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_product_is_recognized_by_the_memory_of_its_matrix(name: str) -> None:
    shape, run, regions = CASES[name]
    P = torch.randn(shape)
    result = run(P)
    products = products_of(lambda: run(P), P)
    assert [product.region for product in products] == regions
    rows = P.reshape(-1, shape[-1])
    for product in products:
        region = product.region
        W = rows[region.start : region.stop]
        W = W.T if region.transposed else W
        assert torch.allclose(product.inputs @ W.T, product.select(result), atol=1e-5)


def test_only_a_product_with_a_complete_unscaled_matrix_is_recognized() -> None:
    P = torch.randn(4, 6)
    assert products_of(lambda: X @ X.mT, P) == []
    assert products_of(lambda: linear(X, 2 * P), P) == []
    assert products_of(lambda: linear(X[..., :3], P[:, :3]), P) == []  # only some columns of `P`


@pytest.mark.parametrize("m", [5, 1100])
def test_gram_returns_the_gram_matrix(m: int) -> None:
    x = torch.randn(30, m, dtype=torch.float64)
    assert torch.allclose(gram(x), x.T @ x)


def expert_statistics(number: int, n: int, scale: float) -> InputStatistics:
    return InputStatistics(
        str(number), (Region("layers.0.experts", 4 * number, 4 * number + 4, False),), n, scale * torch.eye(6)
    )


def test_statistics_of_experts_are_mixed_with_those_of_the_average_expert() -> None:
    mixed = mix_experts(
        [expert_statistics(0, 1000, 1.0), expert_statistics(2, 10, 5.0)], {"layers.0.experts": (4, 4, 6)}, "k"
    )
    by_expert = {region.start // 4: inputs for inputs in mixed for region in inputs.regions}
    assert by_expert.keys() == {0, 1, 2, 3}
    average = (1000 + 50) / 1010
    assert by_expert[1] is by_expert[3]
    assert math.isclose(by_expert[1].gram[0, 0].item(), average, rel_tol=1e-5)
    assert math.isclose(
        by_expert[2].gram[0, 0].item(), (50 + MIN_EXPERT_VECTORS * average) / (10 + MIN_EXPERT_VECTORS), rel_tol=1e-5
    )
    assert math.isclose(by_expert[0].gram[0, 0].item(), 1, rel_tol=0.01)


def test_statistics_of_matrices_that_are_not_experts_are_not_mixed() -> None:
    statistics = replace(expert_statistics(0, 3, 1.0), regions=(Region("layers.0.q_proj.weight", 0, 4, False),))
    [mixed] = mix_experts([statistics], {"layers.0.q_proj.weight": (4, 6), "layers.1.q_proj.weight": (4, 6)}, "k")
    assert mixed is statistics


def test_idle_experts_get_the_fisher_information_of_the_average_expert() -> None:
    regions = [Region("layers.0.experts", 4 * number, 4 * number + 4, False) for number in range(3)]
    squares = {
        regions[0]: torch.full((4,), 100.0, dtype=torch.float64),
        regions[1]: torch.zeros(4, dtype=torch.float64),
    }
    sums = Sums(1000, {regions[0]: 150, regions[1]: 50}, squares, {}, None, torch.zeros(()), 1.0, frozenset())
    information = fisher_information(sums, regions)
    added = 100 * MIN_EXPERT_VECTORS / 200
    for region, expected in zip(regions, (100 + added, added, added), strict=True):
        assert torch.allclose(information[region], torch.full((4,), expected / 1000, dtype=torch.float64))
