"""Quantise a checkpoint folder into a packed one."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freebits.checkpoint import ENTRY, Checkpoint, CheckpointWriter, Source, new_directory, shard_bytes
from freebits.codes import CODES
from freebits.errors import CheckpointError, UsageError
from freebits.huggingface.blockwise import BlockwiseModel
from freebits.huggingface.loading import device_of, one_line_errors
from freebits.huggingface.own_text import own_windows
from freebits.huggingface.packed_models import inner_config
from freebits.huggingface.sensitivities import measure_sensitivities
from freebits.huggingface.tokens import drawn_windows, token_windows
from freebits.kind import FLOATS, Kind
from freebits.moves import LOSSY
from freebits.options import INTEGERS
from freebits.packed import (
    STEM,
    Contents,
    PackedFolder,
    Piece,
    Recipe,
    announced,
    digests_of,
    history_of,
    plain,
    publish,
    stage,
    staged,
)
from freebits.quantization import DAMPING, Budget, Rolling, Sensitivity, row_steps, stepped, whitener
from freebits.report import inspect, opened
from freebits.version import __version__
from freebits.work import Progress, ordered_map, silent, workers

BITS = 4.0
SAMPLES, WINDOW = 32, 256
_TOGETHER = 1 << 22
"""Numbers that are coded together at least, where a block has as many."""
_AROUND = 2048
"""Bytes for the history and what else the manifest and `config.json` say once."""


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: float | None = None,
    target_size: int | None = None,
    calibration: str | None = None,
    samples: int = SAMPLES,
    seq_len: int = WINDOW,
    seed: int = 0,
    device: str = "cpu",
    entropy: str = "auto",
    jobs: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quantise the matrices of any causal language model: lossy.

    Args:
        model: folder of a dense or sliced checkpoint, or of a packed canonical one.
        out: folder to create; it appears complete or not at all.
        bits: for each number of a matrix on average, everything counted that the matrices take; by default 4.
        target_size: instead, bytes that the finished folder takes at most, as `inspect` counts them.
        calibration: text; by default the model writes its own.
        samples: windows of calibration text.
        seq_len: tokens a window.
        seed: of everything that is drawn.
        device: where to run the model.
        entropy: stage for what is not quantised, as in `pack`.
        jobs: matrices to round at once.
        progress: called after each step.

    Returns:
        What `inspect(out)` says.

    Raises:
        UsageError: an argument makes no sense.
        CheckpointError: `model` is no sound checkpoint, or `out` exists.
        UnsupportedModelError: transformers does not run it, or not block by block.
    """
    if bits is not None and target_size is not None:
        raise UsageError("--bits and --target-size are two targets: give one")
    if bits is not None and not 1 <= bits <= 12:
        raise UsageError(f"bits {bits}: give a number from 1 to 12")
    code = stage(entropy)
    source = opened(model)
    with one_line_errors(model, "model"):
        config = inner_config(source.config).from_dict(dict(source.config))
    blockwise = BlockwiseModel(source, config, device_of(device))
    with new_directory(out) as directory:
        scratch = directory / "scratch"
        scratch.mkdir()
        tokens = _tokens(source.path, calibration, samples, seq_len, seed, blockwise.device, progress)
        shelf = Shelf(scratch)
        for part in measure_sensitivities(blockwise, tokens, scratch, seed, progress):
            shelf.add(part, source)
        contents = _write(directory, source, shelf, BITS if bits is None else bits, target_size, code, jobs, progress)
        shutil.rmtree(scratch)
        move = {
            "move": INTEGERS,
            "fidelity": LOSSY,
            "text": "its own" if calibration is None else "given",
            "samples": len(tokens),
            "seq_len": seq_len,
            "seed": seed,
            "bytes": {key: n for key, n in inspect(model)["bytes"].items() if n is not None},
            "producer": f"freebits {__version__}",
        }
        before = source.manifest.history if isinstance(source, PackedFolder) else history_of(source.config)
        publish(directory, source, contents, source.config, entropy, [*before, move])
        return inspect(directory)


def _tokens(
    path: Path, text: str | None, samples: int, seq_len: int, seed: int, device: torch.device, progress: Progress
) -> Tensor:
    """The calibration windows, (samples, seq_len)."""
    if text is None:
        return own_windows(path, samples, seq_len, seed, device, progress)
    return drawn_windows(token_windows(path, text, seq_len), samples, 0, seed)[0]


