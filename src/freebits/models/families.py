"""Model families described as data. To support another family, add a row to `FAMILIES`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from freebits.errors import UnsupportedModelError

SLICED_PREFIX, LOW_RANK_PREFIX = "sliced_", "lowrank_"
"""Prefixes of the model types of sliced models and of low-rank models. The model type in transformers follows them."""
LOW_RANKS = "low_ranks"
"""Key in `config.json`: name of a low-rank linear layer → its rank."""


class Stack(str):
    """The name, without `.weight`, of a stack of expert matrices: one tensor, (experts, outputs, inputs)."""

    __slots__ = ()


ALL_COMPONENTS, LEADING_COMPONENTS, BY_BLOCK, NO_COMPONENTS, ALL_UNLESS_ALIBI = (
    "all",
    "leading",
    "by block",
    "none",
    "unless alibi",
)
"""Options for `Heads.fixed`: which components of a query or key have a fixed basis. `LEADING_COMPONENTS`: the leading
components; the config gives their fraction. `BY_BLOCK`: all components in the blocks that have rotary positions
according to the config, none in the other blocks. `ALL_UNLESS_ALIBI`: none if the config enables ALiBi, which adds
positions to the attention scores; all otherwise."""


@dataclass(frozen=True)
class Heads:
    """Modules whose outputs are the heads of attention, named relative to the block.

    In each head, queries are multiplied by keys, and values by the output matrix. The inner basis of each product is
    free unless positions or a norm fix it. A *group* consists of a key, a value and the queries that share them.
    """

    queries: str
    keys: str
    values: str
    by_group: bool = False
    """Order of the outputs if one module computes queries, keys and values. True: group by group, each with its
    queries, its key and its value. False: all queries, then all keys, then all values."""
    fixed: str = ALL_COMPONENTS
    """One of the options above. A basis is fixed if positions rotate the components or a norm scales them."""


@dataclass(frozen=True)
class Branch:
    """A branch, which computes `write(f(reads(norm(x))))`. Module names are relative to the block."""

    norm: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    modules: tuple[str, ...]
    """Children of the block that compute the branch, applied in this order."""
    is_attention: bool = False
    """Whether the branch is attention, which also takes mask, positions and cache."""
    heads: Heads | None = None
    """The heads of attention; None if the branch has no heads or the table does not describe them."""
    inner: tuple[str, ...] = ()
    """Optional tensors in the branch that neither read nor write the stream, named with their suffix (`.weight`)."""
    varies: bool = False
    """Whether some blocks lack some of the matrices that `reads` and `writes` name."""
    keeps_width: bool = False
    """Whether the code in transformers requires the stream to be as wide after the branch as before it."""


@dataclass(frozen=True)
class SublayerNames:
    """A sublayer of a block, which computes `x ← x A + Σ branch(x)`. Its branches share the shortcut `A`."""

    name: str
    branches: tuple[Branch, ...]

    @property
    def shortcut(self) -> str:
        """The module that holds `A` in a sliced block."""
        return f"{self.name}_shortcut"


@dataclass(frozen=True)
class Requirement:
    """A config value that a row of the table requires."""

    key: str
    reason: str = ""
    value: object = None
    same_as: str | None = None
    """Another key, whose value must equal that of `key`; None to compare with `value`."""
    by_default: bool = True
    """Whether a config without the key meets the requirement."""

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config meets the requirement."""
        if self.key not in config:
            return self.by_default
        required = config.get(self.same_as) if self.same_as else self.value
        return bool(config[self.key] == required)


