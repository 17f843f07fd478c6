"""Launchers of the quantize and dequantize operators, and the fake quantizers of the GEMMs.

Every ``plan_*`` allocates the outputs and returns them with the launches that fill them. It runs
nothing and asks no device, so that it works on meta tensors. Tile sizes change no bit of a result:
a maximum does not depend on its order, and nothing is added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mokernels.formats import FP8_BLOCK, MXFP8_BLOCK, NVFP4_BLOCK
from mokernels.ops.checks import OUT_DTYPES
from mokernels.ops.kernels.quantize import (
    dequantize_blocks,
    quantize_blocks,
    quantize_rows,
    quantize_static,
    static_scales,
)
from mokernels.ops.launch.plan import Launch, run
from mokernels.ops.quantize_configs import block_tile, row_tile
from mokernels.ops.target import Target, target_of

Launches = tuple[Launch, ...]
Planned = tuple[Tensor, Launches]
PlannedPair = tuple[tuple[Tensor, Tensor], Launches]


def quantize_fp8(
    x: Tensor, scale: Tensor, multiplier: Tensor | None = None, *, target: Target | None = None
) -> Tensor:
    """E4M3 codes [..., K] with one calibrated scale fp32 [], or its multiplier m."""
    return run(plan_quantize_fp8(x, scale, multiplier, target=target or target_of(x.device)))


def quantize_fp8_per_token(x: Tensor, *, target: Target | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 codes [..., K] and scales fp32 [...]."""
    return run(plan_quantize_fp8_per_token(x, target=target or target_of(x.device)))


