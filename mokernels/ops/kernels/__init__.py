"""Triton kernels, device code only. The host side is :mod:`mokernels.ops.launch`."""
