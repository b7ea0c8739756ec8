"""The architecture table, and the checkpoints and configs that it refuses."""

from typing import Any

import pytest

from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.models.architecture import Architecture, Axis, Role
from freebits.models.families import MODEL_TYPES, dense_family, family_of
from freebits.models.layout import Layout
from tests.tiny import VARIANTS, tiny_config, tiny_model

CONFIG = tiny_config().to_dict()


def test_a_model_of_l_blocks_has_two_l_plus_one_sites() -> None:
    architecture = Architecture.of(CONFIG)
    assert architecture.n_sites == 7
    assert Layout.sliced(architecture, 24).widths == (24, 24, 24, 24, 24, 24, 32)


def test_every_site_has_tensors_that_write_it_and_tensors_that_read_it() -> None:
    rows = Architecture.of(CONFIG).weights
    axes = {name: row.axes for name, row in rows.items()}
    assert rows["model.layers.0.self_attn.o_proj.bias"].optional
    assert rows["model.layers.0.input_layernorm.weight"].role is Role.NORM
    assert axes["model.embed_tokens.weight"] == (Axis(1, 0, writes=True),)
    assert axes["model.layers.0.self_attn.q_proj.weight"] == (Axis(1, 0),)
    assert axes["model.layers.0.attention_shortcut.weight"] == (Axis(1, 0), Axis(0, 1, writes=True))
    assert axes["model.layers.0.self_attn.o_proj.bias"] == (Axis(0, 1, writes=True),)
    assert axes["model.layers.0.mlp.up_proj.bias"] == ()
    assert axes["model.layers.0.mlp.down_proj.weight"] == (Axis(0, 2, writes=True),)
    assert axes["lm_head.weight"] == (Axis(1, 6),)
    for site in range(7):
        at_site = [axis for tensor_axes in axes.values() for axis in tensor_axes if axis.site == site]
        assert {axis.writes for axis in at_site} == {True, False}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_has_exactly_the_tensors_of_the_table(variant: str) -> None:
    architecture = Architecture.of(tiny_config(**VARIANTS[variant]).to_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_model(**VARIANTS[variant]).state_dict().items()}
    Layout().check(shapes, architecture)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"model.norm.weight": None}, r"model\.norm\.weight"),
        ({"model.layers.1.mlp.gate_proj.weight": None}, r"layers\.1\.mlp\.gate_proj\.weight"),
        ({"model.layers.1.adapter.weight": (32, 32)}, r"layers\.1\.adapter\.weight.*llama"),
        ({"model.layers.0.self_attn.o_proj.weight": (31, 32)}, r"layers\.0\.self_attn\.o_proj.*\[31, 32\].* 32"),
    ],
)
def test_a_checkpoint_with_a_wrong_tensor_is_refused(changes: dict[str, Any], facts: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_model().state_dict().items()} | changes
    present = {name: shape for name, shape in shapes.items() if shape is not None}
    with pytest.raises(CheckpointError, match=facts):
        Layout().check(present, Architecture.of(CONFIG))


def test_tensors_that_no_model_reads_are_ignored() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_model().state_dict().items()}
    ignored = {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    Layout().check(shapes | ignored, Architecture.of(CONFIG))


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"model_type": "gemma2"}, "'gemma2'.*rotated"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before"),
        ({"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 512}, "word_embed_proj_dim"),
        ({}, "''"),
        ({**CONFIG, "model_type": "sliced_llama"}, "sliced"),
        ({**CONFIG, "quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason(config: dict[str, Any], facts: str) -> None:
    with pytest.raises(UnsupportedModelError, match=facts):
        dense_family(config)


def test_a_config_with_an_invalid_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match="hidden_size"):
        Architecture.of({"model_type": "llama", "hidden_size": "wide", "num_hidden_layers": 3})


def test_a_config_with_more_blocks_than_tensors_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"num_hidden_layers.*1000000000.*29"):
        Architecture.of({**CONFIG, "num_hidden_layers": 10**9}, n_tensors=29)


def test_dense_and_sliced_models_share_a_family() -> None:
    assert family_of({"model_type": "sliced_llama"}) is family_of({"model_type": "llama"}) is MODEL_TYPES["llama"]
