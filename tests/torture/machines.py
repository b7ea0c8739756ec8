"""Golden folders decoded with other numbers of threads, instruction sets, and versions of PyTorch and NumPy."""

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
MAX_ULPS = 2
"""Largest accepted difference of a value of bits-back or of a pyramid, in units in the last place."""


def machines(pythons: Iterable[str]) -> list[Finding]:
    """Decode the golden folders with this Python and with the Pythons of other environments, and count differences."""
    findings = []
    for python in (sys.executable, *pythons):
        results = [decode_golden(python, threads, capability) for threads in THREADS for capability in CAPABILITIES]
        environment = results[0]["with"]
        finding = Finding(
            "machines", f"golden folders decoded with {environment}: all thread counts and instruction sets"
        )
        n_values = n_different = max_ulps = 0
        for result in results:
            for codec, (count, different, ulps) in result["found"].items():
                finding.times += 1
                finding.harmless += ulps <= MAX_ULPS
                finding.silent += ulps > MAX_ULPS or (codec in ("canonical", "integers") and different > 0)
                n_values, n_different, max_ulps = n_values + count, n_different + different, max(max_ulps, ulps)
        capabilities = ", ".join(sorted({result["capability"] for result in results}))
        finding.notes = [f"{n_different} of {n_values:,} values differ, by at most {max_ulps} ULPs ({capabilities})"]
        findings.append(finding)
    return findings


def decode_golden(python: str, threads: str, capability: str) -> dict[str, Any]:
    """Run `decode.py` in one environment and return the JSON object that it prints."""
    settings = {"OMP_NUM_THREADS": threads, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT / "src")}
    [*_, newest] = sorted((ROOT / "tests" / "golden").glob("v*"))
    process = subprocess.run(
        [python, str(ROOT / "tests" / "torture" / "decode.py"), str(newest)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
    )
    result: dict[str, Any] = json.loads(process.stdout)
    return result
