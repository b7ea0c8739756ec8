"""Model families as data. Supporting another family means adding a row, not code."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from freebits.errors import UnsupportedModelError

SLICED_PREFIX, LOW_RANK_PREFIX = "sliced_", "lowrank_"
"""Before a model type of transformers: what we have made of such models."""
LOW_RANKS = "low_ranks"
"""Key in `config.json`: linear layer → its rank, of those that are two thin ones."""


class Stack(str):
    """The name of a stack of experts' matrices: one tensor, (experts, outputs, inputs), named without `.weight`."""

    __slots__ = ()


WHOLE, IN_PART, BY_BLOCK, NOTHING, UNLESS_ALIBI = "whole", "in part", "by block", "nothing", "unless alibi"
"""A head; its first numbers, as many as the config says; a head in some blocks, as the config says; nothing; a head
unless positions are a term of the scores."""


@dataclass(frozen=True)
class Heads:
    """Where attention has its heads: among the outputs of modules that are named relative to the block.

    A head's queries and keys meet in a product, and so do its values and the output matrix. Between them any basis will
    do, but where positions or a norm need theirs.
    """

    queries: str
    keys: str
    values: str
    by_group: bool = False
    """Of one module for all: whether a key and a value follow the queries that share them; else all queries come first,
    then all keys, then all values."""
    turned: str = WHOLE
    """What of queries and keys positions turn, or a norm scales."""


@dataclass(frozen=True)
class Branch:
    """One `write(f(reads(norm(x))))`; module names are relative to the block."""

    norm: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    modules: tuple[str, ...]
    """Children of the block that compute it, applied in this order."""
    attends: bool = False
    """Whether it is attention, which also takes mask, positions and cache."""
    heads: Heads | None = None
    """Of attention, where the table knows them."""
    inner: tuple[str, ...] = ()
    """Tensors inside the branch, which never meet the stream, by their full names; a model may do without them."""
    varies: bool = False
    """Whether blocks differ in which of these matrices they have."""
    as_wide: bool = False
    """Whether the library's code makes the result as wide as what it reads, so that slicing must, too."""


@dataclass(frozen=True)
class SublayerNames:
    """One `x ← x A + Σ branch(x)` of a block: branches that read one stretch of the stream share a shortcut."""

    name: str
    branches: tuple[Branch, ...]

    @property
    def shortcut(self) -> str:
        """The module that a sliced block has beside its branches, for `A`."""
        return f"{self.name}_shortcut"


