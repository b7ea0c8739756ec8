"""Pairs of matrices whose inner space has a free basis.

If a model computes `x A B` without an operation between `A` and `B`, the matrices `A G` and `G⁻¹ B` give the same
function for every invertible `G: (r, r)`. The `r` outputs of `A` form the inner *space* of the pair. The two matrices
of a low-rank layer are a pair. A head of attention has two pairs: the value matrix with the output matrix, and the
query matrix with the key matrix, without the components of queries and keys that positions rotate or a norm scales.
Queries that share a key and a value also share the spaces of this key and this value.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from freebits.models.architecture import Architecture, BoundBranch, Module, Part
from freebits.models.families import ALL_UNLESS_ALIBI, BY_BLOCK, LEADING_COMPONENTS, NO_COMPONENTS, Heads

Shapes = Mapping[str, tuple[int, ...]]

_PLAIN_SETTINGS = (
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("bias", "lora_bias", "use_dora", "trainable_token_indices", "inference_mode"),
    *("eva_config", "loftq_config"),  # used only for initialization
    *("qalora_group_size", "megatron_core"),  # without effect unless a setting outside this list is set
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_type", "peft_version"),
)
"""Settings of PEFT's LoRA under which the output of a layer depends on its two matrices only through their product."""
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "olora", "pissa", "loftq", "orthogonal")
"""Values of `init_lora_weights` under which the output depends on the matrices only through their product, too."""


@dataclass(frozen=True)
class Span:
    """The positions of the spaces of a pair along a dimension of a tensor.

    Attributes:
        name: name of the tensor.
        dim: the dimension.
        starts: for each space, the indices at which it begins; a space may occur several times in the tensor.
    """

    name: str
    dim: int
    starts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Pair:
    """The tensors that share one or more inner spaces of the same size.

    Attributes:
        size: `r`, the size of each space.
        writes: tensors that write to the spaces, to be multiplied by `G`. The first of them is a matrix that contains
            each space once.
        reads: tensors that read the spaces, to be multiplied by the inverse of `G`.
    """

    size: int
    writes: tuple[Span, ...]
    reads: tuple[Span, ...]

    @property
    def n_spaces(self) -> int:
        """The number of spaces."""
        return len(self.writes[0].starts)

    @property
    def names(self) -> list[str]:
        """The names of all tensors of the pair."""
        return [span.name for span in (*self.writes, *self.reads)]


def find_pairs(architecture: Architecture | None, part: Part, shapes: Shapes, *, dense: bool) -> tuple[Pair, ...]:
    """Return the pairs in a part, ordered so that changing a pair does not undo the canonical form of an earlier pair.

    Args:
        architecture: the architecture of the model; None for a LoRA adapter.
        part: the part.
        shapes: shapes of the tensors of the model, by name.
        dense: whether matrices are stored as in the dense model, which in some families means transposed.
    """
    if architecture is None:
        return tuple(_adapter_pairs(part, shapes))
    output_dim = 1 if dense and architecture.family.transposed else 0
    per_block = len(architecture.family.sublayers)
    pairs: list[Pair] = []
    for sub in part.sublayers:
        for branch in sub.branches:
            pairs += _low_rank_pairs(branch.reads, shapes)
            heads = branch.names.heads
            if heads is not None:
                positions = _HeadPositions.of(branch, heads, architecture, shapes, output_dim)
                if positions is not None:
                    block = (sub.site - 1) // per_block
                    pairs += positions.pairs(_n_fixed(heads, architecture.config, block, positions.size))
            pairs += _low_rank_pairs(branch.writes, shapes)
    return tuple(pairs)


def _adapter_pairs(part: Part, shapes: Shapes) -> Iterator[Pair]:
    """Yield the pair `A: (r, inputs)` and `B: (outputs, r)` of each layer, found by their names in PEFT."""
    for name in part.weights:
        other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        down, up = shapes.get(name, ()), shapes.get(other, ())
        if name != other and len(down) == len(up) == 2 and down[0] == up[1]:
            yield Pair(down[0], (Span(name, 0, ((0,),)),), (Span(other, 1, ((0,),)),))


def unproven_settings(adapter: Mapping[str, Any]) -> list[str]:
    """Return the settings of a PEFT adapter under which a layer may depend on more than the product of its matrices.

    An adapter with such a setting can only be packed bit for bit.

    Args:
        adapter: the content of `adapter_config.json`.
    """
    if adapter.get("peft_type") != "LORA":
        return [f"peft_type {adapter.get('peft_type')}"]
    proven = {*_PLAIN_SETTINGS, "init_lora_weights"}
    unproven = [key for key, value in adapter.items() if value and key not in proven]
    initialization = adapter.get("init_lora_weights", True)
    return unproven if initialization in _PLAIN_INITIALIZATIONS else [*unproven, f"init_lora_weights {initialization}"]


def _low_rank_pairs(modules: Iterable[Module], shapes: Shapes) -> Iterator[Pair]:
    """Yield the pair of matrices of each low-rank layer."""
    for module in modules:
        down, up = f"{module.name}.down.weight", f"{module.name}.up.weight"
        if module.side and {down, up} <= shapes.keys():
            yield Pair(shapes[down][0], (Span(down, 0, ((0,),)),), (Span(up, 1, ((0,),)),))


