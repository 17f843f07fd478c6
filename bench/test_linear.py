"""Quantize and multiply in one operator."""

import pytest

from bench.support.catalog import cases


@pytest.mark.parametrize("case", cases("linear"), ids=lambda case: case.name)
def test_linear(case, hold):
    hold(case)
