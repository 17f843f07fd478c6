"""The quick test of a tensor's values and the rules behind it agree on every value."""

from __future__ import annotations

import math

import pytest
import torch

from mokernels.checkpoint.values import layer_check
from mokernels.formats import FORMATS

BYTES = [
    ("FP8", "weight", torch.float8_e4m3fn),
    ("NVFP4", "weight_scale", torch.float8_e4m3fn),
    ("MXFP8", "weight_scale", torch.uint8),
]
TINY = torch.finfo(torch.float32).smallest_normal * 2.0**-23
FLOATS = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, TINY, -TINY, 42.0, 42.1]
SCALES = [
    ("FP8", "weight_scale"),
    ("FP8", "input_scale"),
    ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale"),
    ("FP8_PB_WO", "weight_scale"),
    ("NVFP4", "weight_scale_2"),
    ("NVFP4", "input_scale"),
]


def assert_agreement(format: str, leaf: str, tensor: torch.Tensor) -> None:
    check = layer_check(FORMATS[format], leaf, tensor.dtype)
    assert check is not None
    assert check.fine(tensor) is not any(bool(rule.bad(tensor).any()) for rule in check.rules)


@pytest.mark.parametrize(("format", "leaf", "dtype"), BYTES)
def test_every_byte(format: str, leaf: str, dtype: torch.dtype) -> None:
    for byte in range(256):
        alone = torch.tensor([byte], dtype=torch.uint8)
        assert_agreement(format, leaf, alone.view(dtype))
        among = torch.full((64,), 0x38, dtype=torch.uint8)
        among[33] = byte
        assert_agreement(format, leaf, among.view(dtype))


@pytest.mark.parametrize(("format", "leaf"), SCALES)
@pytest.mark.parametrize("value", FLOATS)
def test_special_floats(format: str, leaf: str, value: float) -> None:
    assert_agreement(format, leaf, torch.tensor(value))
    for position in (0, 33, 63):
        among = torch.full((64,), 0.5)
        among[position] = value
        assert_agreement(format, leaf, among)


def test_tensors_that_may_hold_anything() -> None:
    assert layer_check(FORMATS["NVFP4"], "weight", torch.uint8) is None
    # Reported for their dtype already.
    assert layer_check(FORMATS["FP8"], "weight", torch.uint8) is None
    assert layer_check(FORMATS["NVFP4"], "weight_scale", torch.float32) is None
    assert layer_check(FORMATS["FP8"], "input_scale", torch.bfloat16) is None