def _output_dim(module: Module, output_dim: int) -> int:
    """Return the dimension of the outputs in a module's matrix. Matrices of low-rank layers are never transposed."""
    return 0 if module.side else output_dim


@dataclass(frozen=True)
class _HeadPositions:
    """The positions of the heads of attention in the matrices of a block.

    Attributes:
        modules: modules that compute queries, keys and values. For a low-rank layer, `side` selects the matrix that
            contains the heads.
        output: module that reads the values, with the same meaning of `side`.
        by_group: order of the outputs of a fused module; see `Heads`.
        size: number of components per head.
        per_group: number of queries in a group, which also has one key and one value.
        n_groups: number of groups.
        output_dim: dimension of the outputs in matrices of layers that are not low-rank.
        shapes: shapes of the tensors of the model.
    """

    modules: tuple[Module, Module, Module]
    output: Module
    by_group: bool
    size: int
    per_group: int
    n_groups: int
    output_dim: int
    shapes: Shapes

    @classmethod
    def of(
        cls, branch: BoundBranch, heads: Heads, architecture: Architecture, shapes: Shapes, output_dim: int
    ) -> "_HeadPositions | None":
        """Return the positions, derived from shapes.

        Return None if a matrix is missing or the shapes do not fit the number of heads.
        """
        low_rank = architecture.low_ranks
        full_names = [f"{branch.block}.{name}" for name in (heads.queries, heads.keys, heads.values)]
        modules = [Module(name, side="up" if name in low_rank else "") for name in full_names]
        [output] = branch.writes
        output = Module(output.name, side="down" if output.name in low_rank else "")
        n_heads = architecture.config.get(architecture.family.n_heads)
        names = {module.weight for module in (*modules, output)}
        if type(n_heads) is not int or n_heads < 1 or not names <= shapes.keys():
            return None
        size, remainder = divmod(shapes[output.weight][1 - _output_dim(output, output_dim)], n_heads)
        if remainder or not size:
            return None
        queries, keys, values = modules
        n_outputs, remainder = divmod(shapes[values.weight][_output_dim(values, output_dim)], size)
        fused = queries == keys == values
        n_groups, odd = divmod(n_outputs - n_heads, 2) if fused else (n_outputs, 0)
        if remainder or odd or n_groups < 1 or n_heads % n_groups:
            return None
        return cls(
            (queries, keys, values), output, heads.by_group, size, n_heads // n_groups, n_groups, output_dim, shapes
        )

    def pairs(self, n_fixed: int) -> Iterator[Pair]:
        """Yield the pair of value matrix and output matrix, then the pair of query matrix and key matrix.

        The second pair leaves out the first `n_fixed` components of each head.
        """
        queries, keys, values = self.modules
        inputs = tuple(
            tuple((group * self.per_group + query) * self.size for query in range(self.per_group))
            for group in range(self.n_groups)
        )
        yield Pair(
            self.size,
            tuple(self._spans(values, self._starts(2, 0))),
            (Span(self.output.weight, 1 - _output_dim(self.output, self.output_dim), inputs),),
        )
        if n_fixed < self.size:
            yield Pair(
                self.size - n_fixed,
                tuple(self._spans(keys, self._starts(1, n_fixed))),
                tuple(self._spans(queries, self._starts(0, n_fixed))),
            )

    def _spans(self, module: Module, starts: tuple[tuple[int, ...], ...]) -> Iterator[Span]:
        yield Span(module.weight, _output_dim(module, self.output_dim), starts)
        if module.bias in self.shapes:
            yield Span(module.bias, 0, starts)

    def _starts(self, role: int, offset: int) -> tuple[tuple[int, ...], ...]:
        """Return, for each group, the outputs at which its queries, its key or its value begin.

        Args:
            role: 0 for queries, 1 for the key, 2 for the value.
            offset: number of outputs to skip at the start of each head.
        """
        per_group, n_queries = self.per_group, self.per_group * self.n_groups
        fused = self.modules[0] == self.modules[1]
        starts = []
        for group in range(self.n_groups):
            first_heads: tuple[int, ...] = (group * per_group, group, group)
            if fused and self.by_group:
                first_heads = tuple(group * (per_group + 2) + index for index in (0, per_group, per_group + 1))
            elif fused:
                first_heads = group * per_group, n_queries + group, n_queries + self.n_groups + group
            count = 1 if role else per_group
            starts.append(tuple((first_heads[role] + number) * self.size + offset for number in range(count)))
        return tuple(starts)


def _n_fixed(heads: Heads, config: Mapping[str, Any], block: int, size: int) -> int:
    """Return how many leading components of a query or key head have a fixed basis."""
    if heads.fixed == NO_COMPONENTS or (heads.fixed == ALL_UNLESS_ALIBI and config.get("alibi") is True):
        return 0
    if heads.fixed == BY_BLOCK:
        rotates = config.get("no_rope_layers")
        return 0 if isinstance(rotates, list) and len(rotates) > block and rotates[block] == 0 else size
    if heads.fixed == LEADING_COMPONENTS:
        rope = config.get("rope_parameters")
        rope = rope if isinstance(rope, Mapping) else config
        fractions = [rope.get(key) for key in ("partial_rotary_factor", "rotary_pct") if key in rope]
        fraction = fractions[0] if fractions else 1.0
        return int(size * fraction) if isinstance(fraction, int | float) and 0 <= fraction <= 1 else size
    return size
