"""One module for each command: `add` declares its arguments, `run` calls it, prints, and returns the exit code.

A new command takes one file here and one name in `parser.COMMANDS`. `run` imports what it needs, which keeps `--help`
fast.
"""
