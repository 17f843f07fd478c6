"""One decoder layer under torch.compile."""

import pytest

from bench.support.catalog import cases


@pytest.mark.parametrize("case", cases("layer"), ids=lambda case: case.name)
def test_layer(case, hold):
    hold(case)
