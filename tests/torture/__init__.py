"""What must lose nothing and let nobody in, tried at length: `make torture`, an hour. Tests of every run try less.

    python -m tests.torture [--only PART,…] [--scratch FOLDER]

The table in `docs/reliability.md` is what comes of it.
"""
