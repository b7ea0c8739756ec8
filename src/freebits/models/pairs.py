"""Pairs: two matrices with a space between them whose basis says nothing.

Where a model computes `x A B` with nothing in between, every invertible `G: (r, r)` gives the same function with `A G`
and `G⁻¹ B`. So it is between the two matrices of a layer of low rank. A head of attention is two such pairs: values and
output; queries and keys, as far as positions do not turn them. Queries that share a key and a value share the space.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from freebits.models.families import BY_BLOCK, IN_PART, NOTHING, UNLESS_ALIBI, Heads
from freebits.models.table import Architecture, BoundBranch, Module, Part

Shapes = Mapping[str, tuple[int, ...]]

_PLAIN_SETTINGS = (
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("bias", "lora_bias", "use_dora", "trainable_token_indices", "inference_mode"),
    *("eva_config", "loftq_config"),  # where training begins
    *("qalora_group_size", "megatron_core"),  # defaults that do nothing on their own
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_type", "peft_version"),
)
"""Settings of PEFT's LoRA under which a layer's output depends on its two matrices only through their product."""
_PLAIN_STARTS = (True, False, "gaussian", "eva", "olora", "pissa", "loftq", "orthogonal")
"""Values of `init_lora_weights` under which the same holds."""


@dataclass(frozen=True)
class Span:
    """Where a tensor has a pair's spaces along a dimension.

    Attributes:
        name: of the tensor.
        dim: the dimension.
        starts: for each space where it begins, which may be in several places.
    """

    name: str
    dim: int
    starts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Pair:
    """Spaces of one size, side by side.

    Attributes:
        size: `r`, of a space.
        writes: what writes into them, first a matrix, which has each space in one place; multiplied by `G`.
        reads: what reads them; multiplied by the inverse.
    """

    size: int
    writes: tuple[Span, ...]
    reads: tuple[Span, ...]

    @property
    def n_spaces(self) -> int:
        """How many."""
        return len(self.writes[0].starts)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [span.name for span in (*self.writes, *self.reads)]


def pairs_of(architecture: Architecture | None, part: Part, shapes: Shapes, *, dense: bool) -> tuple[Pair, ...]:
    """The pairs in a part of a model, in an order in which none undoes the canonical form of one before it.

    Args:
        architecture: the model's; None for an adapter (LoRA), which is nothing but pairs.
        part: the part.
        shapes: of the model's tensors, by name.
        dense: whether it is stored as the dense model is, which some families do transposed.
    """
    if architecture is None:
        return tuple(_adapters(part, shapes))
    outputs = 1 if dense and architecture.family.transposed else 0
    per_block = len(architecture.family.sublayers)
    found: list[Pair] = []
    for sub in part.sublayers:
        for branch in sub.branches:
            found += _thin(branch.reads, shapes)
            heads = branch.names.heads
            if heads is not None:
                place = _Place.of(branch, heads, architecture, shapes, outputs)
                if place is not None:
                    turned = _turned(heads, architecture.config, (sub.site - 1) // per_block, place.size)
                    found += place.pairs(turned)
            found += _thin(branch.writes, shapes)
    return tuple(found)


def _adapters(part: Part, shapes: Shapes) -> Iterator[Pair]:
    """`A: (r, inputs)` and `B: (outputs, r)` of each layer, as PEFT names them."""
    for name in part.weights:
        other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        down, up = shapes.get(name, ()), shapes.get(other, ())
        if name != other and len(down) == len(up) == 2 and down[0] == up[1]:
            yield Pair(down[0], (Span(name, 0, ((0,),)),), (Span(other, 1, ((0,),)),))


def unproven_settings(adapter: Mapping[str, Any]) -> list[str]:
    """The settings of a PEFT adapter under which a layer may depend on its two matrices in another way than by product.

    An adapter with such a setting can only be kept as it is, bit for bit.

    Args:
        adapter: the adapter's `adapter_config.json`.
    """
    if adapter.get("peft_type") != "LORA":
        return [f"peft_type {adapter.get('peft_type')}"]
    known = {*_PLAIN_SETTINGS, "init_lora_weights"}
    unproven = [key for key, value in adapter.items() if value and key not in known]
    start = adapter.get("init_lora_weights", True)
    return unproven if start in _PLAIN_STARTS else [*unproven, f"init_lora_weights {start}"]


def _thin(modules: Iterable[Module], shapes: Shapes) -> Iterator[Pair]:
    """The two matrices of each layer of low rank."""
    for module in modules:
        down, up = f"{module.name}.down.weight", f"{module.name}.up.weight"
        if module.side and {down, up} <= shapes.keys():
            yield Pair(shapes[down][0], (Span(down, 0, ((0,),)),), (Span(up, 1, ((0,),)),))


def _rows(module: Module, outputs: int) -> int:
    """Along which dimension a module's outputs are; layers of low rank are never transposed."""
    return 0 if module.side else outputs


