"""The FP8 product alone."""

import pytest

from bench.support.catalog import cases


@pytest.mark.parametrize("case", cases("product"), ids=lambda case: case.name)
def test_product(case, hold):
    hold(case)
