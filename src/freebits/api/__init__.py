"""The Python functions of all commands that write a checkpoint, and the function `estimate`.

Such a function checks its arguments, calls other packages and writes a folder. Functions that only measure a checkpoint
are in `evaluation`. Algorithms belong in the other packages; parsing of arguments and printing belong in `cli`.
"""
