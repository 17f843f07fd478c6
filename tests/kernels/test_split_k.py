"""Programs that share the K of a tile: the last one adds the parts, in an order that is fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mokernels.ops import gemm_config
from mokernels.ops.configs import choose
from mokernels.ops.launch import decode, gemm, gemv, linear, quantizing
from mokernels.ops.launch.plan import run
from mokernels.ops.launch.product import Planned
from mokernels.ops.quantizing import E4M3_WEIGHTS_WORTH_A_GEMV, TOKEN_K_IN_GEMM
from mokernels.ops.target import SM_80, SM_90, SM_100, Target
from tests.kernels.products import BF16, FP32, TARGETS, Draw
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting

Plan = Callable[[Draw, int, int, int, Target], Planned]
N, K = 70, 1056
"""A short last tile, and a short last step; nine steps of 128."""


def epilogue(draw: Draw, m: int, n: int, k: int, target: Target) -> Planned:
    operands = (draw.e4m3(m, k), draw.e4m3(n, k), draw.scale(m), draw.scale(n), draw.bias(n, BF16))
    return gemm.plan_fp8_gemm(*operands, FP32, target=target)


def block(draw: Draw, m: int, n: int, k: int, target: Target) -> Planned:
    scales = (draw.scale(m, -(-k // 128)), draw.scale(-(-n // 128), -(-k // 128)))
    operands = (draw.e4m3(m, k), draw.e4m3(n, k), *scales, draw.bias(n, FP32))
    return gemm.plan_fp8_gemm(*operands, BF16, target=target)


def decoded(draw: Draw, m: int, n: int, k: int, target: Target) -> Planned:
    weight = (draw.e4m3(n, k), draw.exponents(n, k // 32), draw.bias(n, BF16))
    return decode.plan_mxfp8_decode(draw.normal(m, k, dtype=BF16), *weight, FP32, target=target)


def native(draw: Draw, m: int, n: int, k: int, target: Target) -> Planned:
    scales = (draw.exponents(m, k // 32), draw.exponents(n, k // 32))
    operands = (draw.e4m3(m, k), draw.e4m3(n, k), *scales, draw.bias(n, BF16))
    return gemm.plan_mxfp8_gemm(*operands, FP32, target=target)


def quantizing_rows(draw: Draw, m: int, n: int, k: int, target: Target) -> Planned:
    weight = (draw.e4m3(n, min(k, TOKEN_K_IN_GEMM)), draw.scale(n), draw.bias(n, BF16))
    # The longest rows that a GEMM looks for maxima in are shorter than the others' here.
    x = draw.normal(m, min(k, TOKEN_K_IN_GEMM))
    return linear.plan_fp8_per_token_linear(x, *weight, target=target)


def one_row(draw: Draw, m: int, n: int, k: int, target: Target) -> Planned:
    weight = (draw.packed(n, k // 2), draw.block_scale(n, k // 16))
    tail = (None, draw.scale(), draw.bias(n, BF16), FP32)
    return decode.plan_nvfp4_decode(draw.normal(1, k, dtype=BF16), *weight, *tail, target=target)


def one_row_of_e4m3(draw: Draw, m: int, n: int, k: int, target: Target) -> Planned:
    weight = (draw.e4m3(n, k), draw.exponents(n, k // 32), draw.bias(n, BF16))
    x, plan_n = draw.normal(1, k, dtype=BF16), E4M3_WEIGHTS_WORTH_A_GEMV // k + 1
    return decode.plan_mxfp8_decode(x, *weight, FP32, plan_n, target=target)


# Each kernel that splits K, on a target that has it; a GPU runs those that it has itself.
FAMILIES: dict[str, tuple[Plan, Target]] = {
    "gemm_epilogue": (epilogue, SM_80),
    "gemm_block": (block, SM_90),
    "gemm_decode": (decoded, SM_90),
    "gemm_native": (native, SM_100),
    "gemm_quantizing": (quantizing_rows, SM_90),
    "gemv_nvfp4": (one_row, SM_80),
    "gemv_e4m3": (one_row_of_e4m3, SM_90),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


class Chosen:
    """Stands in for ``choose``, with a number of parts of one's own."""

    parts = 2

    def __call__(self, *arguments):
        return replace(choose(*arguments), split_k=self.parts)


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    made = Chosen()
    for module in (gemm, decode, gemv, quantizing):
        monkeypatch.setattr(module, "choose", made)
    return made


