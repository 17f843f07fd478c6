"""A call of every product operator, with the operands that it stands for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mokernels import numerics


def fp8_weight(n, k, granularity="tensor"):
    weight = torch.randn(n, k)
    if granularity == "tensor":
        return numerics.quantize_fp8_tensor_weight(weight)
    if granularity == "channel":
        return numerics.quantize_fp8_channel_weight(weight)
    codes, scale = numerics.quantize_fp8_block_weight(weight)
    return codes, scale if scale.dim() == 0 else scale[:, 0, :, 0]


class Case(NamedTuple):
    """A call of a product operator, and the operands that it stands for."""

    args: tuple
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    bias_at: int


def cases(k=96, n=40, lead=(2, 3), dtype=torch.bfloat16):
    """A case of every product operator, by name."""
    x = torch.randn(*lead, k).to(dtype)
    bias = torch.randn(n).to(dtype)
    input_scale = torch.tensor(0.01)
    multiplier, divisor = numerics.static_fp8_scales(input_scale)
    static = numerics.quantize_fp8(x, multiplier)
    token, token_scale = numerics.quantize_fp8_per_token(x)
    block, block_scale = numerics.quantize_fp8_per_block(x)
    g = torch.tensor(4.0 / (6 * 448))
    fp4, fp4_scale = numerics.quantize_nvfp4(x, g)
    mx, mx_scale = numerics.quantize_mxfp8(x)
    w, s = fp8_weight(n, k)
    wc, sc = fp8_weight(n, k, "channel")
    wb, sb = fp8_weight(n, k, "block")
    w4, s4, g4 = numerics.quantize_nvfp4_weight(torch.randn(n, k))
    wm, sm = numerics.quantize_mxfp8_weight(torch.randn(n, k))
    name = str(dtype).removeprefix("torch.")
    deq, deq4 = numerics.dequantize_fp8, numerics.dequantize_nvfp4
    xs, xt, xb = deq(static, divisor), deq(token, token_scale), deq(block, block_scale)
    x4, xm = deq4(fp4, fp4_scale, g), numerics.dequantize_mxfp8(mx, mx_scale)
    tensor, channel, blocks = deq(w, s), deq(wc, sc), deq(wb, sb)
    nvfp4, mxfp8 = deq4(w4, s4, g4), numerics.dequantize_mxfp8(wm, sm)
    # Three weights in one, each with its own global scale.
    rows4 = g4 * torch.tensor([0.5, 1.0, 3.0]).repeat_interleave(-(-n // 3))[:n]
    fused = torch.stack([deq4(w4[i], s4[i], rows4[i]) for i in range(n)])
    half = g.reshape(1) * 100
    rows = {
        "fp8_gemm": ((static, w, divisor, s, bias, name), xs, tensor),
        "fp8_gemm/token": ((token, wc, token_scale, sc, bias, name), xt, channel),
        "fp8_gemm/block": ((block, wb, block_scale, sb, bias, name), xb, blocks),
        "fp8_gemm/mixed": ((token, wb, token_scale, sb, bias, name), xt, blocks),
        "nvfp4_gemm": ((fp4, w4, fp4_scale, s4, g, g4, bias, name), x4, nvfp4),
        "nvfp4_gemm/rows": ((fp4, w4, fp4_scale, s4, g, rows4, bias, name), x4, fused),
        "mxfp8_gemm": ((mx, wm, mx_scale, sm, bias, name), xm, mxfp8),
        "fp8_weight_only_gemm": ((x, wb, sb, bias), x.float(), blocks),
        "nvfp4_weight_only_gemm": ((x, w4, s4, g4, bias), x.float(), nvfp4),
        "nvfp4_weight_only_gemm/rows": ((x, w4, s4, rows4, bias), x.float(), fused),
        "nvfp4_weight_only_gemm/scaled": (
            (x, w4, s4, rows4, bias, 0, half), x.float(), half * fused,
        ),
        "mxfp8_weight_only_gemm": ((x, wm, sm, bias), x.float(), mxfp8),
        "fp8_linear": ((x, w, s, input_scale, bias), xs, tensor),
        "fp8_per_token_linear": ((x, wc, sc, bias), xt, channel),
        "fp8_block_linear": ((x, wb, sb, bias), xb, blocks),
        "nvfp4_linear": ((x, w4, s4, g4, g, bias), x4, nvfp4),
        "nvfp4_linear/rows": ((x, w4, s4, rows4, g, bias), x4, fused),
        "mxfp8_linear": ((x, wm, sm, bias), xm, mxfp8),
    }  # fmt: skip
    return {
        key: Case(args, x_, w_, bias, next(i for i, a in enumerate(args) if a is bias))
        for key, (args, x_, w_) in rows.items()
    }
