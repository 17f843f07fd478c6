"""mokernels: NVIDIA ModelOpt checkpoints in plain PyTorch."""

from mokernels import ops as _ops  # noqa: F401
