"""The Python functions, one file for each command: they check arguments, call the packages below and publish a folder.

Algorithms belong in the packages below; parsing and printing belong in `cli`.
"""
