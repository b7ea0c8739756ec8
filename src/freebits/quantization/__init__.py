"""Round matrices to a target size, bit rate or KL divergence, with the least change of the model's output.

To add a quantizer, write one module and add one entry to `quantizers.QUANTIZERS`. Code that encodes the rounded
matrices belongs in `codecs`.
"""
