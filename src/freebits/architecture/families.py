"""Model families as data. Supporting another family means adding a row, not code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from freebits.errors import UnsupportedModelError

SLICED_PREFIX = "sliced_"


@dataclass(frozen=True)
class SublayerNames:
    """One `x ← x A + write(f(reads(norm(x))))` of a block; module names are relative to the block."""

    name: str
    norm: str
    reads: tuple[str, ...]
    write: str
    modules: tuple[str, ...]
    """Children of the block that compute the branch, applied in this order."""
    attends: bool = False
    """Whether the branch is attention, which also takes mask, positions and cache."""
    value: str = ""
    """Of attention the one of `reads` that makes the values, which `write` reads again, head by head."""

    @property
    def shortcut(self) -> str:
        """The module that a sliced block has beside the branch, for `A`."""
        return f"{self.name}_shortcut"


@dataclass(frozen=True)
class Requirement:
    """A config value without which the family's symmetry does not hold. A config without the key fulfils it."""

    key: str
    reason: str
    value: object = None
    same_as: str | None = None
    """Another key, whose value this one must have."""

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether a config fulfils it."""
        needed = config.get(self.same_as) if self.same_as else self.value
        return bool(config.get(self.key, needed) == needed)


@dataclass(frozen=True)
class Family:
    """Where the residual stream runs in one family of models; names are Hugging Face module names."""

    model_type: str
    causal_lm: str
    """The class of `transformers` that runs the dense model."""
    embeddings: tuple[str, ...]
    blocks: str
    sublayers: tuple[SublayerNames, ...]
    final_norm: str
    head: str
    centred: bool = False
    """Whether the norms are LayerNorms: they also subtract the mean, and have biases."""
    tied_by_default: bool = False
    """What a config without `tie_word_embeddings` means."""
    ignored: tuple[str, ...] = ()
    """Suffixes of tensors that old checkpoints carry and no model reads."""
    requirements: tuple[Requirement, ...] = ()

    @property
    def sliced_model_type(self) -> str:
        """`model_type` of this family's sliced models."""
        return SLICED_PREFIX + self.model_type

    @property
    def sliced_causal_lm(self) -> str:
        """Class name of this family's sliced models."""
        return "Sliced" + self.causal_lm

    @property
    def sliced_config(self) -> str:
        """Class name of the configuration of this family's sliced models."""
        return self.sliced_causal_lm.replace("ForCausalLM", "Config")

    @property
    def sliced_classes(self) -> dict[str, str]:
        """Those classes, by the Auto classes that find them."""
        return {"AutoConfig": self.sliced_config, "AutoModelForCausalLM": self.sliced_causal_lm}


LLAMA = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    embeddings=("model.embed_tokens",),
    blocks="model.layers",
    sublayers=(
        SublayerNames(
            name="attention",
            norm="input_layernorm",
            reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            write="self_attn.o_proj",
            modules=("self_attn",),
            attends=True,
            value="self_attn.v_proj",
        ),
        SublayerNames(
            name="mlp",
            norm="post_attention_layernorm",
            reads=("mlp.gate_proj", "mlp.up_proj"),
            write="mlp.down_proj",
            modules=("mlp",),
        ),
    ),
    final_norm="model.norm",
    head="lm_head",
    ignored=("rotary_emb.inv_freq",),
)

OPT = Family(
    model_type="opt",
    causal_lm="OPTForCausalLM",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    blocks="model.decoder.layers",
    sublayers=(
        SublayerNames(
            name="attention",
            norm="self_attn_layer_norm",
            reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            write="self_attn.out_proj",
            modules=("self_attn",),
            attends=True,
            value="self_attn.v_proj",
        ),
        SublayerNames(
            name="mlp",
            norm="final_layer_norm",
            reads=("fc1",),
            write="fc2",
            modules=("fc1", "activation_fn", "fc2"),
        ),
    ),
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    centred=True,
    tied_by_default=True,
    requirements=(
        Requirement(
            "do_layer_norm_before",
            value=True,
            reason="it normalises the residual stream itself after each branch, so no rotation of it is free",
        ),
        Requirement(
            "word_embed_proj_dim",
            same_as="hidden_size",
            reason="its embeddings have another width than its residual stream",
        ),
        Requirement("_remove_final_layer_norm", value=False, reason="it has no final norm to fold"),
        Requirement("enable_bias", value=True, reason="its norms' biases have no bias to be folded into"),
        Requirement("layer_norm_elementwise_affine", value=True, reason="its norms have no scale to fold"),
    ),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA, OPT)}

_NORMED_OUTPUT = "it normalises the output of each branch, so no rotation of the residual stream is free"
REFUSALS: Mapping[str, str] = {
    "gemma2": _NORMED_OUTPUT,
    "gemma3": _NORMED_OUTPUT,
    "gemma3_text": _NORMED_OUTPUT,
    "olmo2": _NORMED_OUTPUT,
    "olmo3": _NORMED_OUTPUT,
}
"""Model types known to have no site, with the reason."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a dense or sliced model, from its `config.json`.

    Raises:
        UnsupportedModelError: the model type has no entry, or the config breaks one of its requirements.
    """
    model_type = str(config.get("model_type", "")).removeprefix(SLICED_PREFIX)
    if model_type in REFUSALS:
        raise UnsupportedModelError(
            f"model type {model_type!r} has no free rotation: {REFUSALS[model_type]}; "
            "freebits pack --codec none takes any model"
        )
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"model type {model_type!r} has no entry in the architecture table (supported: {known}): "
            "freebits pack --codec none takes any model"
        )
    family = FAMILIES[model_type]
    for need in family.requirements:
        if not need.holds(config):
            raise UnsupportedModelError(
                f"{model_type} model with {need.key}={config[need.key]!r} is not supported: {need.reason}"
            )
    return family


def dense_family(config: Mapping[str, Any]) -> Family:
    """The family of a dense model that can be folded and sliced.

    Raises:
        UnsupportedModelError: as `family_of`; or the model is sliced already, or its weights are quantised.
    """
    family = family_of(config)
    if config["model_type"] != family.model_type:
        raise UnsupportedModelError("the model is sliced already: slice the dense model it was made from")
    quantization = config.get("quantization_config")
    if quantization:
        named = isinstance(quantization, dict) and quantization.get("quant_method")
        method = named or "an unnamed method"
        raise UnsupportedModelError(f"the weights are quantised ({method}): slice the model it was made from")
    return family
