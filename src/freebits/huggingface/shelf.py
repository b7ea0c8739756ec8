"""What is known of each matrix of a model, on a desk until it is rounded."""

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from freebits.checkpoint import Source
from freebits.codes.rotated import rotated
from freebits.errors import CheckpointError
from freebits.kind import Kind
from freebits.options import HADAMARD
from freebits.packed import Recipe
from freebits.quantization import DAMPING, Budget, Sensitivity, row_steps, whitener
from freebits.work import Crew, Desk, kept

TRANSPOSED = "transposed"


@kept
@dataclass(frozen=True)
class Known:
    """What is known of a matrix: where its `U` lies, its rows' steps, and the counts of its budget."""

    key: str
    rows: Tensor
    counts: Tensor


@dataclass(frozen=True)
class _Item:
    """A Gram matrix, and the information of the rows of those matrices that share it, by their names."""

    key: str
    gram: Tensor
    information: dict[str, Tensor] = field(default_factory=dict)


class Shelf:
    """What is known of each matrix, on a desk until it is rounded.

    Attributes:
        budgets: of each matrix.
        seed: of the rotation in which matrices are rounded; None for none.
        transposed: names of the matrices that are stored as (inputs, outputs).

    Args:
        crew: whose desk it is, and who does the work.
        seed: see above.
        transposed: see above.
        label: of this shelf, where the desk has several.
    """

    def __init__(self, crew: Crew, seed: int | None, transposed: Collection[str], label: str = "") -> None:
        self._crew = crew
        self._label = label
        self._places: dict[str, tuple[str, Tensor]] = {}
        self.budgets: dict[str, Budget] = {}
        self.seed = seed
        self.transposed = frozenset(transposed)

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Of a matrix `U` and its rows' steps."""
        key, rows = self._places[name]
        return self._desk.get(key), rows

    @property
    def _desk(self) -> Desk:
        if self._crew.desk is None:
            raise LookupError("a shelf without a desk")
        return self._crew.desk

    def add(self, part: str, found: Mapping[str, Sensitivity] | None, source: Source) -> None:
        """Take in a part of the model; matrices with one Gram matrix share what is made of it.

        Args:
            part: its name.
            found: what was measured, by the names of the source; None where it lies on the desk.
            source: the model.
        """
        stage = f"{self._label}{part}"
        items: dict[int, _Item] = {}
        for name, sensitivity in (found or {}).items():
            if not (sensitivity.gram.isfinite().all() and sensitivity.information.isfinite().all()):
                raise CheckpointError(f"what {name} reads or leads to is not finite: the model overflows or is damaged")
            of_gram = items.setdefault(id(sensitivity.gram), _Item(f"whitener-{stage}-{len(items)}", sensitivity.gram))
            of_gram.information[name] = sensitivity.information
        known: dict[str, Known] = {}
        if not self._crew.has(f"known-{stage}"):
            for some in self._crew.share(
                f"rows-{stage}", partial(_whitened, self._desk, source, self.seed, self.transposed), items.values()
            ):
                known |= some
        known = self._crew.agree(f"known-{stage}", dict, known)
        self._places |= {name: (of.key, of.rows) for name, of in known.items()}
        self.budgets |= {name: Budget(of.counts.numpy()) for name, of in known.items()}

    def only(self, names: Collection[str]) -> "Shelf":
        """The same for some of the matrices."""
        some = copy(self)
        some.budgets = {name: budget for name, budget in self.budgets.items() if name in names}
        return some

    def matrix(self, source: Source, name: str) -> Tensor:
        """A matrix as it is rounded."""
        return _matrix(source, self.seed, self.transposed, name)

    def recipes(self, makes: Mapping[str, Kind]) -> tuple[dict[str, Kind], tuple[Recipe, ...]]:
        """What is rounded in the place of some matrices, and how they are made of it."""
        recipes: list[Recipe] = []
        rounded: dict[str, Kind] = {}
        for name, kind in makes.items():
            now, of = name, kind
            if name in self.transposed:
                now, of = f"{name}.transposed", Kind(kind.code, kind.shape[::-1])
                recipes.append(Recipe(TRANSPOSED, {TRANSPOSED: now}, {name: kind}))
            if self.seed is not None:
                turned = Kind("F32", of.shape)
                recipes.append(Recipe(HADAMARD, {"rotated": f"{now}.rotated"}, {now: of}, {"seed": self.seed}))
                now, of = f"{now}.rotated", turned
            rounded[now] = of
        return rounded, tuple(reversed(recipes))


def _matrix(source: Source, seed: int | None, transposed: Collection[str], name: str) -> Tensor:
    W = source[name].T if name in transposed else source[name]
    return W if seed is None else rotated(W, seed)


def _whitened(
    desk: Desk, source: Source, seed: int | None, transposed: Collection[str], item: _Item
) -> dict[str, Known]:
    """Lay `U` of a Gram matrix on the desk; what is known of the matrices that share it."""
    of, gram = item.information, item.gram
    if seed is not None:  # a rotation spreads over all rows what is known of each
        gram = rotated(gram, seed)
        of = {name: information.mean().expand(len(information)) for name, information in of.items()}
    U = whitener(gram, DAMPING).float()
    desk.put(item.key, U)
    rows = {name: row_steps(information) for name, information in of.items()}
    budgets = {n: Budget.of(_matrix(source, seed, transposed, n), rows[n], U.diagonal()) for n in of}
    return {name: Known(item.key, rows[name], torch.from_numpy(budgets[name].counts)) for name in of}