@dataclass(frozen=True)
class _Place:
    """Where a block has its heads: `n_groups` of `per_group` queries of `size` numbers, each with a key and a value.

    Attributes:
        modules: of queries, keys, values; with the side of a layer of low rank at which heads are.
        output: of what reads the values, likewise.
    """

    modules: tuple[Module, Module, Module]
    output: Module
    by_group: bool
    size: int
    per_group: int
    n_groups: int
    outputs: int
    shapes: Shapes

    @classmethod
    def of(
        cls, branch: BoundBranch, heads: Heads, architecture: Architecture, shapes: Shapes, outputs: int
    ) -> "_Place | None":
        """As shapes tell it; None where they tell nothing that makes sense."""
        thin = architecture.low_ranks
        full = [f"{branch.block}.{name}" for name in (heads.queries, heads.keys, heads.values)]
        modules = [Module(name, side="up" if name in thin else "") for name in full]
        [output] = branch.writes
        output = Module(output.name, side="down" if output.name in thin else "")
        n_heads = architecture.config.get(architecture.family.n_heads)
        names = {module.weight for module in (*modules, output)}
        if type(n_heads) is not int or n_heads < 1 or not names <= shapes.keys():
            return None
        size, rest = divmod(shapes[output.weight][1 - _rows(output, outputs)], n_heads)
        if rest or not size:
            return None
        queries, keys, values = modules
        n_values, rest = divmod(shapes[values.weight][_rows(values, outputs)], size)
        fused = queries == keys == values
        n_groups, odd = divmod(n_values - n_heads, 2) if fused else (n_values, 0)
        if rest or odd or n_groups < 1 or n_heads % n_groups:
            return None
        return cls(
            (queries, keys, values), output, heads.by_group, size, n_heads // n_groups, n_groups, outputs, shapes
        )

    def pairs(self, turned: int) -> Iterator[Pair]:
        """Values and output; keys and queries from number `turned` of each head on, if there are any."""
        queries, keys, values = self.modules
        inputs = tuple(
            tuple((group * self.per_group + query) * self.size for query in range(self.per_group))
            for group in range(self.n_groups)
        )
        yield Pair(
            self.size,
            tuple(self._spans(values, self._starts(2, 0))),
            (Span(self.output.weight, 1 - _rows(self.output, self.outputs), inputs),),
        )
        if turned < self.size:
            yield Pair(
                self.size - turned,
                tuple(self._spans(keys, self._starts(1, turned))),
                tuple(self._spans(queries, self._starts(0, turned))),
            )

    def _spans(self, module: Module, starts: tuple[tuple[int, ...], ...]) -> Iterator[Span]:
        yield Span(module.weight, _rows(module, self.outputs), starts)
        if module.bias in self.shapes:
            yield Span(module.bias, 0, starts)

    def _starts(self, what: int, first: int) -> tuple[tuple[int, ...], ...]:
        """Of each group, where its queries, its key or its value (0, 1, 2) begin among a module's outputs."""
        per_group, n_queries = self.per_group, self.per_group * self.n_groups
        fused = self.modules[0] == self.modules[1]
        places = []
        for group in range(self.n_groups):
            heads: tuple[int, ...] = (group * per_group, group, group)
            if fused and self.by_group:
                heads = tuple(group * (per_group + 2) + within for within in (0, per_group, per_group + 1))
            elif fused:
                heads = group * per_group, n_queries + group, n_queries + self.n_groups + group
            count = 1 if what else per_group
            places.append(tuple((heads[what] + number) * self.size + first for number in range(count)))
        return tuple(places)


def _turned(heads: Heads, config: Mapping[str, Any], block: int, size: int) -> int:
    """How many numbers of a head of queries or keys, from the first on, need the basis they have."""
    if heads.turned == NOTHING or (heads.turned == UNLESS_ALIBI and config.get("alibi") is True):
        return 0
    if heads.turned == BY_BLOCK:
        turns = config.get("no_rope_layers")
        return 0 if isinstance(turns, list) and len(turns) > block and turns[block] == 0 else size
    if heads.turned == IN_PART:
        told = config.get("rope_parameters")
        told = told if isinstance(told, Mapping) else config
        parts = [told.get(key) for key in ("partial_rotary_factor", "rotary_pct") if key in told]
        part = parts[0] if parts else 1.0
        return int(size * part) if isinstance(part, int | float) and 0 <= part <= 1 else size
    return size