class Shelf:
    """What is known of each matrix, in files until it is rounded.

    Attributes:
        budgets: of each matrix.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._places: dict[str, tuple[Path, Tensor]] = {}
        self.budgets: dict[str, Budget] = {}

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Of a matrix `U` and its rows' steps."""
        path, rows = self._places[name]
        return torch.from_numpy(np.load(path)), rows

    def add(self, part: Mapping[str, Sensitivity], source: Source) -> None:
        """Take in a part of the model; matrices with one Gram matrix share what is made of it."""
        made: dict[int, Path] = {}
        for name, sensitivity in part.items():
            key = id(sensitivity.gram)
            if key not in made:
                made[key] = self._directory / f"{len(self._places)}.npy"
                np.save(made[key], whitener(sensitivity.gram, DAMPING).float().numpy())
            self._places[name] = (made[key], row_steps(sensitivity.information))
            U, rows = self[name]
            self.budgets[name] = Budget.of(source[name], rows, U.diagonal())


def _write(
    directory: Path,
    source: Checkpoint | PackedFolder,
    shelf: Shelf,
    bits: float,
    size: int | None,
    stage: str | None,
    jobs: int | None,
    progress: Progress,
) -> Contents:
    """Round and write everything."""
    contents, groups = Contents(), _groups(source, shelf)
    rest = [name for name in source.kinds if name not in shelf.budgets]
    longest = {f"{group[0]}.message": Kind("U8", (1 << 39,)) for group in groups}
    names = announced({name: source.kinds[name] for name in rest} | longest)
    shards = shard_bytes(source) if isinstance(source, Checkpoint) else None
    with workers(jobs) as executor, CheckpointWriter(directory, names, shards, STEM) as writer:
        for name in rest:
            piece = staged(plain({name: source[name]}), stage)
            contents.write(writer, piece, digests_of(piece))
        wanted = bits * sum(source.kinds[name].numel for name in shelf.budgets)
        if size is not None:
            wanted = 8.0 * (size - _bytes_around(source, contents, groups, names))
        rolling = Rolling([Budget.sum(shelf.budgets[name] for name in group) for group in groups], wanted)
        for done, group in enumerate(groups, start=1):
            c = rolling.next()
            while True:
                rounded = ordered_map(executor, partial(_rounded, source, shelf, c), group)
                piece = _piece(source, group, [tensor for tensors in rounded for tensor in tensors])
                if rolling.spend(c, 8.0 * sum(kind.n_bytes for kind, _ in piece.stored.values())):
                    break
                c *= 1.002
            contents.write(writer, piece, digests_of(piece))
            progress(done, len(groups))
    return contents


def _rounded(source: Source, shelf: Shelf, c: float, name: str) -> tuple[Tensor, Tensor, Tensor]:
    result = stepped(source[name], *shelf[name], c)
    return result.integers, result.rows, result.columns


def _piece(source: Source, group: Sequence[str], tensors: list[Tensor]) -> Piece:
    makes = {name: source.kinds[name] for name in group}
    coded = CODES[INTEGERS].encode(tensors, list(makes.values()))
    takes = {part: f"{group[0]}.{part}" for part in coded.parts}
    stored = {takes[part]: (Kind.of(tensor), tensor) for part, tensor in coded.parts.items()}
    return Piece(stored, (Recipe(INTEGERS, takes, makes, coded.params),))


def _groups(source: Source, shelf: Shelf) -> list[list[str]]:
    """Matrices that are coded together: as many as follow each other in a block and are small."""
    groups: list[list[str]] = []
    size = _TOGETHER
    for name in sorted(shelf.budgets, key=lambda name: (_is_in_block(name), _numbers(name))):
        if size >= _TOGETHER or not groups or _numbers(name)[:1] != _numbers(groups[-1][0])[:1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += source.kinds[name].numel
    return groups


def _is_in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _bytes_around(
    source: Source, contents: Contents, groups: Sequence[Sequence[str]], names: Mapping[str, tuple[int, ...]]
) -> int:
    """At most what the finished folder has besides the messages: other tensors, headers, manifest, config."""
    tensors = sum(kind.n_bytes for kind in contents.stored.values())
    header = sum(len(name) + len(str(list(shape))) + ENTRY for name, shape in names.items())
    planned = [
        Recipe(INTEGERS, {"message": f"{group[0]}.message"}, {n: source.kinds[n] for n in group}, {"bytes": 10**12})
        for group in groups
    ]
    recipes = sum(len(json.dumps(recipe.facts)) + 1 for recipe in (*contents.recipes, *planned))
    digests = sum(len(name) + 40 for name in (*contents.stored, *(f"{group[0]}.message" for group in groups)))
    return tensors + header + recipes + digests + 3 * len(json.dumps(dict(source.config), indent=4)) + _AROUND
