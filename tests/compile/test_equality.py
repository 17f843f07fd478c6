"""A rewritten graph computes the same bits: every format, norm, activation, dtype and size."""

from collections.abc import Callable
from dataclasses import fields
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mokernels.compile.fusion as fusion
import mokernels.numerics.product as numerics_product
from mokernels.compile.options import FusionOptions
from tests.compile.blocks import ACTIVATIONS, CASES, DTYPES, NORMS, Block, Checked, quantized
from tests.support.compare import assert_same_bits

QUANTIZING = [case for case in CASES if not case.endswith("16bit") and case != "FP8_PB_WO"]
Q_K_V, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
VARIANTS = list(product(NORMS, ACTIVATIONS))
"""The i-th case in the j-th dtype takes the (i + 3 j)-th: all nine occur for nine cases."""


@pytest.fixture(autouse=True)
def _compiles_anew():
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only wait for other threads
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Every rewrite, on the CPU, where the fused operators run their modules' operations."""
    monkeypatch.setattr(fusion, "_on_cpu", lambda graph: False)
    # A CPU's BLAS adds in an order that depends on N; sums in fp64 hide the order.
    monkeypatch.setattr(
        numerics_product, "linear", lambda a, b: (a.double() @ b.double().T).float()
    )


def compile_checked(module: nn.Module, checked: Checked) -> Callable[..., Tensor]:
    return torch.compile(module, backend=checked, fullgraph=True)


def variant(case: str, dtype: torch.dtype) -> tuple[str, str]:
    return VARIANTS[(list(CASES).index(case) + 3 * DTYPES.index(dtype)) % len(VARIANTS)]


def dynamic(block: Block, tokens: int) -> Tensor:
    x = block.input(tokens)
    torch._dynamo.mark_dynamic(x, 0)
    return x


def lay_q_k_v_side_by_side(block: Block) -> None:
    """As on a GPU. Gate and up are left: torch's GELU differs by an ulp on slices of rows."""
    block.q_proj.siblings.lay_side_by_side()


def shared(checked: Checked) -> list[tuple[str, ...]]:
    """Names of the layers that share a quantization, group by group, in the last graph."""
    rewrites = checked.report.graphs[-1].rewrites
    return [r.modules for r in rewrites if r.what.startswith("one quantization")]


@pytest.mark.parametrize("second", [False, True], ids=["bf16", "other"])
@pytest.mark.parametrize("case", CASES)
def test_the_pass_changes_no_bit_for_any_number_of_tokens(case, second):
    dtype = DTYPES[1 + list(CASES).index(case) % 2] if second else torch.bfloat16
    block = Block(case, *variant(case, dtype), dtype=dtype, bias=True)
    checked = Checked()
    compiled = compile_checked(block, checked)
    compiled(dynamic(block, 5))
    assert shared(checked) == ([Q_K_V, GATE_UP] if case in QUANTIZING else [])

    @settings(max_examples=8)
    @given(tokens=st.integers(2, 150), seed=st.integers(0, 2**31))
    def holds(tokens, seed):
        compiled(block.input(tokens, seed=seed))

    holds()
    assert checked.graphs == 1
    if not second:
        compiled(block.input(1))
        compiled(block.input(1, seed=1))
        assert checked.graphs == 2


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("case", CASES)
def test_every_rewrite_at_once_has_the_bits_of_eager(case):
    norm, activation = variant(case, torch.bfloat16)
    block = Block(case, norm, activation)
    lay_q_k_v_side_by_side(block)
    checked = Checked(compares=False)
    compiled = compile_checked(block, checked)
    for x in (dynamic(block, 5), *(block.input(tokens) for tokens in (2, 33, 300))):
        assert_same_bits(compiled(x), block(x))
    assert checked.graphs == 1
    fused = ("RMSNorm", "residual + RMSNorm", f"{activation} * up")
    assert [checked.report.count(w) for w in fused] == [case in QUANTIZING] * 3
    # Rows that fill no square of 128x128 scales cannot be put together.
    assert checked.report.count("one GEMM for 3") == (not case.startswith("FP8_PB_WO"))


REPORTED = {
    "share_quantization": "one quantization",
    "merge_projections": "one GEMM",
    "fuse_norm": "residual + RMSNorm",
    "fuse_activation": "silu * up",
    "expand": "quantize left to Inductor",
    "quantize_in_gemm": "quantize in the GEMM",
}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("option", [None, *(field.name for field in fields(FusionOptions))])
def test_without_any_one_of_the_rewrites_the_bits_are_eagers(option):
    block = Block("FP8_PER_CHANNEL_PER_TOKEN")
    lay_q_k_v_side_by_side(block)
    options = FusionOptions(**({option: False} if option else {}))
    checked = Checked(options, compares=False)
    x = block.input(6)
    assert_same_bits(compile_checked(block, checked)(x), block(x))
    fired = {name for name, what in REPORTED.items() if checked.report.count(what)}
    # GEMMs are merged, and producers fused, where a quantization is shared.
    missing = {option} | ({"merge_projections", "fuse_norm"} if option == FIRST else set())
    assert fired == REPORTED.keys() - missing


FIRST = "share_quantization"


@pytest.mark.parametrize("case", ["FP8", "NVFP4"])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 2.0, 2.0), (1.0, 2.0, 0.5)], ids=str)
def test_projections_with_activation_scales_of_their_own_quantize_by_themselves(case, scales):
    block = Block(case, bias=True, scales=scales)
    checked = Checked()
    x = block.input(4)
    assert_same_bits(compile_checked(block, checked)(x), block(x))
    # Two that agree among three that do not have tensors of their own: they are not compared.
    equal = [Q_K_V] if len(set(scales)) == 1 else []
    assert shared(checked) == [*equal, GATE_UP]


class Tied(nn.Module):
    """One layer, called for two inputs, and twice for one of them."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.layer = quantized(case, 64, 64, seed=0)
        self.layer.refresh()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        return self.layer(h) * self.layer(torch.sigmoid(x)) - self.layer(h)


@pytest.mark.parametrize("case", CASES)
def test_one_layer_may_be_called_many_times(case):
    module, checked = Tied(case), Checked()
    wide = torch.randn(3, 4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    compiled = compile_checked(module, checked)
    # Not contiguous, transposed, and nothing at all.
    for x in (wide[..., ::2], wide[..., :64].transpose(0, 1), wide[0, :0, :64]):
        assert_same_bits(compiled(x), module(x))
    assert checked.report.count("one quantization") == checked.graphs * (case in QUANTIZING)
