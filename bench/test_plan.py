"""Host time of planning the launches of a call."""

import pytest

from bench.support.catalog import cases


@pytest.mark.parametrize("case", cases("plan"), ids=lambda case: case.name)
def test_plan(case, hold):
    hold(case)