@dataclass(frozen=True)
class Requirement:
    """A config value that the family's row is true for."""

    key: str
    reason: str = ""
    value: object = None
    same_as: str | None = None
    """Another key, whose value this one must have."""
    by_default: bool = True
    """Whether a config without the key fulfils it."""

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether a config fulfils it."""
        if self.key not in config:
            return self.by_default
        needed = config.get(self.same_as) if self.same_as else self.value
        return bool(config[self.key] == needed)


@dataclass(frozen=True)
class Family:
    """Where the residual stream runs in one family of models; names are those of transformers' modules."""

    model_type: str
    causal_lm: str
    """The class of `transformers` that runs the dense model."""
    embeddings: tuple[str, ...]
    blocks: str
    sublayers: tuple[SublayerNames, ...]
    final_norm: str
    head: str
    head_bias: bool = False
    """Whether the dense model's head has a bias."""
    centred: bool = False
    """Whether the norms are LayerNorms: they also subtract the mean, and have biases."""
    transposed: bool = False
    """Whether the dense model's matrices are stored as (inputs, outputs)."""
    branch_scale: str = ""
    """The key of a number by which the blocks multiply each branch's result."""
    in_tuple: bool = False
    """Whether a block gives its stream in a tuple."""
    as_wide: bool = False
    """Whether the library's code takes the stream to end as wide as it begins."""
    tied_by_default: bool = False
    """What a config without `tie_word_embeddings` means."""
    width: str = "hidden_size"
    depth: str = "num_hidden_layers"
    n_heads: str = "num_attention_heads"
    """The keys of the stream's width, and of the numbers of blocks and of queries' heads."""
    ignored: tuple[str, ...] = ()
    """Suffixes of tensors that old checkpoints carry and no model reads."""
    when: tuple[Requirement, ...] = ()
    """Which of a model type's rows this is: the first whose requirements hold."""
    requirements: tuple[Requirement, ...] = ()
    """Without which the symmetry does not hold."""

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
        return f"{self._sliced_stem}Config"

    @property
    def _sliced_stem(self) -> str:
        """With which the names of classes begin."""
        return self.sliced_causal_lm.removesuffix("ForCausalLM").removesuffix("LMHeadModel")

    @property
    def low_rank_model_type(self) -> str:
        """`model_type` of this family's models with layers of low rank that are not sliced."""
        return LOW_RANK_PREFIX + self.model_type

    @property
    def low_rank_classes(self) -> dict[str, str]:
        """Their classes, by the Auto classes that find them."""
        return {auto: name.replace("Sliced", "LowRank") for auto, name in self.sliced_classes.items()}

    @property
    def sliced_classes(self) -> dict[str, str]:
        """Those classes, by the Auto classes that find them."""
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
    attends=True,
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
    as_wide=True,
)
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def _fused(module: str, *, by_group: bool = False, turned: str = WHOLE) -> Heads:
    return Heads(module, module, module, by_group, turned)


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
    sublayers=_one_after_another(replace(_ATTENTION, heads=Heads(*_QKV, turned=BY_BLOCK)), _MLP),
    tied_by_default=True,
)
GRANITE = replace(LLAMA, model_type="granite", causal_lm="GraniteForCausalLM", branch_scale="residual_multiplier")
PHI3 = replace(
    LLAMA,
    model_type="phi3",
    causal_lm="Phi3ForCausalLM",
    sublayers=_one_after_another(
        replace(_ATTENTION, reads=("self_attn.qkv_proj",), heads=_fused("self_attn.qkv_proj", turned=IN_PART)),
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
            heads=None,  # they are made of what is compressed first
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

_TURNED_IN_PART = replace(_ATTENTION, heads=Heads(*_QKV, turned=IN_PART))
STABLELM_PARALLEL = replace(
    LLAMA,
    model_type="stablelm",
    causal_lm="StableLmForCausalLM",
    sublayers=_side_by_side(_TURNED_IN_PART, replace(_MLP, norm="input_layernorm")),
    centred=True,
    when=(Requirement("use_parallel_residual", value=True, by_default=False),),
    requirements=(
        Requirement("qk_layernorm", value=False, reason="the norms of its single heads are not in the table"),
    ),
)
STABLELM = replace(STABLELM_PARALLEL, sublayers=_one_after_another(_TURNED_IN_PART, _MLP), when=())

_PHI_MLP = Branch("input_layernorm", reads=("mlp.fc1",), writes=("mlp.fc2",), modules=("mlp",))
PHI = replace(
    LLAMA,
    model_type="phi",
    causal_lm="PhiForCausalLM",
    sublayers=_side_by_side(replace(_TURNED_IN_PART, writes=("self_attn.dense",)), _PHI_MLP),
    final_norm="model.final_layernorm",
    head_bias=True,
    centred=True,
    requirements=(Requirement("qk_layernorm", value=False, reason="the norms of its heads are not in the table"),),
)

_FUSED = Branch(
    norm="input_layernorm",
    reads=("attention.query_key_value",),
    writes=("attention.dense",),
    modules=("attention",),
    attends=True,
    heads=_fused("attention.query_key_value", by_group=True, turned=IN_PART),
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
    attends=True,
    heads=_fused("self_attention.query_key_value", by_group=True, turned=UNLESS_ALIBI),
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
    in_tuple=True,
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
            attends=True,
            heads=_fused("attn.c_attn", turned=NOTHING),
        ),
        Branch("ln_2", reads=("mlp.c_fc",), writes=("mlp.c_proj",), modules=("mlp",)),
    ),
    final_norm="transformer.ln_f",
    head="lm_head",
    centred=True,
    transposed=True,
    as_wide=True,
    tied_by_default=True,
    width="n_embd",
    depth="n_layer",
    n_heads="n_head",
    ignored=(".attn.bias", ".attn.masked_bias"),
    requirements=(
        Requirement("add_cross_attention", value=False, reason="its cross-attention reads another model's stream"),
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
            heads=Heads(*_QKV, turned=NOTHING),
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
            reason="it normalises the residual stream itself after each branch, so no rotation of it is free",
        ),
        Requirement(
            "word_embed_proj_dim",
            same_as="hidden_size",
            reason="its embeddings have another width than its residual stream",
        ),
        Requirement("_remove_final_layer_norm", value=False, reason="it has no final norm to fold"),
        Requirement("layer_norm_elementwise_affine", value=True, reason="its norms have no scale to fold"),
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
"""Every row; of those of one model type the last is the one for a config that says nothing."""
MODEL_TYPES: Mapping[str, Family] = {family.model_type: family for family in FAMILIES}

_NORMED_OUTPUT = "it normalises the output of each branch, so no rotation of the residual stream is free"
_OTHER_WAYS = "freebits pack --codec none takes any model, freebits quantize any that transformers runs in floats"
REFUSALS: Mapping[str, str] = {
    "gpt_oss": "its experts are four-bit floats on disk already, which no rotation leaves as they are",
    "gemma2": _NORMED_OUTPUT,
    "gemma3": _NORMED_OUTPUT,
    "gemma3_text": _NORMED_OUTPUT,
    "olmo2": _NORMED_OUTPUT,
    "olmo3": _NORMED_OUTPUT,
}
"""Model types known to have no site, with the reason."""


def transformers_type(config: Mapping[str, Any]) -> str:
    """The model type of transformers that a model of ours was made from."""
    return str(config.get("model_type", "")).removeprefix(SLICED_PREFIX).removeprefix(LOW_RANK_PREFIX)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a dense or sliced model, from its `config.json`.

    Raises:
        UnsupportedModelError: the model type has no entry, or the config breaks one of its requirements.
    """
    model_type = transformers_type(config)
    if model_type in REFUSALS:
        raise UnsupportedModelError(
            f"model type {model_type!r} has no free rotation: {REFUSALS[model_type]}; {_OTHER_WAYS}"
        )
    if model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise UnsupportedModelError(
            f"model type {model_type!r} has no entry in the architecture table (supported: {known}): {_OTHER_WAYS}"
        )
    rows = (row for row in FAMILIES if row.model_type == model_type)
    family = next(row for row in rows if all(need.holds(config) for need in row.when))
    for need in family.requirements:
        if not need.holds(config):
            raise UnsupportedModelError(
                f"{model_type} model with {need.key}={config[need.key]!r} is not supported: {need.reason}"
            )
    return family


def dense_family(config: Mapping[str, Any]) -> Family:
    """The family of a dense model that can be folded and sliced.

    Raises:
        UnsupportedModelError: as `family_of`; or the model is sliced already, or its weights are quantized.
    """
    family = family_of(config)
    if str(config["model_type"]).startswith(SLICED_PREFIX):
        raise UnsupportedModelError("the model is sliced already: slice the dense model it was made from")
    quantization = config.get("quantization_config")
    if quantization:
        named = isinstance(quantization, dict) and quantization.get("quant_method")
        method = named or "an unnamed method"
        raise UnsupportedModelError(f"the weights are quantized ({method}): slice the model it was made from")
    return family
