"""Measure zero-shot accuracy with lm-eval, which defines prompts, scores and standard errors."""

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

from freebits.errors import CheckpointError, UsageError, reason_of
from freebits.execution.progress import Progress, silent

BATCH = 16
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")

_LOCAL = "local "
"""Prefix of the names of groups. A task with local documents is in a group of its own; see `_local`."""

Documents = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class LocalTask:
    """A task of lm-eval whose documents are read from the files that its authors distribute."""

    files: tuple[str, ...]
    documents: Callable[..., Documents]
    """Function that yields the documents, given the lines of each file in the order of `files`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings that replace those of lm-eval, where the documents have other fields than on the hub."""


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
"""Name of a task → its files, which must be in a folder of the same name in `data_dir`."""


Task = str | dict[str, Any]
"""A task as lm-eval accepts it: its name, or a dict that also contains its documents."""


def prepare(names: Sequence[str], data_dir: Path | None = None) -> list[Task]:
    """Check names of tasks, and prepare the tasks for `zero_shot`.

    Args:
        names: names of lm-eval tasks.
        data_dir: folder with the documents (see `LOCAL_TASKS`); if None, lm-eval reads them from the hub.

    Raises:
        UsageError: a task does not exist, or a file in `data_dir` cannot be read.
        CheckpointError: a file in `data_dir` is damaged.
    """
    manager = _task_manager()
    for name in names:
        if name not in (*manager.all_subtasks, *manager.all_groups):
            raise UsageError(f"lm-eval has no task {name!r}: run `lm-eval ls tasks` to list its tasks")
    return list(names) if data_dir is None else [_local(name, data_dir) for name in names]


def zero_shot(
    model: Any, tokenizer: Any, tasks: Sequence[Task], *, limit: int | None = None, progress: Progress = silent
) -> dict[str, dict[str, float | None]]:
    """Measure the accuracy of a loaded model on tasks of lm-eval, without examples in the prompt.

    Args:
        model: model as returned by `load`.
        tokenizer: tokenizer of the model.
        tasks: tasks as returned by `prepare`.
        limit: largest number of documents to use per task; None uses all.
        progress: callback, called after each batch with the number of finished requests.

    Returns:
        Name of a task → name of a metric → value. The metrics are `acc`, the fraction of right answers; `acc_norm`, the
        same with log-likelihoods divided by the length of the answer; `acc_stderr` and `acc_norm_stderr`, the standard
        errors of these two; and the other metrics of the task. If the task lacks one of the first four, its value is
        None.

    Raises:
        UsageError: the documents cannot be loaded, or lm-eval cannot run the model on them.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # hide lm-eval's progress bars, which also print to pipes
        try:
            loaded = _task_manager().load(list(tasks))
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=0)
            results = evaluate(_ReportingModel(model, tokenizer, progress), loaded, limit=limit, log_samples=False)
        except Exception as error:  # lm-eval and the hub raise many classes of errors
            reason = reason_of(error)
            hint = ": if you are offline, give `data_dir`" if any(isinstance(task, str) for task in tasks) else ""
            raise UsageError(f"lm-eval cannot measure the tasks ({reason}){hint}") from error
    return {name: _metrics(metrics) for name, metrics in results["results"].items() if not name.startswith(_LOCAL)}


@cache
def _task_manager() -> TaskManager:
    """Return an index of lm-eval's tasks. Building the index takes seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _metrics(measured: Mapping[str, Any]) -> dict[str, float | None]:
    """Return name of a metric → value. The names lack the suffix `,none`, with which lm-eval marks unfiltered results.

    A metric of `METRICS` that the task lacks has the value None.
    """
    metrics = {key.removesuffix(",none"): value for key, value in measured.items() if isinstance(value, float)}
    return dict.fromkeys(METRICS) | metrics


def _local(name: str, data_dir: Path) -> dict[str, Any]:
    """Return a task with documents from local files, in a form that lm-eval accepts."""
    if name not in LOCAL_TASKS:
        raise UsageError(
            f"task {name} cannot be read from local files, unlike {' and '.join(LOCAL_TASKS)}: leave out `data_dir`"
        )
    task = LOCAL_TASKS[name]
    folder = data_dir / name
    lines = [_lines(folder / file) for file in task.files]
    try:
        documents = Dataset.from_list(list(task.documents(*lines)))
    except (ValueError, KeyError, TypeError) as error:
        files = " and ".join(task.files)
        raise CheckpointError(f"{files} in {folder} cannot be parsed ({error}): download the files again") from None
    changes = {"custom_dataset": lambda **_: {"validation": documents}, "training_split": None, **task.config}
    return {"group": _LOCAL + name, "task": [{"task": name, **changes}]}  # only a group can override a task's settings


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file, which can be compressed with bzip2."""
    try:
        with (bz2.open if path.suffix == ".bz2" else open)(path, "rt", encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]  # `splitlines` also splits at separators inside texts
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}): download the file to this place, or leave out `data_dir`"
        ) from None


class _ReportingModel(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """A transformers model for lm-eval that reports progress."""

    def __init__(self, model: Any, tokenizer: Any, progress: Progress) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        self._report = partial(progress, "measuring tasks", "request")
        self.done = self.total = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.done, self.total = 0, len(requests)
        likelihoods: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        self._report(self.total, self.total)  # `_model_call` counts requests that share a forward pass as one
        return likelihoods

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self.done += len(inps)
        self._report(self.done, self.total)
        return logits
