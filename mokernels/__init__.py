"""NVIDIA ModelOpt checkpoints (FP8, NVFP4, MXFP8) in plain PyTorch.

Importing this registers ``torch.ops.mokernels.*`` and, once transformers is imported, teaches it to
load ModelOpt checkpoints. It imports neither transformers nor triton, and asks no device anything.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import mokernels.ops as _ops  # noqa: F401  (registers the operators)
from mokernels.checkpoint import check
from mokernels.checkpoint.load import load_into
from mokernels.errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    Finding,
    MissingDependencyError,
    MokernelsError,
    UnsupportedFormatError,
)
from mokernels.hf import hook as _hook
from mokernels.invariance import batch_invariant
from mokernels.layers import explain

if TYPE_CHECKING:
    from mokernels.hf.quantizer import ModelOptConfig

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "Finding",
    "MissingDependencyError",
    "ModelOptConfig",
    "MokernelsError",
    "UnsupportedFormatError",
    "batch_invariant",
    "check",
    "explain",
    "from_pretrained",
    "generate",
    "load_into",
    "release",
]


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    activations: str = "checkpoint",
    dtype: Any = "auto",
    device_map: Any = None,
    **options: Any,
) -> Any:
    """Load a ModelOpt checkpoint; see :func:`mokernels.hf.load.from_pretrained`."""
    from mokernels.hf.load import from_pretrained as load

    return load(path_or_id, activations=activations, dtype=dtype, device_map=device_map, **options)


def generate(
    model: Any,
    inputs: Any,
    *,
    compile: bool | str = "auto",
    cuda_graphs: bool | str = "auto",
    max_cache_len: int | None = None,
    **options: Any,
) -> Any:
    """Generate, compiled and with CUDA graphs; see :func:`mokernels.hf.generate.generate`."""
    from mokernels.hf.generate import generate as run

    ours: dict[str, Any] = {"compile": compile, "cuda_graphs": cuda_graphs}
    return run(model, inputs, max_cache_len=max_cache_len, **ours, **options)


def release(model: Any) -> None:
    """Free what :func:`generate` keeps of a model; see :func:`mokernels.hf.decoding.release`."""
    from mokernels.hf.decoding import release as free

    free(model)


def __getattr__(name: str) -> Any:
    # The configuration class needs transformers, which takes seconds to import.
    if name == "ModelOptConfig":
        from mokernels.hf.load import ModelOptConfig

        return ModelOptConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_hook.install()
