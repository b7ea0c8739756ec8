"""One module for each command. `add` declares the arguments; `run` runs the command and returns the exit code.

A new command needs one file here and one name in `parser.COMMANDS`. The functions `run` contain the slow imports, so
that `--help` stays fast.
"""
