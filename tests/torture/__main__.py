"""Run it all, or parts, and write the table."""

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
    from tests.torture.faults import Place

ROOT = Path(__file__).parent.parent.parent
SAVED = ROOT / "benchmarks" / "results" / "torture.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- make torture -->\n", "<!-- end -->\n"


def main() -> int:
    """Try, count, write; the exit code says whether something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by default all")
    parser.add_argument("--scratch", type=Path, help="folder for what is made (default: a temporary one)")
    parser.add_argument("--times", type=int, default=50, help="of each verb that is killed (default: %(default)s)")
    parser.add_argument("--pythons", default="", help="of other environments with freebits' dependencies, by commas")
    parser.add_argument("--zipnn", default="", help="Python of an environment with ZipNN")
    arguments = parser.parse_args()
    children.import_everything()
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as made:
        for part in arguments.only.split(","):
            scratch = Path(made) / part
            scratch.mkdir()
            findings += in_child(partial(PARTS[part], scratch, arguments), scratch)
    write(findings, arguments.only.split(","))
    return int(any(finding.bad for finding in findings if finding.part != "peers"))


def in_child(function: Callable[[], list[Finding]], scratch: Path) -> list[Finding]:
    """What a function finds, in a process of its own, so that this one never begins to compute."""

    def run() -> int:
        (scratch / "found").write_text(json.dumps([finding.as_json() for finding in function()]))
        return 0

    ended = children.started(run, scratch / "log").end()
    if ended.code:
        raise RuntimeError(ended.said[-3000:])
    return [Finding(**of) for of in json.loads((scratch / "found").read_text())]


def damage(scratch: Path, _: argparse.Namespace) -> list[Finding]:
    """Bits, ends and blocks."""
    from tests.torture.damage import demo_folder, every_bit, samples, small_folders

    found = [of for name, folder in small_folders(scratch / "small").items() for of in every_bit(folder, name)]
    return [*found, samples(demo_folder(scratch))]


def attacks(scratch: Path, _: argparse.Namespace) -> list[Finding]:
    """Hostile folders, as in the tests."""
    from tests.attacks.bases import make_bases
    from tests.attacks.run import run
    from tests.test_attacks import HARMLESS

    make_bases(scratch / "bases")
    (scratch / "scratch").mkdir()
    results = run(scratch / "bases", scratch / "scratch")
    finding = Finding(
        "attacks", f"hostile folders of {len({of['attack'] for of in results})} kinds, given to each verb"
    )
    for of in results:
        finding.times += 1
        finding.refused += of["code"] in (1, 2)
        finding.harmless += of["code"] == 0
        finding.tracebacks += of["code"] not in (0, 1, 2) or (of["code"] == 2 and of["lines"] != 1)
        finding.left += bool(of["left"]) or of["ran"]
    refused = {of["attack"] for of in results if of["code"] == 2}
    finding.silent = len({of["attack"] for of in results} - refused - HARMLESS)
    seconds, memory = (max(of[key] for of in results) for key in ("seconds", "memory"))
    finding.notes = [f"at most {seconds:.1f} s, {memory / 1e6:.0f} MB"]
    return [finding]


def faults(scratch: Path, arguments: argparse.Namespace) -> list[Finding]:
    """What happens to runs that write."""
    from tests.torture import faults

    draw, times = random.Random(0), arguments.times  # noqa: S311
    places, few = places_in(scratch), max(1, times // 10)
    return [
        faults.stopped(places, signal.SIGKILL, times, draw),
        faults.stopped(places, signal.SIGINT, few, draw),
        faults.stopped(places, signal.SIGTERM, few, draw),
        faults.no_room(places, few),
        faults.no_right(places),
        *faults.changed(places, few, draw),
        faults.two_writers(places, few),
        faults.no_memory(places, few, draw),
    ]


def power(scratch: Path, _: argparse.Namespace) -> list[Finding]:
    """Cuts of the power."""
    from tests.torture.power import power_cuts

    return power_cuts(places_in(scratch))


def machines(_: Path, arguments: argparse.Namespace) -> list[Finding]:
    """Other machines."""
    from tests.torture.machines import machines

    return machines(filter(None, arguments.pythons.split(",")))


def peers(_: Path, arguments: argparse.Namespace) -> list[Finding]:
    """Other readers."""
    from tests.torture.peers import peers

    return peers(arguments.zipnn or None)


def places_in(scratch: Path) -> list["Place"]:
    """One for each verb."""
    from tests.torture.faults import VERBS, Place

    bases = made_in_child(scratch)
    return [Place.of(scratch / name, bases, name) for name in VERBS]


def made_in_child(scratch: Path) -> Path:
    """Sound folders, so that this process has not begun to compute when it forks."""
    from tests.attacks.bases import make_bases

    def run() -> int:
        make_bases(scratch / "bases")
        return 0

    ended = children.started(run, scratch / "bases log").end()
    if ended.code:
        raise RuntimeError(ended.said[-3000:])
    return scratch / "bases"


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Finding]]] = {
    of.__name__: of for of in (attacks, damage, faults, power, machines, peers)
}


def write(findings: list[Finding], parts: list[str]) -> None:
    """Into the page, beside what other parts have found before."""
    saved = json.loads(SAVED.read_text()) if SAVED.exists() else []
    rows = [of for of in saved if of["part"] not in parts] + [finding.as_json() for finding in findings]
    rows.sort(key=lambda of: [*PARTS].index(of["part"]))
    SAVED.write_text(json.dumps(rows, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2], encoding="utf-8")
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
