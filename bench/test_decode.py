"""Decoding with a whole model."""

import pytest

from bench.support.catalog import cases


@pytest.mark.parametrize("case", cases("decode"), ids=lambda case: case.name)
def test_decode(case, hold):
    hold(case)
