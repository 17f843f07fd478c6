"""Launches of products by a weight that is decoded first: NVFP4 and MXFP8 by many rows.

A launch decodes rows of the weight to the activations' dtype, and the next one multiplies by them:
for many rows the traffic of the decoded weight costs less than decoding it once for each tile of
rows. Both go through the weight in parts, so that a workspace of bounded size does. A result has
the same bits whatever the parts are, since each of its items is a sum over the whole of K.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mokernels.ops.gemm_config import GemmConfig, ceil_div
from mokernels.ops.launch.persistent import plan_persistent, tma_reads
from mokernels.ops.launch.plan import Launch
from mokernels.ops.launch.product import Ending, Operands
from mokernels.ops.launch.quantize import plan_decode_weight
from mokernels.ops.target import Target

WORKSPACE_BYTES: int = 256 * 2**20
"""Most bytes of a decoded weight at a time: all of a 28672 x 4096 one."""
ROWS_OF_PART: int = 256
"""Parts have multiples of it as rows, and at least as many: the width of the widest tile."""


def plan_decoded(
    x: Tensor,
    name: str,
    codes: Tensor,
    scale: Tensor,
    ending: Ending,
    config: GemmConfig,
    target: Target,
) -> tuple[Launch, ...] | None:
    """The launches of x [M, K] by a weight [N, K]: two for each part; None if there is no K.

    Args:
        x: bf16, or fp16 by NVFP4; copied if TMA cannot read it.
        name: "nvfp4" or "mxfp8".
        codes: of the weight, with dense rows.
        scale: of its blocks.
        ending: what to do with the sums, and where to put them.
        config: tile and pipeline of the product.
        target: the device.
    """
    x = _readable(x, target)
    (m, k), n = x.shape, codes.shape[0]
    parts = tuple(parts_of(n, k, x.element_size()))
    workspace = x.new_empty((max((stop - start for start, stop in parts), default=0), k))
    if not (tma_reads(x, target) and tma_reads(workspace, target)):
        return None
    scale, out = scale.contiguous(), ending.out.view(m, n)
    launches: list[Launch] = []
    for start, stop in parts:
        rows, values = slice(start, stop), workspace[: stop - start]
        launches.append(plan_decode_weight(name, codes[rows], scale[rows], values, target=target))
        operands = Operands((x, values, None, None), (0, 0, 0, 0), (m, stop - start, k))
        part = _columns(ending, out, rows)
        launches += plan_persistent(operands, part, config, target)
    return tuple(launches)


def parts_of(n: int, k: int, item: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of a weight [n, k] that are decoded at a time, about equally many.

    Together they are all rows, in order. A part takes at most :data:`WORKSPACE_BYTES` unless
    :data:`ROWS_OF_PART` rows take more.

    Args:
        n: rows of the weight.
        k: columns.
        item: bytes of an item of the decoded weight.
    """
    unit = ROWS_OF_PART * k * item
    units = ceil_div(n, ROWS_OF_PART)
    most = max(1, WORKSPACE_BYTES // max(1, unit))
    step = ROWS_OF_PART * ceil_div(units, max(1, ceil_div(units, most)))
    return ((start, min(start + step, n)) for start in range(0, n, step or 1))


def _readable(x: Tensor, target: Target) -> Tensor:
    """The activations, or a copy that TMA reads if it can read any of their shape."""
    return x if tma_reads(x, target) else x.clone(memory_format=torch.contiguous_format)


def _columns(ending: Ending, out: Tensor, columns: slice) -> Ending:
    """What happens to some columns of a result, whose place in all of it is ``out`` [M, N]."""
    scale, bias = ending.scale_w, ending.bias
    if scale is not None and scale.numel() > 1:
        scale = scale.reshape(-1)[columns]
    bias = None if bias is None else bias[columns]
    return Ending(out[:, columns], bias, ending.scale_x, scale)
