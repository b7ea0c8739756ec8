"""The command line: it parses arguments, calls `api` and `evaluation`, and prints.

A new command needs one file in `commands`. PyTorch and transformers are imported only when a command needs them.
"""
