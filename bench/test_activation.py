"""A norm or a gated activation that ends quantized."""

import pytest

from bench.support.catalog import cases


@pytest.mark.parametrize("case", cases("activation"), ids=lambda case: case.name)
def test_activation(case, hold):
    hold(case)
