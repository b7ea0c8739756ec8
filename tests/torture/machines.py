"""The same file on other machines: thread counts, instruction sets, versions of PyTorch and NumPy."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.torture.findings import Finding

ROOT = Path(__file__).parent.parent.parent
THREADS = ("1", "2", "3", "8")
CAPABILITIES = ("default", "avx2", "avx512")
MOST_STEPS = 2
"""By so many steps of the last bit may a word of bits-back or of a pyramid differ."""


def machines(pythons: Iterable[str]) -> list[Finding]:
    """The golden folders decoded everywhere, `pythons` being other environments' with freebits' dependencies."""
    findings = []
    for python in (sys.executable, *pythons):
        results = [decoded(python, threads, capability) for threads in THREADS for capability in CAPABILITIES]
        finding = Finding(
            "machines", f"golden folders decoded with {results[0]['with']}, by threads and instruction sets"
        )
        words = differ = most = 0
        for result in results:
            for codec, (count, others, steps) in result["found"].items():
                finding.times += 1
                finding.harmless += steps <= MOST_STEPS
                finding.silent += steps > MOST_STEPS or (codec in ("canonical", "integers", "gptq") and others > 0)
                words, differ, most = words + count, differ + others, max(most, steps)
        reached = ", ".join(sorted({result["capability"] for result in results}))
        finding.notes = [f"{differ} of {words:,} words otherwise, by {most} steps at most ({reached})"]
        findings.append(finding)
    return findings


def decoded(python: str, threads: str, capability: str) -> dict[str, Any]:
    """What one environment makes of them."""
    settings = {"OMP_NUM_THREADS": threads, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT / "src")}
    [*_, newest] = sorted((ROOT / "tests" / "golden").glob("v*"))
    done = subprocess.run(
        [python, str(ROOT / "tests" / "torture" / "decode.py"), str(newest)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result
