"""Packed folders damaged by a grammar that knows their structure, with all digests recomputed.

`make fuzz` chooses the damage with atheris, a coverage-guided fuzzer. The regular tests choose it with hypothesis.
"""