@dataclass(frozen=True)
class Family:
    """The path of the residual stream through a family of models. Module names are those in transformers."""

    model_type: str
    causal_lm: str
    """The class of the dense model in `transformers`."""
    embeddings: tuple[str, ...]
    blocks: str
    sublayers: tuple[SublayerNames, ...]
    final_norm: str
    head: str
    head_bias: bool = False
    """Whether the dense model's head has a bias."""
    centred: bool = False
    """Whether the norms are LayerNorms, which also subtract the mean and have biases."""
    transposed: bool = False
    """Whether the dense model's matrices are stored as (inputs, outputs)."""
    branch_scale: str = ""
    """The config key of the factor by which blocks multiply the result of each branch."""
    returns_tuple: bool = False
    """Whether a block returns the stream in a tuple."""
    keeps_width: bool = False
    """Whether the code in transformers requires the stream to be as wide at its end as at its start."""
    tied_by_default: bool = False
    """Whether the head is tied if the config has no `tie_word_embeddings`."""
    width: str = "hidden_size"
    depth: str = "num_hidden_layers"
    n_heads: str = "num_attention_heads"
    """Three keys of the config: for the width of the stream, the number of blocks, and the number of query heads."""
    ignored: tuple[str, ...] = ()
    """Suffixes of the names of tensors that old checkpoints contain and no model reads."""
    when: tuple[Requirement, ...] = ()
    """Conditions for this row. Of the rows of a model type, the first one whose conditions all hold applies."""
    requirements: tuple[Requirement, ...] = ()
    """Conditions that a model must meet to be supported."""

    @property
    def sliced_model_type(self) -> str:
        """The `model_type` of sliced models of this family."""
        return SLICED_PREFIX + self.model_type

    @property
    def sliced_causal_lm(self) -> str:
        """The class name of sliced models of this family."""
        return "Sliced" + self.causal_lm

    @property
    def sliced_config(self) -> str:
        """The class name of the configuration of sliced models of this family."""
        return f"{self._sliced_stem}Config"

    @property
    def _sliced_stem(self) -> str:
        """The common start of the class names of sliced models."""
        return self.sliced_causal_lm.removesuffix("ForCausalLM").removesuffix("LMHeadModel")

    @property
    def low_rank_model_type(self) -> str:
        """The `model_type` of low-rank models of this family that are not sliced."""
        return LOW_RANK_PREFIX + self.model_type

    @property
    def low_rank_classes(self) -> dict[str, str]:
        """Name of an Auto class → class name for low-rank models that are not sliced."""
        return {auto: name.replace("Sliced", "LowRank") for auto, name in self.sliced_classes.items()}

    @property
    def sliced_classes(self) -> dict[str, str]:
        """Name of an Auto class → class name for sliced models."""
        return {
            "AutoConfig": self.sliced_config,
            "AutoModel": f"{self._sliced_stem}Model",
            "AutoModelForCausalLM": self.sliced_causal_lm,
        }


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = Branch(
    norm="input_layernorm",
    reads=_QKV,
    writes=("self_attn.o_proj",),
    modules=("self_attn",),
    is_attention=True,
    heads=Heads(*_QKV),
)
_MLP = Branch(
    norm="post_attention_layernorm",
    reads=("mlp.gate_proj", "mlp.up_proj"),
    writes=("mlp.down_proj",),
    modules=("mlp",),
)
_MIXTURE = replace(
    _MLP,
    reads=(*_MLP.reads, "mlp.gate", Stack("mlp.experts.gate_up_proj")),
    writes=(*_MLP.writes, Stack("mlp.experts.down_proj")),
    varies=True,
    keeps_width=True,
)
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def _fused(module: str, *, by_group: bool = False, fixed: str = ALL_COMPONENTS) -> Heads:
    return Heads(module, module, module, by_group, fixed)


def _one_after_another(attention: Branch, mlp: Branch) -> tuple[SublayerNames, ...]:
    return SublayerNames("attention", (attention,)), SublayerNames("mlp", (mlp,))


def _side_by_side(attention: Branch, mlp: Branch) -> tuple[SublayerNames, ...]:
    return (SublayerNames("parallel", (attention, mlp)),)


