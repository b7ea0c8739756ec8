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


@dataclass(frozen=True)
class Requirement:
    """A config value without which the family's symmetry does not hold."""

    key: str
    value: object
    reason: str


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

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA,)}

_NORMED_OUTPUT = "it normalises the output of each branch, so no rotation of the residual stream is free"
REFUSALS: Mapping[str, str] = {
    "gemma2": _NORMED_OUTPUT,
    "gemma3": _NORMED_OUTPUT,
    "gemma3_text": _NORMED_OUTPUT,
}
"""Model types known to have no site, with the reason."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a dense or sliced model, from its `config.json`.

    Raises:
        UnsupportedModelError: the model type has no entry, or the config breaks one of its requirements.
    """
    model_type = str(config.get("model_type", "")).removeprefix(SLICED_PREFIX)
    if model_type in REFUSALS:
        raise UnsupportedModelError(f"model type {model_type!r} has no free rotation: {REFUSALS[model_type]}")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"model type {model_type!r} has no entry in the architecture table (supported: {known})"
        )
    family = FAMILIES[model_type]
    for need in family.requirements:
        if config.get(need.key, need.value) != need.value:
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
        method = quantization.get("quant_method", "an unnamed method")
        raise UnsupportedModelError(f"the weights are quantised ({method}): slice the model it was made from")
    return family
