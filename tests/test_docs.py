"""The commands, examples, links and figures in the documentation are correct."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import freebits
from freebits.cli.main import main
from tests.tiny import random_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_commands_and_the_example_in_the_readme_run(
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("MODEL", hidden_size=64, intermediate_size=160, max_position_embeddings=512)
    (tmp_path / "text.txt").write_text(random_text(4 * 512 + 100))
    commands = [line for snippet in snippets("bash") for line in snippet.splitlines() if line.startswith("freebits ")]
    assert len(commands) >= 4
    for command in commands:
        verifies = " verify " in command
        extra = ["--text", "text.txt", "--limit", "1"] if verifies else []
        exit_code = main([*shlex.split(command, comments=True)[1:], *extra])
        accepted = (0, 1) if verifies else (0,)  # 1, because a tiny random model may differ by more than 1 %
        assert exit_code in accepted, command
    [example] = snippets("python")
    capsys.readouterr()
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102
    assert len(capsys.readouterr().out.split()) > 10


def test_the_commands_on_the_choosing_page_run(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "BASE"):
        save_tiny(name, hidden_size=64, intermediate_size=160, max_position_embeddings=512)
    (tmp_path / "text.txt").write_text(random_text(4 * 512 + 100))
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    commands = re.findall(r"```bash\n(.*?)\n```", page, flags=re.DOTALL)
    assert {"compress", "pack", "report"} <= {command.split()[1] for command in commands}
    for command in commands:
        calibrated = ["--calibration", "text.txt"] if "--max-kl" in command else []
        extra = ["--text", "text.txt"] if {"report", "--max-kl"} & {*command.split()} else []
        extra = ["--samples", "8", "--force"] if "recover" in command else extra
        assert main([*shlex.split(command)[1:], *calibrated, *extra]) == 0, command


def normalized_lines(text: str) -> list[str]:
    """Return the lines with numbers and spacing normalized, because these differ between models."""
    return [re.sub(r"[-+]?[\d,]*\.?\d+ ?%?", "#", " ".join(line.split())) for line in text.strip().splitlines()]


def test_the_commands_on_the_session_page_print_the_output_shown_there(
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("MODEL", hidden_size=64, intermediate_size=160, max_position_embeddings=512, tie_word_embeddings=True)
    page = (ROOT / "docs" / "session.md").read_text(encoding="utf-8")
    [session] = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    [script] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for step in session.split("$ ")[1:]:
        command, _, output = step.partition("\n")
        if command == "python generate.py":
            exec(compile(script, "generate.py", "exec"), {})  # noqa: S102
            assert len(capsys.readouterr().out.split()) > 10
            continue
        assert main([*shlex.split(command)[1:], *(["--force"] if "compress" in command else [])]) == 0
        assert normalized_lines(capsys.readouterr().out) == normalized_lines(output), command


def test_the_reference_documents_every_public_function() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    functions = [name for name in freebits.__all__ if name.islower() and not name.startswith("_")]
    documented = {target.rpartition(".")[2] for target in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    assert {*functions} <= documented


def test_local_links_lead_to_existing_files() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_walk_through_the_code_names_only_existing_code() -> None:
    walk = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    names = re.findall(r"`([A-Za-z_.]*[A-Z_.(][A-Za-z_.]*)`", walk[walk.index("1. ") :])
    assert len(names) > 20
    for name in names:
        assert all(
            re.search(rf"(def|class) {part}\b|^    {part} = ", source, re.MULTILINE) for part in name.split(".")
        ), name


def results_csv(name: str) -> str:
    """Return the content of a CSV file of results."""
    return (ROOT / "benchmarks" / "results" / f"{name}.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(("section", "name"), [("The race", "size_and_speed"), ("The entropy stage", "entropy")])
def test_the_tables_on_the_measurements_page_contain_the_results(section: str, name: str) -> None:
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    table = text[text.index(f"## {section}") :].partition("\n\n")[2]
    rows = [line for line in table.partition("\n## ")[0].splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    fields = {field.replace(",", "") for line in results_csv(name).splitlines() for field in line.split(",")}
    for row in rows:
        for cell in row.strip("|").split("|")[2:]:
            number = cell.strip().replace(",", "")
            assert not re.fullmatch(r"[\d.]+", number) or number in fields, row
