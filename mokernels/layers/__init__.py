"""Modules that hold a checkpoint's tensors under the checkpoint's own names."""

from mokernels.layers.explain import Explanation, explain
from mokernels.layers.linear import (
    FP8Linear,
    MXFP8Linear,
    NVFP4Linear,
    QuantizedLinear,
    StoredSpec,
    linear_class,
)
from mokernels.layers.swap import attach_kv_scales, make_layer

__all__ = [
    "Explanation",
    "FP8Linear",
    "MXFP8Linear",
    "NVFP4Linear",
    "QuantizedLinear",
    "StoredSpec",
    "attach_kv_scales",
    "explain",
    "linear_class",
    "make_layer",
]
