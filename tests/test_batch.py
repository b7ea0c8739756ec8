"""Lists of commands."""

import json
from pathlib import Path
from typing import Any

import pytest

from freebits import Team
from freebits.cli import main
from freebits.cli.batch import Ran, run_list
from tests.conftest import content
from tests.tiny import Make


def results(ran: list[Ran]) -> list[str]:
    return [one.result for one in ran]


def test_a_list_is_run_whatever_becomes_of_a_line(
    save_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = save_tiny()
    (tmp_path / "list").write_text(
        f"# what is wanted\n\ninspect missing\npack '{dense}' one --codec none --json # bit for bit\n", encoding="utf-8"
    )
    assert main(["batch", "list", "--json"]) == 1
    lines: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["lines"]
    assert [line["result"] for line in lines] == ["failed", "done"]
    assert "missing is not a folder" in lines[0]["said"]
    assert json.loads(lines[1]["said"])["codec"] == "none"
    before = content(tmp_path / "one")
    (tmp_path / "list").write_text(f"pack {dense} one --codec none\n", encoding="utf-8")
    assert main(["batch", "list"]) == 0
    assert "there" in capsys.readouterr().out
    assert content(tmp_path / "one") == before


def test_ranks_divide_a_list(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    list_ = tmp_path / "list"
    for name in "abc":
        (tmp_path / name).mkdir()
    list_.write_text("".join(f"pack {dense} {tmp_path / name}\n" for name in "abc"), encoding="utf-8")
    lines = [[one.line for one in run_list(list_, Team(1, rank=rank, world=2))] for rank in (0, 1)]
    assert [line.rpartition("/")[2] for line in lines[0] + lines[1]] == ["a", "c", "b"]
    assert results(run_list(list_, Team(2))) == ["there"] * 3


def test_a_list_on_ray(save_tiny: Make, tmp_path: Path) -> None:
    dense, list_ = save_tiny(), tmp_path / "list"
    list_.write_text(f"pack {dense} {tmp_path / 'one'} --codec none\n", encoding="utf-8")
    assert results(run_list(list_, Team(backend="ray"))) == ["done"]
    assert (tmp_path / "one" / "freebits.json").is_file()


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("pack model out --codec zip", "line 2: argument --codec: invalid choice"),
        ("batch other", "line 2: a list of lists"),
        ("pack 'model", "line 2: No closing quotation"),
        ("pack --help", "line 2: "),
    ],
)
def test_a_list_with_a_line_that_is_none_is_not_begun(
    line: str, finding: str, save_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list_ = tmp_path / "list"
    list_.write_text(f"pack {save_tiny()} {tmp_path / 'one'} --codec none\n{line}\n", encoding="utf-8")
    assert main(["batch", str(list_)]) == 2
    assert finding in capsys.readouterr().err
    assert not (tmp_path / "one").exists()
    assert main(["batch", str(tmp_path / "no list")]) == 2
