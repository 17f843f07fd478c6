"""Kernel tests: on a GPU as they are, or on CPU tensors under the repaired interpreter.

``TRITON_INTERPRET=1 pytest tests/kernels`` interprets. Without the variable and without a GPU this
folder is left to ``tests/test_interpreted_kernels.py``, which runs it in a process of its own: the
variable has to be set before anything imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor

from tests.support.interpreter import install, interpreting
from tests.support.sanitizer import install as install_sanitizer

HAS_GPU = torch.cuda.is_available() or torch.xpu.is_available()

if interpreting():
    install()
    install_sanitizer()
    torch.set_num_threads(1)
elif not HAS_GPU:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a kernel test live."""
    if interpreting():
        return torch.device("cpu")
    if not HAS_GPU:
        pytest.fail("kernel tests need a GPU, or TRITON_INTERPRET=1 in the environment")
    return torch.device("cuda" if torch.cuda.is_available() else "xpu")


@pytest.fixture
def interpreted() -> None:
    """For tests of the interpreter itself."""
    if not interpreting():
        pytest.skip("tests the interpreter, and this process runs kernels on a GPU")


@pytest.fixture(scope="package", autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Every byte of a new tensor is 0xFF (NaN in all float types) until a kernel stores to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
        yield


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        tensor = allocate(*arguments, **keywords)
        if tensor.device.type != "meta" and not isinstance(tensor, FakeTensor):
            with torch._C._DisableTorchDispatch():  # no part of what a mode may be watching
                tensor.untyped_storage().fill_(0xFF)
        return tensor

    return call
