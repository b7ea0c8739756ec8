"""Fuzz the reader and the codes, driven by coverage: `make fuzz`.

    python -m tests.fuzz CORPUS [-max_total_time=600 and other options of libFuzzer]

Needs atheris, which has wheels for Linux and Python 3.11 to 3.13. What it finds becomes a test.
"""

import sys

import atheris

with atheris.instrument_imports(include=["freebits.packed", "freebits.codecs", "freebits.storage", "freebits.types"]):
    from tests.fuzz import spoiling


def one(data: bytes) -> None:
    """One input: numbers to choose by."""
    provider = atheris.FuzzedDataProvider(data)
    spoiling.run(lambda below: provider.ConsumeIntInRange(0, below - 1))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
