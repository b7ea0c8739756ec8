"""Rounds matrices so that the model's output changes least, to a target size, bit rate or KL divergence.

A new quantizer takes one file and one entry in `quantizers.QUANTIZERS`. Coding the integers belongs in `codecs`.
"""
