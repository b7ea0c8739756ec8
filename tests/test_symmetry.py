"""A model that is folded, and rotated at every site, computes the same as the original."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import freebits  # noqa: F401  (registers the sliced models)
from freebits.models.architecture import Architecture, Axis
from freebits.transforms.folding import fold_embeddings, fold_head, fold_sublayers
from freebits.transforms.orthogonal import random_orthogonal, rotate
from tests.tiny import VARIANTS, in_float64, tiny_config, tiny_model


def folded_state(model: Any, architecture: Architecture) -> dict[str, Tensor]:
    """Return the tensors of a model with its norms folded into the matrices that read them."""
    state = model.state_dict()
    embeddings = fold_embeddings(state, architecture)
    blocks = [fold_sublayers(state, architecture, part.sublayers) for part in architecture.parts[1:-1]]
    folded = {name: tensor for part in (embeddings, *blocks) for name, tensor in part.items()}
    return folded | fold_head(state, architecture)


def unsliced(config: Any, architecture: Architecture, state: dict[str, Tensor]) -> Any:
    """Return a sliced model that keeps the full width at every site."""
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    values |= {"tie_word_embeddings": architecture.tied, "site_sizes": [config.hidden_size] * architecture.n_sites}
    sliced_config = AutoConfig.for_model(architecture.family.sliced_model_type, **values)
    model: Any = AutoModelForCausalLM.from_config(sliced_config, dtype=torch.float64)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ([architecture.head.weight] if architecture.tied else [])
    assert not unexpected
    model.tie_weights()
    return in_float64(model).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("untie", [False, True])
@torch.no_grad()
def test_a_folded_and_randomly_rotated_model_gives_the_same_logits(variant: str, untie: bool) -> None:
    config = tiny_config(**VARIANTS[variant])
    original = tiny_model(**VARIANTS[variant])
    architecture = Architecture.of(config.to_dict())
    architecture = architecture.with_tie(architecture.tied and not untie)
    generator = torch.Generator().manual_seed(1)
    rotations = {site: random_orthogonal(config.hidden_size, generator) for site in architecture.free_sites}
    folded = folded_state(original, architecture)
    state = {name: rotate(tensor, architecture.weights[name].axes, rotations) for name, tensor in folded.items()}
    rotated = unsliced(config, architecture, state)
    tokens = torch.randint(config.vocab_size, (2, 40), generator=generator)
    expected = in_float64(original)(tokens).logits
    difference = (rotated(tokens).logits - expected).abs().max()
    assert difference < 1e-9 < expected.std()


@torch.no_grad()
def test_rotating_only_one_of_the_matrices_of_a_site_changes_the_logits() -> None:
    config = tiny_config()
    original = tiny_model()
    architecture = Architecture.of(config.to_dict())
    state = folded_state(original, architecture)
    Q = random_orthogonal(config.hidden_size, torch.Generator().manual_seed(1))
    name = architecture.sublayers[2].write.weight
    state[name] = rotate(state[name], architecture.weights[name].axes, {3: Q})
    tokens = torch.arange(40)[None]
    difference = unsliced(config, architecture, state)(tokens).logits - in_float64(original)(tokens).logits
    assert difference.abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_a_random_orthogonal_matrix_is_orthogonal(size: int, seed: int) -> None:
    Q = random_orthogonal(size, torch.Generator().manual_seed(seed))
    assert torch.allclose(Q.T @ Q, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_rotate_multiplies_each_residual_axis_by_the_rotation_of_its_site() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    A, B = torch.randn(2, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    axes = (Axis(1, 0), Axis(0, 1, writes=True))
    assert torch.allclose(rotate(tensor, axes, {0: B, 1: A}), A.T @ tensor.double() @ B)
    assert torch.equal(rotate(tensor, axes, {7: A}, torch.float32), tensor)
