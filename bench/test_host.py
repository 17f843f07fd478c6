"""Host time of an eager call."""

import pytest

from bench.support.catalog import cases


@pytest.mark.parametrize("case", cases("host"), ids=lambda case: case.name)
def test_host(case, hold):
    hold(case)
