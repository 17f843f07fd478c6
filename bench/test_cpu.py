"""Torch.compile and eager on the CPU."""

import pytest

from bench.support.catalog import cases


@pytest.mark.parametrize("case", cases("cpu"), ids=lambda case: case.name)
def test_cpu(case, hold):
    hold(case)
