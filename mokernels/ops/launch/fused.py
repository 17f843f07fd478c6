"""Launchers of the operators that compute activations and quantize them: one for each producer.

``quantizer`` names a row of :data:`mokernels.ops.quantize.QUANTIZERS`, and ``extra`` are its
arguments. The outputs are those that its fake implementation allocates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mokernels.formats import FP8_BLOCK, MXFP8_BLOCK, NVFP4_BLOCK
from mokernels.ops.kernels.fused import gated_quantize as gated_quantize_kernel
from mokernels.ops.kernels.fused import norm_quantize as norm_quantize_kernel
from mokernels.ops.launch.plan import Launch, run
from mokernels.ops.launch.quantize import Launches, rows_of
from mokernels.ops.quantize import QUANTIZERS
from mokernels.ops.quantize_configs import block_tile, norm_tile, row_tile
from mokernels.ops.target import Target, target_of

Planned = tuple[Any, Launches]


class _Way(NamedTuple):
    """How the kernels call a quantizer.

    Attributes:
        name: the kernels' FORMAT.
        group: elements of a block; 1 if there are no blocks.
        fake: whether values are stored instead of codes and scales.
    """

    name: str
    group: int = 1
    fake: bool = False


_WAYS = {
    "fp8": _Way("static"),
    "fp8_per_token": _Way("token"),
    "fp8_per_block": _Way("fp8", FP8_BLOCK),
    "nvfp4": _Way("nvfp4", NVFP4_BLOCK),
    "mxfp8": _Way("mxfp8", MXFP8_BLOCK),
    "nvfp4_to_bf16": _Way("nvfp4", NVFP4_BLOCK, fake=True),
    "mxfp8_to_bf16": _Way("mxfp8", MXFP8_BLOCK, fake=True),
}


def rms_norm_quantize(
    quantizer: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    style: str,
    *extra: Tensor | None,
    target: Target | None = None,
) -> Any:
    """See ``mokernels::rms_norm_quantize_<quantizer>``."""
    target = target or target_of(x.device)
    return run(plan_norm_quantize(quantizer, x, None, weight, eps, style, *extra, target=target))


def add_rms_norm_quantize(
    quantizer: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    style: str,
    *extra: Tensor | None,
    target: Target | None = None,
) -> Any:
    """See ``mokernels::add_rms_norm_quantize_<quantizer>``."""
    target = target or target_of(x.device)
    tensors = (x, residual, weight)
    return run(plan_norm_quantize(quantizer, *tensors, eps, style, *extra, target=target))


def gated_quantize(
    quantizer: str,
    gate: Tensor,
    up: Tensor,
    activation: str,
    *extra: Tensor | None,
    target: Target | None = None,
) -> Any:
    """See ``mokernels::gated_quantize_<quantizer>``."""
    target = target or target_of(gate.device)
    return run(plan_gated_quantize(quantizer, gate, up, activation, *extra, target=target))


def plan_norm_quantize(
    quantizer: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    style: str,
    *extra: Tensor | None,
    target: Target,
) -> Planned:
    """What the quantizer returns for the norm of x; with a residual, x + residual before it."""
    rows, tile = rows_of(x), norm_tile(x.shape[-1])
    other = rows if residual is None else rows_of(residual)
    total = None if residual is None else x.new_empty(x.shape)
    outputs, pointers, constants = _quantized(quantizer, x, extra, target)
    launch = Launch(
        norm_quantize_kernel,
        (rows.total, 1, 1),
        (
            *(rows.tensor, None if residual is None else other.tensor, weight.contiguous(), total),
            *pointers,
            *rows.arguments,
            *other.arguments[2:],
            eps,
        ),
        constants
        | {
            "STYLE": style,
            "ONE_PASS": tile.columns >= rows.k,
            "NESTED": rows.nested or other.nested,
            "COLUMNS": tile.columns,
        },
        num_warps=tile.warps,
        num_stages=1,
        fp_fusion=False,
    )
    if total is None:
        return outputs, (launch,)
    return (total, *outputs) if isinstance(outputs, tuple) else (total, outputs), (launch,)


def plan_gated_quantize(
    quantizer: str,
    gate: Tensor,
    up: Tensor,
    activation: str,
    *extra: Tensor | None,
    target: Target,
) -> Planned:
    """What the quantizer returns for act(gate) * up."""
    rows, other = rows_of(gate), rows_of(up)
    outputs, pointers, constants = _quantized(quantizer, gate, extra, target)
    by_row = constants["FORMAT"] == "token"
    if by_row:
        tile = row_tile(rows.total, rows.k, target.processors)
        programs = -(-rows.total // tile.rows)
    else:
        tile = block_tile(rows.total, rows.k, constants["GROUP"], target.processors)
        programs = tile.programs(rows.total, rows.k)
    launch = Launch(
        gated_quantize_kernel,
        (programs, 1, 1),
        (rows.tensor, other.tensor, *pointers, *rows.arguments, *other.arguments[2:]),
        constants
        | {
            "ACTIVATION": activation,
            "ONE_PASS": tile.columns >= rows.k,
            "NESTED": rows.nested or other.nested,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
        },
        num_warps=tile.warps,
        num_stages=1,
        fp_fusion=False,
    )
    return outputs, (launch,)


def _quantized(
    quantizer: str, like: Tensor, extra: tuple[Tensor | None, ...], target: Target
) -> tuple[Any, tuple[Tensor | None, ...], dict[str, Any]]:
    """Outputs for activations ``like`` these; the kernel's factor, codes and scales; constants."""
    way = _WAYS[quantizer]
    outputs = QUANTIZERS[quantizer].fake(like, *extra)
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    bytes_ = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors]
    codes, scales = (*bytes_, None)[:2]
    # A scale that comes with its multiplier is not looked at.
    given = [tensor for tensor in extra if tensor is not None]
    constants = {
        "FORMAT": way.name,
        "GROUP": way.group,
        "FAKE": way.fake,
        "IS_MULTIPLIER": len(given) > 1,
        "CASTS_ONCE": target.casts_fp8_once,
        "HAS_TYPE": target.has_fp8_type,
    }
    return outputs, (given[-1] if given else None, codes, scales), constants
