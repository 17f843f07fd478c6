"""Host side of the Triton kernels: one function for each operator, named as the operator; or, for
operators that differ in the quantizer only, one for all of them that takes its name first.

A launcher takes the operator's arguments, already checked, on a CUDA, HIP or XPU device (on the CPU
under Triton's interpreter), and a keyword ``target`` that overrides the device's own: the tests run
the choices of every target that way. It plans its launches as data (:class:`plan.Launch`), which
the tests compile ahead of time for targets that this machine lacks, and then runs them.
"""

from mokernels.ops.launch.fake_quantize import (
    fake_quantize_fp8,
    fake_quantize_fp8_per_token,
    fake_quantize_fp8_weight,
    fake_quantize_mxfp8,
    fake_quantize_nvfp4,
    fake_quantize_nvfp4_weight,
)
from mokernels.ops.launch.fused import (
    add_rms_norm_quantize,
    gated_quantize,
    rms_norm_quantize,
)
from mokernels.ops.launch.gemm import (
    fp8_gemm,
    fp8_weight_only_gemm,
    mxfp8_gemm,
    mxfp8_weight_only_gemm,
    nvfp4_gemm,
    nvfp4_weight_only_gemm,
)
from mokernels.ops.launch.linear import (
    fp8_block_linear,
    fp8_linear,
    fp8_per_token_linear,
    mxfp8_linear,
    nvfp4_linear,
)
from mokernels.ops.launch.quantize import (
    dequantize_fp8,
    dequantize_fp8_per_block,
    dequantize_fp8_per_token,
    dequantize_mxfp8,
    dequantize_nvfp4,
    quantize_fp8,
    quantize_fp8_per_block,
    quantize_fp8_per_token,
    quantize_mxfp8,
    quantize_mxfp8_to_bf16,
    quantize_nvfp4,
    quantize_nvfp4_to_bf16,
)

__all__ = [
    "add_rms_norm_quantize",
    "dequantize_fp8",
    "dequantize_fp8_per_block",
    "dequantize_fp8_per_token",
    "dequantize_mxfp8",
    "dequantize_nvfp4",
    "fake_quantize_fp8",
    "fake_quantize_fp8_per_token",
    "fake_quantize_fp8_weight",
    "fake_quantize_mxfp8",
    "fake_quantize_nvfp4",
    "fake_quantize_nvfp4_weight",
    "fp8_block_linear",
    "fp8_gemm",
    "fp8_linear",
    "fp8_per_token_linear",
    "fp8_weight_only_gemm",
    "gated_quantize",
    "mxfp8_gemm",
    "mxfp8_linear",
    "mxfp8_weight_only_gemm",
    "nvfp4_gemm",
    "nvfp4_linear",
    "nvfp4_weight_only_gemm",
    "quantize_fp8",
    "quantize_fp8_per_block",
    "quantize_fp8_per_token",
    "quantize_mxfp8",
    "quantize_mxfp8_to_bf16",
    "quantize_nvfp4",
    "quantize_nvfp4_to_bf16",
    "rms_norm_quantize",
]
