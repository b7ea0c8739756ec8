"""Zero-shot accuracies from local files agree with accuracies that the tests compute from log-likelihoods."""

import bz2
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import freebits
from freebits.cli.main import main
from freebits.integrations.loading import load_tokenizer
from tests.tiny import Make, random_text

Choices = list[tuple[str, str]]
"""Pairs of a context and a possible continuation."""

N = 11
"""Number of documents of each task."""


@pytest.fixture
def documents(tmp_path: Path) -> dict[str, list[tuple[Choices, int]]]:
    """Write the files of three tasks. Return task → the choices in lm-eval's prompt and the label of each document."""
    piqa = [
        {"goal": random_text(3, n), "sol1": random_text(2, n + 50), "sol2": random_text(4, n + 90)} for n in range(N)
    ]
    winogrande: list[dict[str, Any]] = [
        {
            "context_options": [random_text(4, n), random_text(4, n + 50)],
            "continuation": random_text(3, n + 90),
            "gold": n % 2,
        }
        for n in range(N)
    ]
    hellaswag = [(random_text(3, n), n % 4, [random_text(1 + e, 4 * n + e + 50) for e in range(4)]) for n in range(N)]
    for name in ("piqa", "winogrande", "hellaswag"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data/piqa/valid.jsonl").write_text("".join(json.dumps(item) + "\n" for item in piqa))
    (tmp_path / "data/piqa/valid-labels.lst").write_text("".join(f"{n % 2}\n" for n in range(N)))
    (tmp_path / "data/winogrande/winogrande.jsonl").write_text("".join(json.dumps(item) + "\n" for item in winogrande))
    lines = [line for query, gold, endings in hellaswag for line in (query, str(gold), *endings)]
    with bz2.open(tmp_path / "data/hellaswag/hellaswag_val_full.txt.bz2", "wt") as file:
        file.write("\n".join(lines))
    return {
        "piqa": [
            ([(f"Question: {item['goal']}\nAnswer:", item[key]) for key in ("sol1", "sol2")], n % 2)
            for n, item in enumerate(piqa)
        ],
        "winogrande": [
            ([(option, item["continuation"]) for option in item["context_options"]], n % 2)
            for n, item in enumerate(winogrande)
        ],
        "hellaswag": [([(query, ending) for ending in endings], gold) for query, gold, endings in hellaswag],
    }


@torch.no_grad()
def accuracy(folder: Path, documents: list[tuple[Choices, int]], normalized: bool) -> float:
    model, tokenizer = freebits.load(folder, dtype=torch.float32).eval(), load_tokenizer(folder)
    n_correct = 0
    for choices, gold in documents:
        scores = []
        for context, continuation in choices:
            n_context = len(tokenizer(context)["input_ids"])
            tokens = torch.tensor(tokenizer(f"{context} {continuation}")["input_ids"])
            log_p = model(tokens[None]).logits[0].log_softmax(-1)
            score = sum(log_p[i - 1, tokens[i]].item() for i in range(n_context, len(tokens)))
            scores.append(score / len(continuation) if normalized else score)
        n_correct += max(range(len(scores)), key=scores.__getitem__) == gold
    return n_correct / len(documents)


def test_accuracies_follow_from_the_log_likelihoods(
    documents: dict[str, list[tuple[Choices, int]]], save_tiny: Make, slice_tiny: Make, tmp_path: Path
) -> None:
    folder = slice_tiny(save_tiny())
    measured = freebits.evaluate(
        folder, text=random_text(600, 0), seq_len=32, tasks=list(documents), data_dir=tmp_path / "data"
    )["tasks"]
    assert list(measured) == list(documents)
    for name, items in documents.items():
        assert measured[name]["acc"] == pytest.approx(accuracy(folder, items, normalized=False)), name
        assert 0 < measured[name]["acc_stderr"] < 0.2
        if (
            name != "winogrande"
        ):  # lm-eval has no acc_norm for winogrande, because the choices have the same continuation
            assert measured[name]["acc_norm"] == pytest.approx(accuracy(folder, items, normalized=True)), name
    assert measured["winogrande"]["acc_norm"] is None


@pytest.mark.usefixtures("documents")
def test_the_command_prints_the_accuracies(save_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(random_text(100, 0))
    command = ["eval", str(save_tiny()), "--text", str(tmp_path / "text.txt"), "--seq-len", "32", "--limit", "3"]
    command += ["--tasks", "piqa,winogrande", "--data-dir", str(tmp_path / "data")]
    assert main(command) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert [line.split()[:2] for line in output.out.splitlines()[2:]] == [
        ["piqa", "acc"],
        ["piqa", "acc_norm"],
        ["winogrande", "acc"],
    ]
    assert main([*command, "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert tasks["piqa"]["acc"] in [pytest.approx(n / 3) for n in range(4)]  # --limit also limits documents
    assert {"acc", "acc_norm"} <= tasks["winogrande"].keys()


@pytest.mark.usefixtures("documents")
def test_unknown_tasks_and_unreadable_files_give_a_one_line_error(
    save_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(random_text(100, 0))
    data = tmp_path / "data"
    (data / "winogrande/winogrande.jsonl").unlink()
    (data / "piqa/valid-labels.lst").write_text("0\n")
    (data / "hellaswag/hellaswag_val_full.txt.bz2").write_text("no bzip2")
    command = ["eval", str(save_tiny()), "--text", str(tmp_path / "text.txt"), "--seq-len", "32", "--tasks"]
    for task, fact in (
        ("nothing", "'nothing'"),
        ("arc_easy", "task arc_easy"),
        ("winogrande", "winogrande.jsonl"),
        ("arc_challenge_chat,glue", "'glue'"),  # a tag, which has no result of its own
        ("piqa", "valid.jsonl and valid-labels.lst"),
        ("hellaswag", "hellaswag_val_full.txt.bz2"),
    ):
        assert main([*command, task, "--data-dir", str(data)]) == 2, task
        error = capsys.readouterr().err
        assert error.startswith("freebits: error: ")
        assert error.count("\n") == 1
        assert fact in error
    monkeypatch.setitem(sys.modules, "freebits.evaluation.zero_shot_tasks", None)
    assert main([*command, "piqa"]) == 2
    assert "freebits[eval]" in capsys.readouterr().err
