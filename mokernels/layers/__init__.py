"""Modules that hold a checkpoint's tensors under the checkpoint's own names."""

from mokernels.layers.explain import Explanation, explain
from mokernels.layers.finish import finish_loading
from mokernels.layers.linear import (
    FP8Linear,
    MXFP8Linear,
    NVFP4Linear,
    QuantizedLinear,
    StoredSpec,
    linear_class,
    stored_weight,
)
from mokernels.layers.siblings import Siblings, link_siblings, separate_projections
from mokernels.layers.swap import (
    ACTIVATION_CHOICES,
    attach_kv_scales,
    check_activation_choice,
    choose_activation,
    make_layer,
)
from mokernels.layers.trainable import FakeQuantizedLinear, SharedWeightScale

__all__ = [
    "ACTIVATION_CHOICES",
    "Explanation",
    "FP8Linear",
    "FakeQuantizedLinear",
    "MXFP8Linear",
    "NVFP4Linear",
    "QuantizedLinear",
    "SharedWeightScale",
    "Siblings",
    "StoredSpec",
    "attach_kv_scales",
    "check_activation_choice",
    "choose_activation",
    "explain",
    "finish_loading",
    "linear_class",
    "link_siblings",
    "make_layer",
    "separate_projections",
    "stored_weight",
]
