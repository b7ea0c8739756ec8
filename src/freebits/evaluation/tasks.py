"""Zero-shot accuracy, measured by lm-eval: its prompts, its scoring, its standard errors."""

import bz2
import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from freebits.errors import CheckpointError, UsageError
from freebits.execution.progress import Progress, silent

BATCH = 16
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")

_LOCAL = "local "
"""How the groups are called in which local tasks stand."""

Documents = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class LocalTask:
    """A task of lm-eval whose documents are read from the files that its authors give away."""

    files: tuple[str, ...]
    documents: Callable[..., Documents]
    """From the lines of the files, in their order."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Where lm-eval finds prompt, choices and answer, if not under the names they have on the hub."""


def _piqa(items: list[str], labels: list[str]) -> Documents:
    for item, label in zip(items, labels, strict=True):
        yield json.loads(item) | {"label": int(label)}


def _winogrande(items: list[str]) -> Documents:
    return map(json.loads, items)


def _hellaswag(lines: list[str]) -> Documents:
    for start in range(0, len(lines), 6):
        query, label, *choices = lines[start : start + 6]
        if len(choices) != 4:
            raise ValueError(f"{len(choices)} endings after line {start + 2}")
        yield {"query": query, "label": int(label), "choices": choices}


LOCAL_TASKS = {
    "piqa": LocalTask(("valid.jsonl", "valid-labels.lst"), _piqa),
    "winogrande": LocalTask(
        ("winogrande.jsonl",),
        _winogrande,
        {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"},
    ),
    "hellaswag": LocalTask(("hellaswag_val_full.txt.bz2",), _hellaswag, {"process_docs": None}),
}
"""What a data folder can hold: a folder of the task's name with these files."""


Task = str | dict[str, Any]
"""What lm-eval is told of a task: its name, or also where its documents are."""


def prepare(names: Sequence[str], data_dir: Path | None = None) -> list[Task]:
    """The tasks of those names, ready for `zero_shot`.

    Args:
        names: tasks that lm-eval knows.
        data_dir: read the documents below this folder (see `LOCAL_TASKS`), not from the hub.

    Raises:
        UsageError: there is no such task, or a file below `data_dir` cannot be read.
        CheckpointError: a file below `data_dir` is damaged.
    """
    known = _known_tasks()
    for name in names:
        if name not in (*known.all_subtasks, *known.all_groups):
            raise UsageError(f"lm-eval knows no task {name!r}: lm-eval ls tasks lists them")
    return list(names) if data_dir is None else [_local(name, data_dir) for name in names]


def zero_shot(
    model: Any, tokenizer: Any, tasks: Sequence[Task], *, limit: int | None = None, progress: Progress = silent
) -> dict[str, dict[str, float | None]]:
    """Accuracy of a loaded model on tasks of lm-eval, without examples in the prompt.

    Args:
        model: as `load` gives it.
        tokenizer: the model's.
        tasks: what `prepare` gives.
        limit: the first so many documents of each task.
        progress: called after each batch, in requests.

    Returns:
        For each task `acc`, `acc_norm` (likelihoods divided by the answer's length) and their standard errors
        `acc_stderr`, `acc_norm_stderr`, None where the task has no such metric; and what other metrics it has.

    Raises:
        UsageError: the documents cannot be had, or lm-eval cannot run the model on them.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars, which would show in pipes, too
        try:
            loaded = _known_tasks().load(list(tasks))
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=0)
            results = evaluate(_Reporting(model, tokenizer, progress), loaded, limit=limit, log_samples=False)
        except Exception as error:  # its kinds of error, and the hub's, are many and change
            finding = " ".join(str(error).split())[:200] or type(error).__name__
            hint = ": offline, give --data-dir" if any(isinstance(task, str) for task in tasks) else ""
            raise UsageError(f"lm-eval cannot measure the tasks ({finding}){hint}") from error
    return {name: _metrics(metrics) for name, metrics in results["results"].items() if not name.startswith(_LOCAL)}


@cache
def _known_tasks() -> TaskManager:
    """All of lm-eval's tasks, which take it seconds to find."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _metrics(measured: Mapping[str, Any]) -> dict[str, float | None]:
    named = {key.removesuffix(",none"): value for key, value in measured.items() if isinstance(value, float)}
    return dict.fromkeys(METRICS) | named


def _local(name: str, data_dir: Path) -> dict[str, Any]:
    """What lm-eval is to be told of a task whose documents are on this machine."""
    if name not in LOCAL_TASKS:
        raise UsageError(f"task {name} is not read from local files ({', '.join(LOCAL_TASKS)} are): drop --data-dir")
    task = LOCAL_TASKS[name]
    folder = data_dir / name
    lines = [_lines(folder / file) for file in task.files]
    try:
        documents = Dataset.from_list(list(task.documents(*lines)))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} does not hold {' and '.join(task.files)} as distributed ({error})") from None
    changes = {"custom_dataset": lambda **_: {"validation": documents}, "training_split": None, **task.config}
    return {"group": _LOCAL + name, "task": [{"task": name, **changes}]}  # only a group can change a task


def _lines(path: Path) -> list[str]:
    try:
        with (bz2.open if path.suffix == ".bz2" else open)(path, "rt", encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]  # and at no other separator, which a text may hold
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): --data-dir wants it there") from None


class _Reporting(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's view of a transformers model, which tells how far it is."""

    def __init__(self, model: Any, tokenizer: Any, progress: Progress) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        self._report = partial(progress, "measuring tasks", "request")
        self.done = self.total = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.done, self.total = 0, len(requests)
        likelihoods: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        self._report(self.total, self.total)  # requests that share a forward pass are not counted on the way
        return likelihoods

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self.done += len(inps)
        self._report(self.done, self.total)
        return logits
