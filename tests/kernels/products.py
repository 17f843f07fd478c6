"""What the GEMM tests share: operands to draw, exact products, and how far a result may be off."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from mokernels.ops.target import CUDA_TARGETS, Target, target_of
from tests.support.interpreter import interpreting

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
# Unit roundoff: half the distance of 1 to the next value.
ROUNDOFF = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
# On a GPU the tests run what its own target chooses; the interpreter runs every target's choices.
TARGETS: tuple[Target, ...] = (
    CUDA_TARGETS if interpreting() else (target_of(torch.device("cuda", 0)),)
)

seeds = st.integers(0, 2**32 - 1)
targets = st.sampled_from(TARGETS)
leads = st.sampled_from([(), (1,), (3,), (17,), (2, 5), (40,), (70,), (0,), (2, 0), (2, 1, 3)])
columns = st.sampled_from([1, 7, 64, 96, 129])
floats = st.sampled_from([BF16, FP16, FP32])
biases = st.sampled_from([None, BF16, FP16, FP32])


def few_processors(target: Target) -> Target:
    """The same with two processors: one column of tiles is split, two are not."""
    return replace(target, processors=2)


class Draw:
    """Random tensors from one seed, on one device."""

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        values = torch.randn(shape, generator=self.generator)
        return values.to(dtype).to(self.device)

    def scale(self, *shape: int) -> Tensor:
        """Positive fp32 scales around 2 ** -6, which keeps products inside fp16."""
        values = torch.rand(shape, generator=self.generator) + 0.5
        return (values * 2.0**-6).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator).to(self.device)

    def e4m3(self, *shape: int) -> Tensor:
        """Codes of every finite value: small ones are as frequent as large ones."""
        codes = self.integers(0, 255, *shape).to(torch.uint8)
        codes = torch.where((codes & 0x7F) == 0x7F, codes - 1, codes)
        return codes.view(FP8)

    def packed(self, *shape: int) -> Tensor:
        return self.integers(0, 255, *shape).to(torch.uint8)

    def block_scale(self, *shape: int) -> Tensor:
        """Non-negative E4M3 scales of every magnitude up to 8, subnormals and zero included."""
        return self.integers(0, 0x50, *shape).to(torch.uint8).view(FP8)

    def exponents(self, *shape: int) -> Tensor:
        """Shared exponents of up to 2 ** -10, which keeps products inside fp16."""
        return self.integers(105, 117, *shape).to(torch.uint8)

    def bias(self, n: int, dtype: torch.dtype | None) -> Tensor | None:
        """Every second item of a longer tensor: a stride that is not 1."""
        return None if dtype is None else self.normal(2 * n, dtype=dtype)[::2]


def restride(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "padded":
        wide = x.new_zeros((*x.shape[:-1], x.shape[-1] + 16))
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x.contiguous()


layouts = st.sampled_from(["dense", "padded", "transposed"])


def assert_product(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    native_fp8: bool = False,
) -> None:
    """``y`` is x @ w.T + bias as well as any order of fp32 additions can compute it.

    Args:
        y: the result [..., N].
        x: the dequantized activations [..., K], fp32.
        w: the dequantized weight [N, K], fp32.
        bias: [N] or None.
        dtype: that y has to have.
        native_fp8: on a GPU the products were summed by an FP8 matrix instruction.

    With u = 2 ** -24, K products (exact, or rounded once where a scale was applied to an operand)
    that are added in any order miss the exact sum by at most K u times the sum of their magnitudes;
    a dequantized operand and the product by scales and the bias round a few times more: K + 16.
    Then the sum is rounded to y's dtype, and half of the smallest subnormal of fp16 covers results
    that fall below its normal range. A dropped, doubled or misplaced element is off by a K-th of
    that sum of magnitudes on average, more than a thousand times as much.

    What Hopper's FP8 instruction may be off in addition is in :func:`lost_by_fp8_units`.
    """
    wanted_shape = (*x.shape[:-1], w.shape[0])
    assert tuple(y.shape) == wanted_shape
    assert y.dtype == (dtype or y.dtype)
    assert y.is_contiguous()
    x64, w64 = x.double(), w.double()
    exact, magnitude = x64 @ w64.T, x64.abs() @ w64.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    unit = (x.shape[-1] + 16) * 2.0**-24
    allowed = magnitude * unit + exact.abs() * ROUNDOFF[y.dtype] + 2.0**-25
    if native_fp8 and not interpreting():
        allowed = allowed + lost_by_fp8_units(x64, w64)
    off = (y.double() - exact).abs() - allowed
    # Not `off > 0`: that is false for a NaN.
    bad = ~(off <= 0)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} values are too far off, by up to "
        f"{float((off / allowed)[bad].max()):.1f} times what is allowed; the first at "
        f"{tuple(bad.nonzero()[0].tolist())}"
    )


def lost_by_fp8_units(x: Tensor, w: Tensor) -> Tensor:
    """[..., N], what a sum of FP8 matrix instructions may be off for x [..., K] and w [N, K], fp64.

    Hopper's instruction adds 32 products to its accumulator after shifting all 33 to the exponent
    of the greatest, with 13 fraction bits: each loses less than 2 ** -13 of the greatest. (Seen on
    an H200: up to 7 * 2 ** -13 of the sum of 128 magnitudes, where rounding the sum once an
    instruction would allow 4.) Promotion, which begins the accumulator anew, only makes it smaller.
    """
    total = x.new_zeros((*x.shape[:-1], w.shape[0]))
    lost = torch.zeros_like(total)
    for k in range(0, x.shape[-1], 32):
        products = x[..., None, k : k + 32] * w[:, k : k + 32]
        greatest = torch.maximum(products.abs().amax(-1), total.abs())
        lost += 33 * 2.0**-13 * greatest
        total += products.sum(-1)
    return lost
