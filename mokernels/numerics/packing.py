"""Two 4-bit codes in a byte, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from mokernels.errors import ArgumentError


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack neighbours along the last dimension: ``byte = code[2 i] | code[2 i + 1] << 4``.

    Args:
        codes: uint8 [..., K] with values 0 to 15, K even.

    Returns:
        uint8 [..., K / 2], contiguous.

    Raises:
        ArgumentError: K is odd, or the dtype is not uint8.
    """
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise ArgumentError(
            f"pack_nibbles needs uint8 codes with an even last dimension, got {codes.dtype} "
            f"{tuple(codes.shape)}. Pad the last dimension, or convert the codes to uint8."
        )
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_nibbles`: uint8 [..., K / 2] to uint8 codes [..., K]."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
