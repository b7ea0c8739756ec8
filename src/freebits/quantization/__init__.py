"""Round matrices to a target size, bit rate or KL divergence, with little change of the model's output.

To add a quantizer, write one module, add one entry to `quantizers.QUANTIZERS`, and add the name to `METHODS` in
`freebits.options`. Code that encodes the rounded matrices belongs in `codecs`.
"""
