"""The definition of every format's arithmetic, in plain torch, for any device.

Everything else in mokernels is measured against these functions: the CPU implementation of each
operator calls them, and the Triton kernels are tested against them. They favour being readable
over being fast, and they compute in fp32 whatever the dtype of their input.

NaN policy: a NaN is never lost. In FP8 it stays NaN; a NaN in a token makes the token's scale NaN;
a NaN in an NVFP4 block makes the block's scale NaN (E2M1 has no NaN of its own); MXFP8 keeps the
NaN element and gives its block the scale 1, as ModelOpt does.
"""

from mokernels.numerics.elements import (
    decode_e2m1,
    decode_e2m1_pairs,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
)
from mokernels.numerics.fp8 import (
    dequantize_fp8,
    expand_fp8_scale,
    fp8_multiplier,
    fp8_weight,
    quantize_fp8,
    quantize_fp8_block_weight,
    quantize_fp8_channel_weight,
    quantize_fp8_per_block,
    quantize_fp8_per_token,
    quantize_fp8_tensor_weight,
    static_fp8_scales,
)
from mokernels.numerics.mxfp8 import (
    dequantize_mxfp8,
    mxfp8_weight,
    quantize_mxfp8,
    quantize_mxfp8_weight,
)
from mokernels.numerics.nvfp4 import (
    dequantize_nvfp4,
    nvfp4_weight,
    quantize_nvfp4,
    quantize_nvfp4_weight,
)
from mokernels.numerics.packing import pack_nibbles, unpack_nibbles
from mokernels.numerics.product import CodedWeight, scaled_product

__all__ = [
    "CodedWeight",
    "decode_e2m1",
    "decode_e2m1_pairs",
    "decode_e4m3",
    "decode_e8m0",
    "dequantize_fp8",
    "dequantize_mxfp8",
    "dequantize_nvfp4",
    "encode_e2m1",
    "encode_e4m3",
    "expand_fp8_scale",
    "fp8_multiplier",
    "fp8_weight",
    "mxfp8_weight",
    "nvfp4_weight",
    "pack_nibbles",
    "quantize_fp8",
    "quantize_fp8_block_weight",
    "quantize_fp8_channel_weight",
    "quantize_fp8_per_block",
    "quantize_fp8_per_token",
    "quantize_fp8_tensor_weight",
    "quantize_mxfp8",
    "quantize_mxfp8_weight",
    "quantize_nvfp4",
    "quantize_nvfp4_weight",
    "scaled_product",
    "static_fp8_scales",
    "unpack_nibbles",
]
