"""The fake quantization launchers against the operators' definition, bit for bit."""

from __future__ import annotations

import pytest

from mokernels.ops.launch import fake_quantize as launch
from mokernels.ops.registry import reference_of
from tests.kernels.activations import every_float, normal, scalar, targets
from tests.support.compare import assert_same_bits


@every_float
@pytest.mark.parametrize("name", ["fp8", "fp8_per_token", "nvfp4", "mxfp8"])
def test_activations(device, name, dtype):
    extra = {"fp8": (scalar(0.004, device),), "nvfp4": (scalar(0.0007, device),)}.get(name, ())
    for x in (normal(5, 96, dtype=dtype), normal(6, 64, dtype=dtype).mT.contiguous().mT):
        x = x.to(device)
        result = getattr(launch, f"fake_quantize_{name}")(x, *extra, target=targets()[0])
        assert_same_bits(result, reference_of(f"fake_quantize_{name}")(x, *extra).contiguous())


@every_float
@pytest.mark.parametrize("case", ["tensor", "channel", "block", "shared", "nvfp4", "global"])
def test_weights(device, case, dtype):
    weight = normal(130, 160, dtype=dtype).to(device)
    name = "nvfp4_weight" if case in ("nvfp4", "global") else "fp8_weight"
    extra = {
        "shared": ("block", scalar(5.0, device)),
        "nvfp4": (),
        "global": (scalar(0.002, device),),
    }.get(case, (case,))
    result = getattr(launch, f"fake_quantize_{name}")(weight, *extra, target=targets()[0])
    assert_same_bits(result, reference_of(f"fake_quantize_{name}")(weight, *extra))
