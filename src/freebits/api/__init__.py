"""The public Python functions, one file per command. They check arguments, call other packages and write a folder.

Algorithms belong in those packages; parsing and printing belong in `cli`.
"""
