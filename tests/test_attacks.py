"""A hostile folder causes at most an error of one line, in little time and memory. None of its code runs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import freebits
from tests.attacks import load_all
from tests.attacks.bases import make_bases
from tests.tiny import Make

ROOT = Path(__file__).parent.parent
MAX_SECONDS, MAX_BYTES = 10.0, 2**30
HARMLESS = {
    # attacks that freebits does not refuse, because they cause no damage
    "config_with_other_code",
    "positions_by_the_trillion",
    "link_without_end_beside_the_weights",
    "reason_with_escapes_for_the_terminal",
    "history_that_makes_no_sense",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that contains a sound folder of each kind."""
    folder = tmp_path_factory.mktemp("bases")
    make_bases(folder)
    return folder


@pytest.fixture(scope="module")
def results(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Attack name → results of its commands. One process runs all attacks."""
    scratch = tmp_path_factory.mktemp("scratch")
    command = [sys.executable, "-m", "tests.attacks.run", str(bases), str(scratch)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-2000:]
    by_attack: dict[str, list[dict[str, Any]]] = {}
    for result in json.loads(process.stdout):
        by_attack.setdefault(result["attack"], []).append(result)
    return by_attack


@pytest.mark.parametrize("name", load_all())
def test_an_attack_does_no_harm(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    for result in results[name]:
        assert result["code"] in (0, 1, 2), result
        assert result["code"] != 2 or result["lines"] == 1, result
        assert result["printable"], result
        assert result["seconds"] < MAX_SECONDS, result
        assert result["memory"] < MAX_BYTES, result
        assert not result["left"], result
        assert not result["ran"], result
    refused = any(result["code"] == 2 for result in results[name])
    assert refused == (name not in HARMLESS), results[name]


def test_the_slowest_and_the_largest_attack_are_reported(
    results: dict[str, list[dict[str, Any]]], report: Callable[[str], None]
) -> None:
    runs = [result for of_attack in results.values() for result in of_attack]
    slowest = max(runs, key=lambda result: float(result["seconds"]))
    largest = max(runs, key=lambda result: int(result["memory"]))
    report(
        f"{len(results)} attacks, {len(runs)} runs: at most {slowest['seconds']:.1f} s ({slowest['attack']}), "
        f"{largest['memory'] / 1e6:.0f} MB ({largest['attack']})"
    )


def test_packing_does_not_follow_links_out_of_a_folder(save_tiny: Make, tmp_path: Path) -> None:
    from tests.attacks.paths import link_to_a_secret

    dense = save_tiny()
    link_to_a_secret(dense)
    freebits.pack(dense, tmp_path / "out", codec="none")
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
