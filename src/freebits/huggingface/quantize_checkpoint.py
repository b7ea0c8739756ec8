"""Quantise a checkpoint folder into a packed one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.checkpoint import Checkpoint, Task, check_key, located, new_directory, sign, text_digest
from freebits.errors import UnsupportedModelError, UsageError
from freebits.huggingface.blockwise import BlockwiseModel
from freebits.huggingface.naming import InMemory, known_config
from freebits.huggingface.own_text import own_windows
from freebits.huggingface.rounding import Goal, write_rounded
from freebits.huggingface.sensitivities import measure_sensitivities
from freebits.huggingface.shelf import Shelf
from freebits.huggingface.tokens import drawn_windows, token_windows
from freebits.moves import LOSSY
from freebits.options import EMBEDDINGS, HADAMARD, INTEGERS, PARTS, ROTATIONS
from freebits.packed import PackedFolder, history_of, publish, stage
from freebits.quantization import Budget, Sensitivity
from freebits.report import inspect, known_sizes, opened, write_card
from freebits.version import __version__
from freebits.work import Crew, Progress, Team, device_of, silent

SAMPLES, WINDOW = 32, 256


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: float | None = None,
    target_size: int | None = None,
    target_kl: float | None = None,
    method: str = INTEGERS,
    rotate: str = "none",
    only: str | None = None,
    calibration: str | None = None,
    samples: int = SAMPLES,
    seq_len: int = WINDOW,
    seed: int = 0,
    device: str = "cpu",
    entropy: str = "auto",
    jobs: int | None = None,
    team: Team | None = None,
    resume: bool = True,
    sign_with: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quantise the matrices of any causal language model: lossy.

    Args:
        model: folder of a dense or sliced checkpoint, or of a packed canonical one.
        out: folder to create; it appears complete or not at all.
        bits: for each number of a matrix on average, everything counted that the matrices take; by default 4.
        target_size: instead, bytes that the finished folder takes at most, as `inspect` counts them.
        target_kl: instead, KL divergence in nats a token that is to be expected on text as the model writes it.
        method: `integers` of any size, at steps worth the same everywhere, entropy-coded; `pyramid` vectors; or, to
            compare with, `gptq` and `rtn`: whole bits in groups of 64, with feedback and to the nearest.
        rotate: `hadamard` rounds each matrix rotated on both sides and turns it back when it is decoded: integers gain
            nothing by that, the other methods much.
        only: quantise only the matrices of the blocks (`linear`), or those of embedding and head (`embeddings`).
        calibration: text; by default the model writes its own.
        samples: windows of calibration text.
        seq_len: tokens a window.
        seed: of everything that is drawn.
        device: where to run the model.
        entropy: stage for what is not quantised, as in `pack`.
        jobs: matrices to round at once.
        team: who measures, if not this process alone: Ray, or processes of a cluster, among whom windows of text are
            spread. Whoever leads does the rounding.
        resume: go on with what a stopped run of the same arguments left, block by block.
        sign_with: file of a private key (PEM), with which every file of the folder is signed; see `verify`.
        progress: called after each step.

    Returns:
        What `inspect(out)` says; of a process that does not lead nothing.

    Raises:
        UsageError: an argument makes no sense.
        CheckpointError: `model` is no sound checkpoint, or `out` exists.
        UnsupportedModelError: transformers does not run it, or not block by block.
    """
    check_key(sign_with)
    goal = Goal(bits, target_size, target_kl, method)
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs {jobs}: give at least one")
    if rotate not in ROTATIONS or only not in (None, *PARTS):
        raise UsageError(f"there is no rotation {rotate!r} or no part {only!r}: see freebits quantize --help")
    code, model = stage(entropy), located(model)
    said = {"method": method, "bits": bits, "size": target_size, "kl": target_kl, "rotate": rotate, "only": only}
    said |= {"samples": samples, "seq_len": seq_len, "seed": seed, "device": device, "entropy": entropy}
    team = team or Team(jobs)
    task = Task("quantize", Path(model), said | {"text": text_digest(calibration)}, team, resume)
    with new_directory(out, task) as directory, team.crew(task.desk(directory)) as crew:
        prepared = prepare(
            *(model, crew),
            rotate=rotate,
            only=only,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            progress=progress,
        )
        if not crew.leads:
            return {}
        prepared.write(directory, goal, entropy, code, jobs, progress)
        write_card(directory, prepared.source.path)
        if sign_with is not None:
            sign(directory, sign_with)
        return inspect(directory)


