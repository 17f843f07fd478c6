"""The NVFP4 kernels divide by multiplying with a reciprocal and correcting once: no code changes.

A code depends on which side of seven ties the quotient lies, once rounded to fp32. Scaling step and
x by powers of two changes no mantissa, so that every step is covered by those in [1, 2), and for
each of them only the few x next to tie * step can be decided wrongly.
"""

from __future__ import annotations

import numpy as np
import pytest

F32, F64 = np.float32, np.float64
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
CHUNK = 1 << 18


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Fp32 x * y + z rounded once: the fp64 sum is rounded to odd before it goes to fp32."""
    product, addend = x.astype(F64) * y, z.astype(F64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    words = total.view(np.int64).copy()
    inexact = (error != 0) & (words & 1 == 0)
    words += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
    return words.view(F64).astype(F32)


def upper_side(quotient: np.ndarray, number: int) -> np.ndarray:
    """Whether a quotient belongs above tie ``number``; a tie goes to the even code."""
    tie = F32(TIES[number])
    return quotient > tie if number % 2 == 0 else quotient >= tie


def wrongly_decided(step: np.ndarray, number: int) -> tuple[int, int]:
    """How many x next to the tie get a wrong code (without correction, with one)."""
    reciprocal = F32(1) / step
    near = (step.astype(F64) * TIES[number]).astype(F32).view(np.int32)
    wrong = [0, 0]
    for offset in range(-3, 4):
        x = (near + np.int32(offset)).view(F32)
        expected = upper_side(x / step, number)
        quotient = x * reciprocal
        corrected = fma(fma(-quotient, step, x), reciprocal, quotient)
        for i, candidate in enumerate((quotient, corrected)):
            wrong[i] += int((upper_side(candidate, number) != expected).sum())
    return wrong[0], wrong[1]


@pytest.mark.parametrize(
    "stride", [37, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_one_correction_decides_every_code_as_a_division_does(stride):
    mantissas = np.arange((1 << 23) + stride - 1, 1 << 24, stride)
    uncorrected = 0
    for start in range(0, mantissas.size, CHUNK):
        step = mantissas[start : start + CHUNK].astype(F32) * F32(2.0**-23)
        for number in range(len(TIES)):
            without, with_one = wrongly_decided(step, number)
            uncorrected += without
            assert with_one == 0
    # The check can fail: without the correction many codes are wrong.
    assert uncorrected > 1000


def test_fma_of_this_file_rounds_once():
    x = np.array([1 + 2.0**-12, 1 + 2.0**-23], F32)
    z = np.array([-1 - 2.0**-11, -1 - 2.0**-22], F32)
    assert fma(x, x, z).tolist() == [2.0**-24, 2.0**-46]
