"""Fuzz the reader and the codes, guided by code coverage: `make fuzz`.

    python -m tests.fuzz CORPUS [-max_total_time=600 and other options of libFuzzer]

Needs atheris, which has wheels for Linux and Python 3.11 to 3.13. Add a test for each failure that it finds.
"""

import sys

import atheris

with atheris.instrument_imports(include=["freebits.packed", "freebits.codecs", "freebits.storage", "freebits.types"]):
    from tests.fuzz import spoiling


def run_one(data: bytes) -> None:
    """Run one input, whose bytes determine all random choices."""
    provider = atheris.FuzzedDataProvider(data)
    spoiling.run(lambda below: provider.ConsumeIntInRange(0, below - 1))


if __name__ == "__main__":
    atheris.Setup(sys.argv, run_one)
    atheris.Fuzz()
