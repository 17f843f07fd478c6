"""``mokernels demo``: a real model, quantized, written, loaded, asked and measured.

Nothing here is imported before the command runs; transformers and the hub's client take seconds.
"""