LLAMA = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    embeddings=("model.embed_tokens",),
    blocks="model.layers",
    sublayers=_one_after_another(_ATTENTION, _MLP),
    final_norm="model.norm",
    head="lm_head",
    ignored=("rotary_emb.inv_freq",),
)
MISTRAL = replace(LLAMA, model_type="mistral", causal_lm="MistralForCausalLM")
QWEN2 = replace(LLAMA, model_type="qwen2", causal_lm="Qwen2ForCausalLM")
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    sublayers=_one_after_another(replace(_ATTENTION, inner=_HEAD_NORMS), _MLP),
)
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    causal_lm="SmolLM3ForCausalLM",
    sublayers=_one_after_another(replace(_ATTENTION, heads=Heads(*_QKV, fixed=BY_BLOCK)), _MLP),
    tied_by_default=True,
)
GRANITE = replace(LLAMA, model_type="granite", causal_lm="GraniteForCausalLM", branch_scale="residual_multiplier")
PHI3 = replace(
    LLAMA,
    model_type="phi3",
    causal_lm="Phi3ForCausalLM",
    sublayers=_one_after_another(
        replace(
            _ATTENTION, reads=("self_attn.qkv_proj",), heads=_fused("self_attn.qkv_proj", fixed=LEADING_COMPONENTS)
        ),
        replace(_MLP, reads=("mlp.gate_up_proj",)),
    ),
)
MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    causal_lm="MixtralForCausalLM",
    sublayers=_one_after_another(_ATTENTION, _MIXTURE),
)
QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    sublayers=_one_after_another(replace(_ATTENTION, inner=_HEAD_NORMS), _MIXTURE),
)
DEEPSEEK_V3 = replace(
    LLAMA,
    model_type="deepseek_v3",
    causal_lm="DeepseekV3ForCausalLM",
    sublayers=_one_after_another(
        replace(
            _ATTENTION,
            reads=("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
            heads=None,  # not described, because heads are computed from compressed queries, keys and values
            inner=(
                "self_attn.q_a_layernorm.weight",
                "self_attn.q_b_proj.weight",
                "self_attn.kv_a_layernorm.weight",
                "self_attn.kv_b_proj.weight",
            ),
            varies=True,
        ),
        replace(
            _MIXTURE,
            reads=(*_MIXTURE.reads, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            writes=(*_MIXTURE.writes, "mlp.shared_experts.down_proj"),
            inner=("mlp.gate.e_score_correction_bias",),
        ),
    ),
)

_PARTIAL_ROTARY = replace(_ATTENTION, heads=Heads(*_QKV, fixed=LEADING_COMPONENTS))
STABLELM_PARALLEL = replace(
    LLAMA,
    model_type="stablelm",
    causal_lm="StableLmForCausalLM",
    sublayers=_side_by_side(_PARTIAL_ROTARY, replace(_MLP, norm="input_layernorm")),
    centred=True,
    when=(Requirement("use_parallel_residual", value=True, by_default=False),),
    requirements=(
        Requirement(
            "qk_layernorm", value=False, reason="the architecture table has no entry for the norms of queries and keys"
        ),
    ),
)
STABLELM = replace(STABLELM_PARALLEL, sublayers=_one_after_another(_PARTIAL_ROTARY, _MLP), when=())

_PHI_MLP = Branch("input_layernorm", reads=("mlp.fc1",), writes=("mlp.fc2",), modules=("mlp",))
PHI = replace(
    LLAMA,
    model_type="phi",
    causal_lm="PhiForCausalLM",
    sublayers=_side_by_side(replace(_PARTIAL_ROTARY, writes=("self_attn.dense",)), _PHI_MLP),
    final_norm="model.final_layernorm",
    head_bias=True,
    centred=True,
    requirements=(
        Requirement(
            "qk_layernorm", value=False, reason="the architecture table has no entry for the norms of queries and keys"
        ),
    ),
)

_FUSED = Branch(
    norm="input_layernorm",
    reads=("attention.query_key_value",),
    writes=("attention.dense",),
    modules=("attention",),
    is_attention=True,
    heads=_fused("attention.query_key_value", by_group=True, fixed=LEADING_COMPONENTS),
)
_FUSED_MLP = Branch(
    norm="post_attention_layernorm", reads=("mlp.dense_h_to_4h",), writes=("mlp.dense_4h_to_h",), modules=("mlp",)
)
GPT_NEOX_SEQUENTIAL = Family(
    model_type="gpt_neox",
    causal_lm="GPTNeoXForCausalLM",
    embeddings=("gpt_neox.embed_in",),
    blocks="gpt_neox.layers",
    sublayers=_one_after_another(_FUSED, _FUSED_MLP),
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    centred=True,
    ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
    when=(Requirement("use_parallel_residual", value=False, by_default=False),),
)
GPT_NEOX = replace(GPT_NEOX_SEQUENTIAL, sublayers=_side_by_side(_FUSED, _FUSED_MLP), when=())

_FALCON = Branch(
    norm="input_layernorm",
    reads=("self_attention.query_key_value",),
    writes=("self_attention.dense",),
    modules=("self_attention",),
    is_attention=True,
    heads=_fused("self_attention.query_key_value", by_group=True, fixed=ALL_UNLESS_ALIBI),
)
_NEW_FALCON = Requirement("new_decoder_architecture", value=True, by_default=False)
FALCON = Family(
    model_type="falcon",
    causal_lm="FalconForCausalLM",
    embeddings=("transformer.word_embeddings",),
    blocks="transformer.h",
    sublayers=_side_by_side(_FALCON, replace(_FUSED_MLP, norm="input_layernorm")),
    final_norm="transformer.ln_f",
    head="lm_head",
    centred=True,
    returns_tuple=True,
    tied_by_default=True,
)
FALCON_ONE_NORM = replace(FALCON, when=(_NEW_FALCON, Requirement("num_ln_in_parallel_attn", value=1, by_default=False)))
FALCON_TWO_NORMS = replace(
    FALCON,
    sublayers=_side_by_side(replace(_FALCON, norm="ln_attn"), replace(_FUSED_MLP, norm="ln_mlp")),
    when=(_NEW_FALCON,),
)
FALCON_SEQUENTIAL = replace(
    FALCON,
    sublayers=_one_after_another(_FALCON, _FUSED_MLP),
    when=(Requirement("parallel_attn", value=False, by_default=False),),
)

GPT2 = Family(
    model_type="gpt2",
    causal_lm="GPT2LMHeadModel",
    embeddings=("transformer.wte", "transformer.wpe"),
    blocks="transformer.h",
    sublayers=_one_after_another(
        Branch(
            "ln_1",
            reads=("attn.c_attn",),
            writes=("attn.c_proj",),
            modules=("attn",),
            is_attention=True,
            heads=_fused("attn.c_attn", fixed=NO_COMPONENTS),
        ),
        Branch("ln_2", reads=("mlp.c_fc",), writes=("mlp.c_proj",), modules=("mlp",)),
    ),
    final_norm="transformer.ln_f",
    head="lm_head",
    centred=True,
    transposed=True,
    keeps_width=True,
    tied_by_default=True,
    width="n_embd",
    depth="n_layer",
    n_heads="n_head",
    ignored=(".attn.bias", ".attn.masked_bias"),
    requirements=(
        Requirement("add_cross_attention", value=False, reason="cross-attention reads the stream of another model"),
    ),
)

OPT = Family(
    model_type="opt",
    causal_lm="OPTForCausalLM",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    blocks="model.decoder.layers",
    sublayers=_one_after_another(
        replace(
            _ATTENTION,
            norm="self_attn_layer_norm",
            writes=("self_attn.out_proj",),
            heads=Heads(*_QKV, fixed=NO_COMPONENTS),
        ),
        Branch("final_layer_norm", reads=("fc1",), writes=("fc2",), modules=("fc1", "activation_fn", "fc2")),
    ),
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    centred=True,
    tied_by_default=True,
    requirements=(
        Requirement(
            "do_layer_norm_before",
            value=True,
            reason="the norms scale the residual stream itself, which fixes its basis",
        ),
        Requirement(
            "word_embed_proj_dim",
            same_as="hidden_size",
            reason="the embeddings and the residual stream have different widths",
        ),
        Requirement("_remove_final_layer_norm", value=False, reason="there is no final norm to fold"),
        Requirement("layer_norm_elementwise_affine", value=True, reason="the norms have no scale to fold"),
    ),
)

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    GRANITE,
    PHI3,
    MIXTRAL,
    QWEN3_MOE,
    DEEPSEEK_V3,
    STABLELM_PARALLEL,
    STABLELM,
    PHI,
    GPT_NEOX_SEQUENTIAL,
    GPT_NEOX,
    FALCON_ONE_NORM,
    FALCON_TWO_NORMS,
    FALCON_SEQUENTIAL,
    FALCON,
    GPT2,
    OPT,
)
"""All rows. The last row of a model type is its default."""
MODEL_TYPES: Mapping[str, Family] = {family.model_type: family for family in FAMILIES}

_OUTPUT_NORM = "it normalizes the output of each branch, which fixes the basis of the residual stream"
_ALTERNATIVES = "pack the model with `codec` none, or quantize it if transformers can run it in floating point"
REFUSALS: Mapping[str, str] = {
    "gpt_oss": "it stores experts as four-bit floats, which a rotation would change",
    "gemma2": _OUTPUT_NORM,
    "gemma3": _OUTPUT_NORM,
    "gemma3_text": _OUTPUT_NORM,
    "olmo2": _OUTPUT_NORM,
    "olmo3": _OUTPUT_NORM,
}
"""Model type → reason why the residual stream of such models cannot be rotated."""


def transformers_type(config: Mapping[str, Any]) -> str:
    """Return the model type of a dense, sliced or low-rank model, without the prefixes of freebits."""
    return str(config.get("model_type", "")).removeprefix(SLICED_PREFIX).removeprefix(LOW_RANK_PREFIX)


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a dense, sliced or low-rank model, from its `config.json`.

    Raises:
        UnsupportedModelError: the model type has no row, or the config does not meet a requirement of its row.
    """
    model_type = transformers_type(config)
    if model_type in REFUSALS:
        raise UnsupportedModelError(
            f"the residual stream of model type {model_type!r} cannot be rotated, because "
            f"{REFUSALS[model_type]}: {_ALTERNATIVES}"
        )
    if model_type not in MODEL_TYPES:
        supported = ", ".join(sorted(MODEL_TYPES))
        raise UnsupportedModelError(
            f"model type {model_type!r} has no entry in the architecture table (supported: {supported}): "
            f"{_ALTERNATIVES}"
        )
    rows = (row for row in FAMILIES if row.model_type == model_type)
    family = next(row for row in rows if all(requirement.holds(config) for requirement in row.when))
    for requirement in family.requirements:
        if not requirement.holds(config):
            raise UnsupportedModelError(
                f"{model_type} model with {requirement.key}={config[requirement.key]!r} is not supported, because "
                f"{requirement.reason}: {_ALTERNATIVES}"
            )
    return family


def dense_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a dense model that can be folded and sliced.

    Raises:
        UnsupportedModelError: `family_of` refuses the model, the model is already sliced, or its weights are quantized.
    """
    family = family_of(config)
    if str(config["model_type"]).startswith(SLICED_PREFIX):
        raise UnsupportedModelError("the model is already sliced: use the dense model that was sliced")
    quantization = config.get("quantization_config")
    if quantization:
        method = isinstance(quantization, dict) and quantization.get("quant_method")
        raise UnsupportedModelError(
            f"the weights are quantized ({method or 'unknown method'}): give the original model, which is not quantized"
        )
    return family
