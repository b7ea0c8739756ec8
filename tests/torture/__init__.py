"""Long tests of damaged folders, disturbed runs and power cuts: `make torture`. They take an hour.

    python -m tests.torture [--only PART,…] [--scratch FOLDER]

The results are written to `benchmarks/results/torture.json` and to the table in `docs/reliability.md`.
"""
