"""Signal to quantization noise: by hand, and the same whatever the pieces."""

import math

import pytest
import torch

from mokernels.numerics.noise import SignalToNoise, stored_decibels


def decibels(original, quantized):
    return SignalToNoise().add(torch.tensor(original), torch.tensor(quantized)).decibels


def test_by_hand():
    assert decibels([3.0, 4.0], [3.0, 3.5]) == pytest.approx(20.0)
    assert decibels([0.0, 0.0], [1.0, 1.0]) == -math.inf
    assert decibels([1.0, 1.0], [1.0, 1.0]) == math.inf
    assert SignalToNoise().decibels == math.inf


def test_pieces_add_up_to_the_whole():
    whole = torch.randn(64, 32).to(torch.bfloat16)
    quantized = whole.float() + 0.01 * torch.randn(64, 32)
    pieces = SignalToNoise()
    for rows in (slice(0, 7), slice(7, 40), slice(40, 64)):
        pieces.add(whole[rows], quantized[rows])
    assert pieces.decibels == pytest.approx(SignalToNoise().add(whole, quantized).decibels)
    assert pieces.decibels == pytest.approx(40, abs=1)


def test_json_knows_no_infinity():
    assert stored_decibels(31.41592) == 31.416
    assert stored_decibels(math.inf) is stored_decibels(-math.inf) is None
    assert stored_decibels(math.nan) is None
