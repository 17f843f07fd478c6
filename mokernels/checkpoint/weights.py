"""Quantizing one weight to the tensors that a checkpoint stores for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mokernels.errors import ArgumentError
from mokernels.formats import Format, Granularity
from mokernels.numerics import (
    quantize_fp8_block_weight,
    quantize_fp8_channel_weight,
    quantize_fp8_tensor_weight,
    quantize_mxfp8_weight,
    quantize_nvfp4_weight,
)

_QUANTIZERS: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "FP8": quantize_fp8_tensor_weight,
    "FP8_PER_CHANNEL_PER_TOKEN": quantize_fp8_channel_weight,
    "FP8_PB_WO": quantize_fp8_block_weight,
    "MXFP8": quantize_mxfp8_weight,
}


def quantize_weight(
    format: Format,
    weight: Tensor,
    *,
    input_scale: Tensor | float | None = None,
    weight_scale_2: Tensor | None = None,
    weight_amax: Tensor | None = None,
) -> dict[str, Tensor]:
    """Quantize a weight as ModelOpt's export does.

    Args:
        format: to quantize to.
        weight: [N, K], a 16-bit or 32-bit float dtype, without NaN and infinities.
        input_scale: the calibrated activation scale, above 0. NVFP4 needs it; FP8 without it
            quantizes activations per token.
        weight_scale_2: fp32 [], for NVFP4: the scale of all blocks, from the weight itself when
            None. Layers that are fused when served (q/k/v, gate/up) share the largest.
        weight_amax: fp32 [], for FP8_PB_WO: every block's amax; for FP8: that of the whole weight,
            of which ``weight`` may be some rows. Its own when None.

    Returns:
        Leaf -> tensor, in the checkpoint's dtypes and shapes, on the weight's device.

    Raises:
        ArgumentError: the weight is no finite float matrix or its K does not fit the format; NVFP4
            without ``input_scale``; a scale for a format that has none, or that is not positive.
    """
    _check_weight(weight)
    scale = _checked_input_scale(format, input_scale)
    if weight_scale_2 is not None and not format.second_scale:
        raise ArgumentError(f"{format.name} has no weight_scale_2; leave it out.")
    if format.second_scale:
        codes, block_scale, second = quantize_nvfp4_weight(weight, weight_scale_2)
        stored = {"weight": codes, "weight_scale": block_scale, "weight_scale_2": second}
    else:
        quantizer = _QUANTIZERS[format.name]
        if weight_amax is None:
            codes, weight_scale = quantizer(weight)
        elif format.granularity is Granularity.BLOCK:
            codes, weight_scale = quantize_fp8_block_weight(weight, weight_amax)
        elif format.granularity is Granularity.TENSOR:
            codes, weight_scale = quantize_fp8_tensor_weight(weight, weight_amax)
        else:
            raise ArgumentError(f"{format.name} takes no weight_amax; leave it out.")
        stored = {"weight": codes, "weight_scale": weight_scale}
    if scale is not None:
        stored["input_scale"] = scale.to(weight.device)
    return stored


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ArgumentError(
            f"quantize_weight needs a float matrix [N, K], got {weight.dtype} "
            f"{tuple(weight.shape)}. Dequantize the weight first, or leave the layer plain."
        )
    if weight.numel() == 0 or not bool(weight.isfinite().all()):
        raise ArgumentError(
            f"quantize_weight got a weight of shape {tuple(weight.shape)} that is empty or holds "
            "NaN or infinities; such a weight has no scale. Leave the layer plain, or repair it."
        )


def _checked_input_scale(format: Format, input_scale: Tensor | float | None) -> Tensor | None:
    if input_scale is None:
        if format.input_scale and format.second_scale:
            raise ArgumentError(
                f"{format.name} needs a calibrated input_scale, the activations' amax / 2688. "
                "Calibrate the model, or choose a format without calibration."
            )
        return None
    if not format.input_scale:
        raise ArgumentError(f"{format.name} has no input_scale; leave it out.")
    scale = torch.as_tensor(input_scale, dtype=torch.float32).detach().reshape(-1)
    if scale.numel() != 1 or not bool(scale.isfinite().all() & (scale > 0).all()):
        raise ArgumentError(
            f"input_scale is {scale.tolist()[:4]}, wanted one finite number above 0."
        )
    return scale.reshape(())
