"""Round matrices to a target size, bit rate or KL divergence, with little change of the model's output.

To add a quantizer, write one module, and see `quantizers`. Code that encodes the rounded matrices belongs in `codecs`.
"""
