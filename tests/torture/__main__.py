"""Run the long tests, all parts or only some, and write the table of results."""

import argparse
import json
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.torture import children
from tests.torture.findings import Finding, table

if TYPE_CHECKING:
    from tests.torture.faults import Case

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "torture.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- make torture -->\n", "<!-- end -->\n"


def main() -> int:
    """Run the parts and write the results. Return 1 if any part but `peers` counted a bad run, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts (default: all)")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--times", type=int, default=50, help="number of kills of each command (default: %(default)s)")
    parser.add_argument(
        "--pythons", default="", help="comma-separated Pythons of other environments with freebits' dependencies"
    )
    parser.add_argument("--zipnn", default="", help="Python of an environment with ZipNN")
    arguments = parser.parse_args()
    children.import_everything()
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch_root:
        for part in arguments.only.split(","):
            scratch = Path(scratch_root) / part
            scratch.mkdir()
            findings += in_child(partial(PARTS[part], scratch, arguments), scratch)
    write(findings, arguments.only.split(","))
    return int(any(finding.bad for finding in findings if finding.part != "peers"))


def in_child(function: Callable[[], list[Finding]], scratch: Path) -> list[Finding]:
    """Run a function in a child process and return its findings. This process must not compute, because it forks."""

    def run() -> int:
        (scratch / "found").write_text(json.dumps([finding.as_json() for finding in function()]))
        return 0

    outcome = children.start_child(run, scratch / "log").wait()
    if outcome.exit_code:
        raise RuntimeError(outcome.output[-3000:])
    return [Finding(**row) for row in json.loads((scratch / "found").read_text())]


def damage(scratch: Path, _: argparse.Namespace) -> list[Finding]:
    """Flip bits, truncate files and exchange blocks of packed folders."""
    from tests.torture.damage import demo_folder, exhaustive_damage, random_flips, small_folders

    folders = small_folders(scratch / "small")
    findings = [finding for name, folder in folders.items() for finding in exhaustive_damage(folder, name)]
    return [*findings, random_flips(demo_folder(scratch))]


def attacks(scratch: Path, _: argparse.Namespace) -> list[Finding]:
    """Run the commands on the hostile folders that the regular tests use, too."""
    from tests.attacks.bases import make_bases
    from tests.attacks.run import run
    from tests.test_attacks import HARMLESS

    make_bases(scratch / "bases")
    (scratch / "scratch").mkdir()
    results = run(scratch / "bases", scratch / "scratch")
    attack_names = {result["attack"] for result in results}
    finding = Finding(
        "attacks", f"{len(attack_names)} kinds of hostile folders, given to inspect, pack or unpack, verify and eval"
    )
    for result in results:
        finding.times += 1
        finding.refused += result["code"] in (1, 2)
        finding.harmless += result["code"] == 0
        finding.tracebacks += result["code"] not in (0, 1, 2) or (result["code"] == 2 and result["lines"] != 1)
        finding.left += bool(result["left"]) or result["ran"]
    refused = {result["attack"] for result in results if result["code"] == 2}
    finding.silent = len(attack_names - refused - HARMLESS)
    seconds, memory = (max(result[key] for result in results) for key in ("seconds", "memory"))
    finding.notes = [f"at most {seconds:.1f} s, {memory / 1e6:.0f} MB"]
    return [finding]


def faults(scratch: Path, arguments: argparse.Namespace) -> list[Finding]:
    """Disturb runs that write."""
    from tests.torture import faults

    rng, times = random.Random(0), arguments.times  # noqa: S311
    cases, fewer_times = make_cases(scratch), max(1, times // 10)
    return [
        faults.send_signals(cases, signal.SIGKILL, times, rng),
        faults.send_signals(cases, signal.SIGINT, fewer_times, rng),
        faults.send_signals(cases, signal.SIGTERM, fewer_times, rng),
        faults.full_disk(cases, fewer_times),
        faults.read_only_target(cases),
        *faults.change_sources(cases, fewer_times, rng),
        faults.two_writers(cases, fewer_times),
        faults.out_of_memory(cases, fewer_times, rng),
    ]


def power(scratch: Path, _: argparse.Namespace) -> list[Finding]:
    """Simulate power cuts."""
    from tests.torture.power import power_cuts

    return power_cuts(make_cases(scratch))


def machines(_: Path, arguments: argparse.Namespace) -> list[Finding]:
    """Decode the golden folders in other environments."""
    from tests.torture.machines import machines

    return machines(filter(None, arguments.pythons.split(",")))


def peers(_: Path, arguments: argparse.Namespace) -> list[Finding]:
    """Flip bits in files that other libraries read."""
    from tests.torture.peers import peers

    return peers(arguments.zipnn or None)


def make_cases(scratch: Path) -> list["Case"]:
    """Prepare one case for each command."""
    from tests.torture.faults import COMMANDS, Case

    bases = make_bases_in_child(scratch)
    return [Case.prepare(scratch / name, bases, name) for name in COMMANDS]


def make_bases_in_child(scratch: Path) -> Path:
    """Make valid folders in a child process, because this process forks later and must not compute before."""
    from tests.attacks.bases import make_bases

    def run() -> int:
        make_bases(scratch / "bases")
        return 0

    outcome = children.start_child(run, scratch / "bases log").wait()
    if outcome.exit_code:
        raise RuntimeError(outcome.output[-3000:])
    return scratch / "bases"


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Finding]]] = {
    part.__name__: part for part in (attacks, damage, faults, power, machines, peers)
}


def write(findings: list[Finding], parts: list[str]) -> None:
    """Write the findings of `parts` to the results file and the page. Rows of other parts stay."""
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [row for row in saved if row["part"] not in parts] + [finding.as_json() for finding in findings]
    rows.sort(key=lambda row: [*PARTS].index(row["part"]))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    before, _, after = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + after.partition(END)[2], encoding="utf-8")
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
