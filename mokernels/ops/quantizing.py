"""Which products quantize their activations themselves: a pure function of shape and target.

And, since it is one decision with that, which ones multiply a single row without matrix units.
"""

from __future__ import annotations

from typing import Literal

from mokernels.formats import FP8_BLOCK
from mokernels.ops.configs import GemmConfig
from mokernels.ops.target import Target

Activations = Literal["static", "token", "block"]
"""One calibrated scale of all activations, one for each token, or one for each 1x128 block."""

STATIC_ROWS_IN_GEMM = 32
"""Most rows that a GEMM quantizes itself with a calibrated scale. On an H200 64 rows of 28672 x
4096 take 40 us so, and 36 where they come as codes, which a launch of less than 2 us makes."""
TOKEN_ROWS_IN_GEMM = 16
"""Most rows that a GEMM quantizes itself with a scale for each."""
BLOCK_ROWS_IN_GEMM = 16
"""Most rows that a GEMM quantizes itself in 1x128 blocks: a maximum for each step along K."""
TOKEN_K_IN_GEMM = 1024
"""Largest K of which every program of a GEMM looks for the rows' maxima: on an H200 that takes 1 us
for every 1000, and a launch that quantizes 1.5 us."""

GEMV_GROUP = 32
"""NVFP4 weights that a thread of a GEMV loads at once: 16 bytes."""
E4M3_GEMV_GROUP = 16
"""The same of E4M3 weights."""
WEIGHTS_WORTH_A_LAUNCH = 1 << 22
"""Fewest NVFP4 weights of which a GEMV saves more time than a launch that quantizes costs."""
E4M3_WEIGHTS_WORTH_A_GEMV = 3 << 22
"""Fewest E4M3 weights that one row is multiplied by without matrix units: an estimate, not measured
on any GPU yet. Reading so many takes 3 to 4 us at the bandwidth of an H200, of which a product by
tl.dot has been seen to reach 28 to 60 %; smaller weights wait for launches and not for memory."""


def quantizes_in_gemm(
    activations: Activations, m: int, k: int, x_bytes: int, config: GemmConfig, target: Target
) -> bool:
    """Whether the GEMM quantizes its activations, instead of a kernel before it.

    With few rows a GEMM waits for the weight, and a launch before it costs a good part of its time.
    But what one quantize kernel reads once, every program of the GEMM reads again, from the L2
    cache, in two or four bytes an element instead of one: that has to stay small beside the weight,
    which it does while the rows are fewer than those of a program's tile of the weight. With scales
    per token every program also reads its rows over the whole of K before it begins.

    The bits of a result do not depend on the answer, and the answer not on N: equal calls launch
    equal kernels. Every limit on m is the end of a bucket.

    Args:
        activations: which scales they get.
        m: rows of the activations.
        k: elements that are summed.
        x_bytes: bytes of an element of the activations.
        config: of the GEMM.
        target: without the type and its matrix instruction codes would be encoded only to be
            decoded, or brought to another form.
    """
    if not target.has_fp8_type or not _fits(x_bytes, config, target):
        return False
    if activations == "block":
        return m <= BLOCK_ROWS_IN_GEMM and config.block_k == FP8_BLOCK
    if activations == "token":
        return m <= TOKEN_ROWS_IN_GEMM and k <= TOKEN_K_IN_GEMM
    return m <= STATIC_ROWS_IN_GEMM


def quantizes_row_in_gemm(m: int, native: bool) -> bool:
    """Whether an NVFP4 or MXFP8 product that decodes its operands also quantizes its activations.

    A maximum for each 16 or 32 elements, a division and an encoding cost about as many instructions
    for an element of x as five weights take to be decoded, and every program needs all of x: for
    one row that is a thirteenth of the work of a tile of 64 weights, and a launch before it would
    cost more; for the 16 rows that a matrix instruction takes it would be as much again.

    Args:
        m: rows of the activations.
        native: whether matrix units apply the block scales: they take codes, from a quantizer.
    """
    return m == 1 and not native


def multiplies_row_by_gemv(m: int, n: int, k: int, quantized: bool) -> bool:
    """Whether a product of floats by an NVFP4 weight is a GEMV by fp32 multiply-adds.

    For one row it decodes with fewer integer instructions than a GEMM, and they are the limit. What
    it does not do is quantize: each of its programs has a few rows of the weight, beside which all
    of x is not little work, so that quantized activations take a launch of their own before it.

    On an H200 4096 x 4096 takes 13.6 us where the GEMM quantizes, and 6.5 us by a GEMV after a
    launch of less than 2 us: they are even at 4 million weights. (The GEMM has decoded weights by
    words since, in fewer instructions, and has not been timed again.)

    The two add in different orders, so that activations that were quantized before (``quantized``,
    too) have to be multiplied by the same kernel as those that a linear operator quantizes.

    Args:
        m: rows of the activations.
        n: rows of the weight; of the fused group, if it belongs to one.
        k: elements that are summed.
        quantized: whether the activations are.
    """
    worthwhile = not quantized or n * k >= WEIGHTS_WORTH_A_LAUNCH
    return m == 1 and k % GEMV_GROUP == 0 and worthwhile


def multiplies_row_by_e4m3_gemv(m: int, n: int, k: int) -> bool:
    """Whether a product of 16-bit floats by an E4M3 weight is a GEMV by fp32 multiply-adds.

    The answer does not depend on whether the activations were quantized, to MXFP8: it is the same
    for a linear operator and for the quantizer and the product that it consists of.

    Args:
        m: rows of the activations.
        n: rows of the weight; of the fused group, if it belongs to one.
        k: elements that are summed; also where no block of scales ends there.
    """
    return m == 1 and k % E4M3_GEMV_GROUP == 0 and n * k >= E4M3_WEIGHTS_WORTH_A_GEMV


def _fits(x_bytes: int, config: GemmConfig, target: Target) -> bool:
    """Whether shared memory holds the pipelined steps with activations that are not quantized yet.

    An asynchronous matrix instruction keeps one step more (see config_limits.shared_bytes).
    """
    step = config.block_k * (config.block_m * x_bytes + config.block_n)
    copies = config.num_stages - (not target.wants_swapped_operands)
    codes = config.block_k * config.block_m
    return copies * step + codes + 1024 <= target.shared_memory