def product(device: torch.device, family: str, m: int, n: int = N) -> Planned:
    """Of the same operands each time; in one launch, or in two if that is what the limit says."""
    plan, target = FAMILIES[family]
    planned = plan(Draw(device, m), m, n, K, target if interpreting() else TARGETS[0])
    if family not in [one.kernel.__name__ for one in planned[1]]:
        pytest.skip(f"this device does not multiply by {family}")
    return planned


def in_two_launches(monkeypatch, device: torch.device, family: str, m: int, n: int = N) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(gemm_config, "LAST_PROGRAM_BYTES", 0)
        planned = product(device, family, m, n)
    assert [one.kernel.__name__ for one in planned[1]] == [family, "reduce_splits"]
    return run(planned)


def workspace(planned: Planned) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the partial sums and the counters of a product in one launch."""
    if len(planned[1]) == 2 and not interpreting():
        pytest.skip("the tile that this device takes for so many rows needs a second launch")
    (launch,) = planned[1]
    assert launch.constants["SPLIT"] == "last"
    (found,) = (argument for argument in launch.args if isinstance(argument, tuple))
    return found


# All that fit one tile of a kernel, with rows to spare; and two tiles of rows.
GEMVS = ("gemv_nvfp4", "gemv_e4m3")
ROWS = {
    **dict.fromkeys(GEMVS, (1,)),
    "gemm_quantizing": (1, 16),
    "gemm_epilogue": (1, 2, 17, 64),
    "gemm_native": (1, 17),
}
FAMILIES_AND_ROWS = [(name, m) for name in FAMILIES for m in ROWS.get(name, (1, 33))]


@pytest.mark.parametrize(("family", "m"), FAMILIES_AND_ROWS)
def test_the_bits_are_those_of_a_second_launch(device, monkeypatch, chosen, family, m):
    chosen.parts = 3
    planned = product(device, family, m)
    _, _, counters = workspace(planned)
    found = run(planned)
    assert not counters.any()
    assert_same_bits(found, in_two_launches(monkeypatch, device, family, m))


@pytest.mark.parametrize("parts", [2, 3, 4, 5, 8, 9])
def test_the_parts_are_added_in_their_order(device, chosen, parts):
    chosen.parts = parts
    planned = product(device, "gemm_decode", 3)
    run(planned)
    # The kernel's own bias; it has no scales.
    result, partials, counters = workspace(planned)
    (bias,) = (it for it in planned[1][0].args if isinstance(it, Tensor) and it.shape == (N,))
    total = partials[0]
    for part in partials[1:]:
        total = total + part
    assert partials.shape[0] == parts
    assert_same_bits(result, total + bias.float())
    assert not counters.any()


@every_family
def test_a_launch_leaves_nothing_behind_for_the_next(device, family):
    planned = product(device, family, 1)
    first = run(planned).clone()
    _, partials, counters = workspace(planned)
    for _ in range(2):
        partials.fill_(float("nan"))
        planned[0].fill_(float("nan"))
        assert_same_bits(run(planned), first)
        assert not counters.any()


def test_every_tile_has_a_counter(device):
    # Two rows and three columns of tiles.
    planned = product(device, "gemm_epilogue", 65, 257)
    _, _, counters = workspace(planned)
    assert counters.numel() >= planned[1][0].grid[0] >= 6
    assert not run(planned).isnan().any()
    assert not counters.any()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in GEMVS])
def test_no_rows(device, family):
    assert run(product(device, family, 0)).shape == (0, N)


ORDERS: dict[str, Callable[[int, int], int]] = {
    "backwards": lambda part, parts: parts - 1 - part,
    "rotated": lambda part, parts: (part + 2) % parts,
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("order", ORDERS)
@every_family
def test_the_bits_do_not_tell_who_came_last(device, monkeypatch, chosen, family, order):
    from triton.runtime.interpreter import InterpreterBuilder

    chosen.parts, came = 5, []
    wanted = run(product(device, family, 2))
    stock = InterpreterBuilder.set_grid_idx

    def reordered(self, x: int, y: int, z: int) -> None:
        came.append(ORDERS[order](y, self.grid_dim[1]))
        stock(self, x, came[-1], z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reordered)
    planned = product(device, family, 2)
    assert_same_bits(run(planned), wanted)
    assert sorted(came[:5]) == [0, 1, 2, 3, 4]
    assert came[4] != 4, "the same program is the last: nothing is tested"
    assert not workspace(planned)[2].any()
