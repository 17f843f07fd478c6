"""Kernels that begin before the one before has ended read nothing until it has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import pytest

from mokernels.ops.target import SM_89, SM_90, Target
from tests.aot import test_split_k
from tests.support.aot import Case, Compiled, compile_launch

MODULES = (
    *("gemm", "gemm_persistent", "gemm_quantizing", "gemm_row", "gemv", "gemv_e4m3"),
    *("quantize", "fused"),
)
ACCESS = re.compile(r"^\s*(?:@\S+\s+)?(?:ld\.global|st\.global|cp\.async|red|atom)", re.MULTILINE)


def every_kernel(target: Target) -> Iterator[Case]:
    """One case of each kernel that the target has."""
    found: dict[str, Case] = {}
    modules = (import_module(f"tests.aot.test_{name}") for name in MODULES)
    lists = (module.CASES for module in modules)
    for case in (*(case for cases in lists for case in cases), *test_split_k.reduce_cases()):
        if case.target is target:
            found.setdefault(case.plan().kernel.__name__, case)
    for name, case in sorted(found.items()):
        yield replace(case, family=f"dependent-{name}", name=name)


CASES = list(every_kernel(SM_90))


def test_every_kernel_is_looked_at():
    assert {case.name for case in CASES} >= {
        *("gemm_epilogue", "gemm_block", "gemm_decode", "gemm_persistent", "gemm_quantizing"),
        *("gemv_nvfp4", "gemv_e4m3", "reduce_splits", "quantize_static", "quantize_rows"),
        *(
            "quantize_blocks",
            "static_scales",
            "norm_quantize",
            "gated_quantize",
            "dequantize_blocks",
        ),
    }


@pytest.mark.aot_cases(CASES)
def test_it_waits_before_it_reads_or_writes(case: Case, compiled: Compiled):
    assert case.plan().options(dependent=True)["launch_pdl"]
    before, after = compiled.ptx.split("griddepcontrol.wait")
    assert not ACCESS.search(before)
    assert ACCESS.search(after)
    # A program gives its place away at its end, after the main loop, or by ending.
    *loop, _ = after.split("griddepcontrol.launch_dependents")
    assert len(loop) <= 1
    assert not loop or re.search(r"^\s*@%p\d+ bra", loop[0], re.MULTILINE)


def test_older_gpus_have_no_such_instruction():
    (case,) = (case for case in every_kernel(SM_89) if case.name == "quantize_rows")
    assert "launch_pdl" not in case.plan().options()
    assert "griddepcontrol" not in compile_launch(case.plan(), SM_89).ptx
