"""The engine runs a model as the library does, block by block; what it observes is what full autograd gives."""

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


def plain_logits(folder: Path) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=WINDOWS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "gpt2"}, MIXTURE])
@pytest.mark.parametrize("max_resident_bytes", [0, 2**30])
def test_logits_are_the_librarys(changes: dict[str, Any], max_resident_bytes: int, save_tiny: Make) -> None:
    folder = save_tiny(**changes)
    engine = engine_of(folder, max_resident_bytes=max_resident_bytes)
    expected = plain_logits(folder)[:, :-1]
    found = torch.stack(list(engine.logits(WINDOWS)))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_of_a_large_model_nothing_but_norms_is_in_memory_between_runs(save_tiny: Make) -> None:
    engine = engine_of(save_tiny(), max_resident_bytes=0)
    list(engine.logits(WINDOWS))
    held = {name for name, of in engine.model.named_parameters() if not of.is_meta and any(of.stride())}
    assert held == {"model.norm.weight"}


def test_a_missing_tensor_is_named(save_tiny: Make) -> None:
    folder = save_tiny()

    class Without(Checkpoint):
        @property
        def specs(self) -> Any:
            return {name: of for name, of in super().specs.items() if "layers.1.mlp.up_proj" not in name}

    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        Engine(TransformersView(Without(folder), config), config, CPU)


def by_autograd(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean outer products of inputs and sums of squared gradients at outputs, by hooks on the library's own model."""
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
        loss = loss + nn.functional.cross_entropy(row, labels(row, number), reduction="sum")
    loss.backward()
    return grams, squares


def labels(logits: Tensor, number: int) -> Tensor:
    from freebits.calibration.self_generated import sample_tokens

    return sample_tokens(logits.detach().softmax(-1), torch.Generator().manual_seed(number))[:, 0]


@pytest.mark.parametrize("options", [{}, {"max_resident_bytes": 0, "max_stream_bytes": 0}])
def test_what_is_observed_is_what_autograd_gives(options: dict[str, int], save_tiny: Make, tmp_path: Path) -> None:
    folder = save_tiny(num_key_value_heads=2)
    grams, squares = by_autograd(folder)
    found: dict[str, Tensor] = {}

    def finish(_: int, inputs: list[InputStatistics]) -> None:
        found.update({region.name: of.gram for of in inputs for region in of.regions})
        keys = {region.name.rpartition(".")[0].rpartition(".")[2]: of.key for of in inputs for region in of.regions}
        assert keys["q_proj"] == keys["k_proj"] == keys["v_proj"] != keys["o_proj"]
        assert keys["gate_proj"] == keys["up_proj"]

    sums = measure(engine_of(folder, **options), WINDOWS, 0, 0, tmp_path, finish, lambda *_: None)
    assert found.keys() == grams.keys()
    for name, expected in grams.items():
        assert (found[name] - expected).norm() <= 1e-4 * expected.norm(), name
    seen = {region.name: of for region, of in sums.squares.items()}
    assert seen.keys() == squares.keys()
    for name, expected in squares.items():
        assert (seen[name] - expected).norm() <= 1e-3 * expected.norm(), name
    assert not [*tmp_path.glob("tmp*")]


@pytest.mark.parametrize("changes", [{}, MIXTURE])
def test_groups_of_windows_add_up(changes: dict[str, Any], save_tiny: Make, tmp_path: Path) -> None:
    running = RunningModel(save_tiny(**changes), CPU)
    measured = {}
    for name, at_once in (("one", 2**31), ("four", 1)):
        with Parallel(jobs=1).executor() as executor:
            work = Work(executor, WorkStore(tmp_path / name))
            measured[name] = measure_matrices(
                running, WINDOWS, work, 0, None, lambda *_: None, max_activation_bytes=at_once
            )
    one, four = ({(m.tensor, m.start): m for m in measured[name].matrices} for name in ("one", "four"))
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
    found: list[Product] = []
    place = parameter.untyped_storage().data_ptr()

    def find(tensor: Any) -> tuple[str, Tensor] | None:
        here = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() == place
        return ("p", parameter) if here else None

    with Products(find, found.append):
        run()
    return found


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
    found = products_of(lambda: run(P), P)
    assert [product.region for product in found] == regions
    rows = P.reshape(-1, shape[-1])
    for product in found:
        region = product.region
        W = rows[region.start : region.stop]
        W = W.T if region.transposed else W
        assert torch.allclose(product.inputs @ W.T, product.select(result), atol=1e-5)


def test_a_product_of_two_activations_or_of_a_scaled_matrix_is_none() -> None:
    P = torch.randn(4, 6)
    assert products_of(lambda: X @ X.mT, P) == []
    assert products_of(lambda: linear(X, 2 * P), P) == []
    assert products_of(lambda: linear(X[..., :3], P[:, :3]), P) == []  # some of its columns


@pytest.mark.parametrize("m", [5, 1100])
def test_gram(m: int) -> None:
    x = torch.randn(30, m, dtype=torch.float64)
    assert torch.allclose(gram(x), x.T @ x)


def expert(number: int, n: int, scale: float) -> InputStatistics:
    return InputStatistics(
        str(number), (Region("layers.0.experts", 4 * number, 4 * number + 4, False),), n, scale * torch.eye(6)
    )


def test_experts_share_what_few_tokens_tell() -> None:
    found = mix_experts([expert(0, 1000, 1.0), expert(2, 10, 5.0)], {"layers.0.experts": (4, 4, 6)}, "k")
    by_region = {region.start // 4: of for of in found for region in of.regions}
    assert by_region.keys() == {0, 1, 2, 3}
    average = (1000 + 50) / 1010
    assert by_region[1] is by_region[3]
    assert math.isclose(by_region[1].gram[0, 0].item(), average, rel_tol=1e-5)
    assert math.isclose(
        by_region[2].gram[0, 0].item(), (50 + MIN_EXPERT_VECTORS * average) / (10 + MIN_EXPERT_VECTORS), rel_tol=1e-5
    )
    assert math.isclose(by_region[0].gram[0, 0].item(), 1, rel_tol=0.01)


def test_matrices_of_a_block_that_are_no_experts_share_nothing() -> None:
    alone = replace(expert(0, 3, 1.0), regions=(Region("layers.0.q_proj.weight", 0, 4, False),))
    [found] = mix_experts([alone], {"layers.0.q_proj.weight": (4, 6), "layers.1.q_proj.weight": (4, 6)}, "k")
    assert found is alone


def test_idle_experts_are_as_important_as_some_tokens_of_the_average_one() -> None:
    regions = [Region("layers.0.experts", 4 * number, 4 * number + 4, False) for number in range(3)]
    squares = {
        regions[0]: torch.full((4,), 100.0, dtype=torch.float64),
        regions[1]: torch.zeros(4, dtype=torch.float64),
    }
    sums = Sums(1000, {regions[0]: 150, regions[1]: 50}, squares, {}, None, torch.zeros(()), 1.0, frozenset())
    found = fisher_information(sums, regions)
    added = 100 * MIN_EXPERT_VECTORS / 200
    for region, expected in zip(regions, (100 + added, added, added), strict=True):
        assert torch.allclose(found[region], torch.full((4,), expected / 1000, dtype=torch.float64))