@dataclass(frozen=True)
class Prepared:
    """A model of which is known how much depends on each of its matrices.

    Attributes:
        source: the model.
        shelf: what is known.
        facts: how that was measured, for the history.
        sizes: what `inspect` says of the model's.
    """

    source: Checkpoint | PackedFolder
    shelf: Shelf
    facts: Mapping[str, Any]
    sizes: Mapping[str, int]

    def expected_kl(self, bits: float) -> float:
        """KL divergence in nats a token, on text as the model writes it, at so many bits a number on average."""
        budgets = list(self.shelf.budgets.values())
        n_numbers = sum(self.source.kinds[name].numel for name in self.shelf.budgets)
        return float(Budget.sum(budgets).c(bits * n_numbers)) ** 2 * n_numbers / 24

    def write(
        self, directory: Path, goal: Goal, entropy: str, code: str | None, jobs: int | None, progress: Progress
    ) -> None:
        """Round it, and make a packed folder of that."""
        contents = write_rounded(directory, self.source, self.shelf, goal, code, jobs, progress)
        move = {
            "move": goal.method,
            "fidelity": LOSSY,
            **goal.facts,
            **self.facts,
            "bytes": dict(self.sizes),
            "producer": f"freebits {__version__}",
        }
        source = self.source
        before = source.manifest.history if isinstance(source, PackedFolder) else history_of(source.config)
        publish(directory, source, contents, source.config, (goal.method, entropy), [*before, move])


def prepare(
    model: str | os.PathLike[str],
    crew: Crew,
    *,
    rotate: str = "none",
    only: str | None = None,
    calibration: str | None = None,
    samples: int = SAMPLES,
    seq_len: int = WINDOW,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Prepared:
    """Measure how much a model depends on each of its matrices; arguments as of `quantize`.

    What is found lies on the crew's desk, which must last as long as it is used.
    """
    source = opened(model)
    if source.config.get("quantization_config"):
        raise UnsupportedModelError(
            f"the weights in {source.path} are quantised already: take the model they came from"
        )
    config = known_config(source, model)
    named = InMemory(source, config)
    blockwise = BlockwiseModel(named, config, device_of(device))
    transposed = {name for of in blockwise.transposed for name in named.origins(of)}
    write = partial(_tokens, source.path, calibration, samples, seq_len, seed, blockwise.device)
    tokens = crew.agree("text", write, progress)
    shelf = Shelf(crew, seed if rotate == HADAMARD else None, transposed)
    embeddings = {blockwise.embedding, blockwise.head}
    stacked = [
        of for number in range(len(blockwise.blocks)) for of in blockwise.matrices(number) if not named.origins(of)
    ]
    if stacked:
        raise UnsupportedModelError(
            f"{stacked[0]} is part of a stack in the file, too: experts are quantised one by one"
        )
    for part, found in measure_sensitivities(blockwise, tokens, crew, seed, progress):
        if found is not None:
            found = {n: s for n, s in found.items() if only is None or (n in embeddings) == (only == EMBEDDINGS)}
            found = _as_stored(found, named)
        shelf.add(part, found, source)
    text = "its own" if calibration is None else "given"
    facts = {"rotate": rotate, "text": text, "samples": len(tokens), "seq_len": seq_len, "seed": seed}
    return Prepared(source, shelf, facts, known_sizes(model))


def _as_stored(part: Mapping[str, Sensitivity], named: InMemory) -> dict[str, Sensitivity]:
    """The same by the names of the checkpoint, where what is one matrix in memory may be several."""
    return {
        name: Sensitivity(sensitivity.gram, sensitivity.information[rows])
        for matrix, sensitivity in part.items()
        for name, rows in named.origins(matrix).items()
    }


def _tokens(
    path: Path, text: str | None, samples: int, seq_len: int, seed: int, device: torch.device, progress: Progress
) -> Tensor:
    """The calibration windows, (samples, seq_len)."""
    if text is None:
        return own_windows(path, samples, seq_len, seed, device, progress)
    return drawn_windows(token_windows(path, text, seq_len), samples, 0, seed)[0]