def quantize_fp8_per_block(x: Tensor, *, target: Target | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 codes [..., K] and scales fp32 [..., ceil(K / 128)]."""
    return run(plan_quantize_fp8_per_block(x, target=target or target_of(x.device)))


def quantize_nvfp4(
    x: Tensor, global_scale: Tensor, *, target: Target | None = None
) -> tuple[Tensor, Tensor]:
    """Packed E2M1 codes [..., K / 2] and E4M3 block scales [..., K / 16]."""
    return run(plan_quantize_nvfp4(x, global_scale, target=target or target_of(x.device)))


def quantize_mxfp8(x: Tensor, *, target: Target | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 codes [..., K] and exponents uint8 [..., K / 32]."""
    return run(plan_quantize_mxfp8(x, target=target or target_of(x.device)))


def quantize_nvfp4_to_bf16(
    x: Tensor, global_scale: Tensor, *, target: Target | None = None
) -> Tensor:
    """Code * block scale, bf16 [..., K], *without* the global scale; exact."""
    target = target or target_of(x.device)
    return run(plan_fake_quantize_nvfp4(x, global_scale, torch.bfloat16, target=target))


def quantize_mxfp8_to_bf16(x: Tensor, *, target: Target | None = None) -> Tensor:
    """Code * 2 ** e, bf16 [..., K], rounded once; exact within bf16's normal range."""
    target = target or target_of(x.device)
    return run(plan_fake_quantize_mxfp8(x, torch.bfloat16, target=target))


def dequantize_fp8(
    codes: Tensor, scale: Tensor, out_dtype: str = "bfloat16", *, target: Target | None = None
) -> Tensor:
    """Codes [..., K] times a scale [], [...], [..., ceil(K / 128)] or of 128x128 blocks."""
    target = target or target_of(codes.device)
    return run(plan_dequantize_fp8(codes, scale, out_dtype, target=target))


dequantize_fp8_per_token = dequantize_fp8
dequantize_fp8_per_block = dequantize_fp8


def dequantize_nvfp4(
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    out_dtype: str = "bfloat16",
    *,
    target: Target | None = None,
) -> Tensor:
    """Packed codes [..., K / 2] times (block scale * global scale): [..., K]."""
    target = target or target_of(codes.device)
    return run(plan_dequantize_nvfp4(codes, scale, global_scale, out_dtype, target=target))


def dequantize_mxfp8(
    codes: Tensor, scale: Tensor, out_dtype: str = "bfloat16", *, target: Target | None = None
) -> Tensor:
    """Codes [..., K] times 2 ** (u - 127)."""
    target = target or target_of(codes.device)
    return run(plan_dequantize_mxfp8(codes, scale, out_dtype, target=target))


def plan_static_scales(scale: Tensor) -> PlannedPair:
    """The pair (m, 1 / m), fp32 [], of a stored scale fp32 with one item; one launch."""
    multiplier, divisor = scale.new_empty(()), scale.new_empty(())
    launch = Launch(static_scales, (1, 1, 1), (scale, multiplier, divisor), num_warps=1)
    return (multiplier, divisor), (launch,)


def plan_quantize_fp8(
    x: Tensor, scale: Tensor, multiplier: Tensor | None = None, *, target: Target
) -> Planned:
    """Codes float8_e4m3fn of the shape of x; one launch."""
    codes = _bytes(x, x.shape)
    # Rows mean nothing here: a contiguous tensor is one long row, aligned whatever its K.
    rows = Rows(x, 1, x.numel(), 1, 0, 0) if x.is_contiguous() else rows_of(x)
    factor = scale if multiplier is None else multiplier
    launch = _tiled(
        quantize_static,
        rows,
        target,
        1,
        (factor, codes),
        IS_MULTIPLIER=multiplier is not None,
        CASTS_ONCE=target.casts_fp8_once,
    )
    return codes.view(torch.float8_e4m3fn), (launch,)


def plan_quantize_fp8_per_token(x: Tensor, *, target: Target) -> PlannedPair:
    """Codes float8_e4m3fn [..., K] and scales fp32 [...]; one launch."""
    rows = rows_of(x)
    codes, scales = _bytes(x, x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    chosen = row_tile(rows.total, rows.k, target.processors)
    launch = Launch(
        quantize_rows,
        (-(-rows.total // chosen.rows), 1, 1),
        (rows.tensor, codes, scales, *rows.arguments),
        {
            "ONE_PASS": chosen.columns >= rows.k,
            "CASTS_ONCE": target.casts_fp8_once,
            "NESTED": rows.nested,
            "ROWS": chosen.rows,
            "COLUMNS": chosen.columns,
        },
        num_warps=chosen.warps,
    )
    return (codes.view(torch.float8_e4m3fn), scales), (launch,)


def plan_quantize_fp8_per_block(x: Tensor, *, target: Target) -> PlannedPair:
    """Codes float8_e4m3fn [..., K] and scales fp32 [..., ceil(K / 128)]; one launch."""
    blocks = (*x.shape[:-1], -(-x.shape[-1] // FP8_BLOCK))
    codes, scales = _bytes(x, x.shape), x.new_empty(blocks, dtype=torch.float32)
    launch = _quantize_blocks(x, (None, codes, scales), "fp8", FP8_BLOCK, target)
    return (codes.view(torch.float8_e4m3fn), scales), (launch,)


def plan_quantize_nvfp4(x: Tensor, global_scale: Tensor, *, target: Target) -> PlannedPair:
    """Codes uint8 [..., K / 2] and scales float8_e4m3fn [..., K / 16]; one launch."""
    lead, k = x.shape[:-1], x.shape[-1]
    codes, scales = _bytes(x, (*lead, k // 2)), _bytes(x, (*lead, k // NVFP4_BLOCK))
    launch = _quantize_blocks(x, (global_scale, codes, scales), "nvfp4", NVFP4_BLOCK, target)
    return (codes, scales.view(torch.float8_e4m3fn)), (launch,)


def plan_quantize_mxfp8(x: Tensor, *, target: Target) -> PlannedPair:
    """Codes float8_e4m3fn [..., K] and exponents uint8 [..., K / 32]; one launch."""
    codes = _bytes(x, x.shape)
    exponents = _bytes(x, (*x.shape[:-1], x.shape[-1] // MXFP8_BLOCK))
    launch = _quantize_blocks(x, (None, codes, exponents), "mxfp8", MXFP8_BLOCK, target)
    return (codes.view(torch.float8_e4m3fn), exponents), (launch,)


def plan_fake_quantize_nvfp4(
    x: Tensor, global_scale: Tensor, dtype: torch.dtype, *, target: Target
) -> Planned:
    """Values code * block scale [..., K], exact in bf16 and in fp16; one launch."""
    values = x.new_empty(x.shape, dtype=dtype)
    launch = _quantize_blocks(x, (global_scale, values, None), "nvfp4", NVFP4_BLOCK, target)
    return values, (launch,)


def plan_fake_quantize_mxfp8(x: Tensor, dtype: torch.dtype, *, target: Target) -> Planned:
    """Values code * 2 ** e [..., K]; one launch."""
    values = x.new_empty(x.shape, dtype=dtype)
    launch = _quantize_blocks(x, (None, values, None), "mxfp8", MXFP8_BLOCK, target)
    return values, (launch,)


def plan_dequantize_fp8(codes: Tensor, scale: Tensor, out_dtype: str, *, target: Target) -> Planned:
    """Values of the shape of the codes; one launch."""
    rows = rows_of(codes.view(torch.uint8))
    out = codes.new_empty(codes.shape, dtype=OUT_DTYPES[out_dtype])
    tensors = (scale.contiguous(), None, out)
    layout = _fp8_scale_layout(codes, scale)
    return out, (_dequantize_blocks(rows, tensors, "fp8", FP8_BLOCK, target, layout),)


def plan_dequantize_nvfp4(
    codes: Tensor, scale: Tensor, global_scale: Tensor | None, out_dtype: str, *, target: Target
) -> Planned:
    """Values [..., K] of packed codes [..., K / 2], without a global scale if None; one launch."""
    packed = rows_of(codes)
    rows = packed._replace(k=2 * packed.k)
    out = codes.new_empty((*codes.shape[:-1], rows.k), dtype=OUT_DTYPES[out_dtype])
    tensors = (scale.contiguous().view(torch.uint8), global_scale, out)
    layout = (1, rows.k // NVFP4_BLOCK, 1)
    return out, (_dequantize_blocks(rows, tensors, "nvfp4", NVFP4_BLOCK, target, layout),)


def plan_dequantize_mxfp8(
    codes: Tensor, scale: Tensor, out_dtype: str, *, target: Target
) -> Planned:
    """Values of the shape of the codes; one launch."""
    rows = rows_of(codes.view(torch.uint8))
    out = codes.new_empty(codes.shape, dtype=OUT_DTYPES[out_dtype])
    tensors = (scale.contiguous(), None, out)
    layout = (1, rows.k // MXFP8_BLOCK, 1)
    return out, (_dequantize_blocks(rows, tensors, "mxfp8", MXFP8_BLOCK, target, layout),)


def plan_decode_weight(
    name: str, codes: Tensor, scale: Tensor, values: Tensor, *, target: Target
) -> Launch:
    """The launch that fills ``values`` [N, K] of a float dtype with code * block scale.

    Without the global scale of NVFP4 they are exact in bf16 and fp16: 6 significant bits at most,
    from 2 ** -10 to 2 ** 12. Those of MXFP8 are rounded once, which bf16 needs below 2 ** -133.

    Args:
        name: "nvfp4" or "mxfp8".
        codes: with dense rows; of NVFP4 packed.
        scale: of the blocks; contiguous.
        values: contiguous.
        target: the device.
    """
    group = NVFP4_BLOCK if name == "nvfp4" else MXFP8_BLOCK
    rows = rows_of(codes.view(torch.uint8))._replace(k=values.shape[1])
    tensors = (scale.view(torch.uint8), None, values)
    return _dequantize_blocks(rows, tensors, name, group, target, (1, scale.shape[1], 1))


class Rows(NamedTuple):
    """A tensor [..., K] as rows in memory: row r starts at element ``(r // inner) * outer_stride +
    (r % inner) * inner_stride``, and K is contiguous.

    Attributes:
        tensor: the tensor itself, or a contiguous copy.
        total: number of rows.
        k: elements of a row.
        inner: rows before the outer stride is taken.
        outer_stride: in elements.
        inner_stride: in elements.
    """

    tensor: Tensor
    total: int
    k: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def nested(self) -> bool:
        """Whether it takes two strides."""
        return self.inner < self.total

    @property
    def arguments(self) -> tuple[int, ...]:
        """What every kernel takes after its tensors."""
        return self.total, self.k, self.inner, self.outer_stride, self.inner_stride


def rows_of(x: Tensor) -> Rows:
    """The rows of x [..., K], of any strides; copies only if K is not contiguous in memory, or if
    the leading dimensions need more than two strides.
    """
    k = x.shape[-1]
    if x.is_contiguous() and k:
        count = x.numel() // k
        return Rows(x, count, k, count, 0, k)
    leading = _merged_dimensions(x)
    if len(leading) > 2 or (k > 1 and x.stride(-1) != 1):
        x = x.contiguous()
        leading = _merged_dimensions(x)
    inner, inner_stride = leading.pop() if leading else (1, k)
    outer, outer_stride = leading.pop() if leading else (1, 0)
    return Rows(x, outer * inner, k, inner, outer_stride, inner_stride)


def _merged_dimensions(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, with neighbours merged that one stride walks."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size != 1:
            merged.append((size, stride))
    return merged


def _fp8_scale_layout(codes: Tensor, scale: Tensor) -> tuple[int, int, int]:
    """(rows of codes to one row of scales, stride of these rows, stride along K's blocks)."""
    blocks = -(-codes.shape[-1] // FP8_BLOCK)
    if scale.numel() == 1:
        return 1, 0, 0
    if scale.dim() < codes.dim():
        return 1, 1, 0
    return (1 if scale.shape[:-1] == codes.shape[:-1] else FP8_BLOCK), blocks, 1


def _quantize_blocks(
    x: Tensor, tensors: tuple[Tensor | None, ...], name: str, group: int, target: Target
) -> Launch:
    """``tensors`` are the global scale, the codes (or values) and the scales (None: fake)."""
    return _tiled(
        quantize_blocks,
        rows_of(x),
        target,
        group,
        tensors,
        FORMAT=name,
        GROUP=group,
        FAKE=tensors[-1] is None,
        CASTS_ONCE=target.casts_fp8_once,
        HAS_TYPE=target.has_fp8_type,
    )


def _dequantize_blocks(
    rows: Rows,
    tensors: tuple[Tensor | None, ...],
    name: str,
    group: int,
    target: Target,
    layout: tuple[int, int, int],
) -> Launch:
    """``tensors`` are the scales, the global scale and the output."""
    return _tiled(
        dequantize_blocks,
        rows,
        target,
        group,
        tensors,
        layout[1:],
        FORMAT=name,
        GROUP=group,
        SCALE_ROWS=layout[0],
        HAS_TYPE=target.has_fp8_type,
    )


def _tiled(
    kernel: Any,
    rows: Rows,
    target: Target,
    group: int,
    tensors: tuple[Tensor | None, ...],
    others: tuple[int, ...] = (),
    **constants: Any,
) -> Launch:
    """A kernel whose programs each take a tile of the rows."""
    chosen = block_tile(rows.total, rows.k, group, target.processors)
    constants |= {"NESTED": rows.nested, "ROWS": chosen.rows, "COLUMNS": chosen.columns}
    return Launch(
        kernel,
        (chosen.programs(rows.total, rows.k), 1, 1),
        (rows.tensor, *tensors, *rows.arguments, *others),
        constants,
        num_warps=chosen.warps,
    )


def _bytes(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape, dtype=torch.uint8)
