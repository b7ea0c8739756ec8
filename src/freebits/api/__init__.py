"""The public Python functions, one file per command. They check arguments, call other packages and write a folder.

Algorithms belong in the other packages. Parsing of arguments and printing belong in `cli`.
"""
