"""What batch_invariant() costs."""

import pytest

from bench.support.catalog import cases


@pytest.mark.parametrize("case", cases("invariant"), ids=lambda case: case.name)
def test_invariance(case, hold):
    hold(case)
