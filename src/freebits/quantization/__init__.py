"""Rounds matrices so that the model's output changes least, to a target size, bit rate or KL divergence.

A new quantizer takes one file, a case in `rounding.Goal.round_matrix` and an entry in `rounding._PART_NAMES`. Coding
the integers belongs in `codecs`.
"""
