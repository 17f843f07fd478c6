"""Random operands of a product: legal codes and scales of every magnitude, no checkpoint read."""

from __future__ import annotations

import torch
from torch import Tensor

from mokernels.formats import Activation, Format
from mokernels.numerics import static_fp8_scales
from mokernels.tuning.products import Product

_E4M3_NAN = 0x7F


def draw_weight(product: Product, device: torch.device, seed: int) -> dict[str, Tensor]:
    """The stored tensors of a weight by leaf, and what a layer derives from them.

    Results stay near 1: what a GPU draws of power depends on its data, and infinities or NaN would
    hide a difference between candidates.
    """
    generator = torch.Generator(device).manual_seed(seed)
    format, drawn = product.format, {}
    for stored in format.tensors(product.n, product.k):
        shape = stored.shapes[0]
        drawn[stored.leaf] = _leaf(stored.leaf, format, shape, device, generator)
    if drawn["weight_scale"].dim() == 4:
        drawn["weight_scale"] = drawn["weight_scale"].squeeze(3).squeeze(1)
    if product.activation is Activation.FP8_STATIC:
        pair = static_fp8_scales(drawn["input_scale"])
        drawn["input_multiplier"], drawn["input_scale"] = pair
    return drawn


def draw_activations(product: Product, rows: int, device: torch.device, seed: int) -> Tensor:
    """Normally distributed bf16 [rows, K]."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, product.k, device=device, generator=generator)
    return x.to(torch.bfloat16)


def _leaf(
    leaf: str,
    format: Format,
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    def integers(low: int, high: int) -> Tensor:
        given = {"device": device, "generator": generator, "dtype": torch.uint8}
        return torch.randint(low, high, shape, **given)  # type: ignore[arg-type]

    if leaf == "weight":
        codes = integers(0, 256)
        if format.element.storage is torch.uint8:
            return codes
        codes[(codes & _E4M3_NAN) == _E4M3_NAN] = 0
        return codes.view(torch.float8_e4m3fn)
    if leaf == "weight_scale" and format.scale_dtype is torch.uint8:
        return integers(112, 120)  # 2 ** -15 to 2 ** -8
    if leaf == "weight_scale" and format.scale_dtype is torch.float8_e4m3fn:
        return integers(0x20, 0x40).view(torch.float8_e4m3fn)  # 2 ** -3 to 2
    scale = torch.rand(shape, device=device, generator=generator) + 0.5
    return scale / 128
