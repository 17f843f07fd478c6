"""What a GEMM configuration takes of a target, and whether it is legal there."""

from __future__ import annotations

from dataclasses import replace

from mokernels.formats import FP8_BLOCK
from mokernels.ops.config_tables import ANY_M, generation
from mokernels.ops.gemm_config import DECODED_FIRST, GemmConfig, decodes_first
from mokernels.ops.kinds import GEMVS, Kind
from mokernels.ops.quantizing import E4M3_GEMV_GROUP, GEMV_GROUP
from mokernels.ops.target import Target

NARROW: int = 128 * 128
"""Most sums of a tile by TMA whose result is fp32."""


def config_ok(config: GemmConfig, kind: Kind, target: Target) -> bool:
    """Whether a program fits the target, and the configuration the kernel."""
    powers_of_two = all(
        value & (value - 1) == 0 for value in (config.block_m, config.block_n, config.block_k)
    )
    block_scales = kind in (Kind.FP8_BLOCK, Kind.HALF_BLOCK, Kind.FP32)
    one_scale = FP8_BLOCK % config.block_k == 0 and FP8_BLOCK % config.block_n == 0
    promotes = config.promote is None or config.block_k % config.promote == 0
    fits = shared_bytes(config, kind, target) <= target.shared_memory
    whole = kind not in GEMVS or _is_gemv(config, kind, target)
    by_tma = not config.tma or _goes_by_tma(config, kind, target)
    scaled = one_scale or not block_scales
    return powers_of_two and fits and promotes and whole and by_tma and scaled


def is_narrow(config: GemmConfig) -> bool:
    """Whether a tile by TMA may have a result in fp32, and is as small as tiles are made there."""
    return config.block_m * config.block_n <= NARROW


def narrowed(config: GemmConfig) -> GemmConfig:
    """A configuration by TMA with half of a tile's longer side, and the pipeline that this leaves.

    Tiles of 128x256 and of 256x128 become 128x128, of which 5 steps of 32 KiB fit beside an fp32
    result.
    """
    m, n = config.block_m, config.block_n
    m, n = (m // 2, n) if m > n else (m, n // 2)
    stages = max(config.num_stages, min(config.num_stages + 2, 5))
    return replace(config, block_m=m, block_n=n, num_stages=stages)


def shared_bytes(config: GemmConfig, kind: Kind, target: Target) -> int:
    """Upper bound of the shared memory of a program, in bytes.

    Pipelined loads keep ``num_stages`` copies of a step's operands as they are stored, one less
    where the matrix instruction is synchronous; a decoded weight may take one more copy in its new
    dtype; the result passes through shared memory in fp32 at the end, when the loads' buffers are
    free again. By TMA they are not, since the next tile's operands are on their way; a program
    of fp32 results has at most NARROW of them then. More results have 16 bits, and pass in parts
    of 32 KiB (read off triton 3.6 and 3.9). A weight that is decoded before is read as the
    activations are.
    """
    x_item, w_item = _stored_bytes(kind)
    scales = _scale_bytes(config, kind)
    if decodes_first(config, kind):
        w_item, scales = x_item, 0
    rows = config.block_m * x_item + config.block_n * w_item
    step = int(config.block_k * (rows + scales))
    decoded = config.block_n * config.block_k * x_item if kind.value.startswith("half") else 0
    if kind is Kind.HALF_NVFP4:
        decoded = max(decoded, config.block_m * config.block_k * x_item)  # x in its order of K
    copies = config.num_stages - (generation(target) == "mma")
    if config.tma:
        end = 4 * config.block_m * config.block_n if is_narrow(config) else 2 * NARROW
        return config.num_stages * step + end + 1024
    end = 4 * config.block_m * config.block_n
    return max(copies * step + int(decoded), end) + 1024


def _goes_by_tma(config: GemmConfig, kind: Kind, target: Target) -> bool:
    """Whether the persistent kernel has the product, and TMA the blocks (256 items at most).

    Block scales that the matrix unit applies it only loads in the order in which 128 rows are
    copied.
    """
    has_kernel = kind in (Kind.FP8, Kind.FP8_FAST, Kind.FP8_BLOCK, *DECODED_FIRST)
    if kind in (Kind.NVFP4, Kind.MXFP8):
        has_kernel = target.copies_scales and min(config.block_m, config.block_n) >= 128
    blocks = max(config.block_m, config.block_n, config.block_k) <= 256 and config.block_k >= 16
    # What is decoded first is stored as columns of a wider result, which parts of K are not.
    whole = config.split is None or (config.split != "serial" and kind not in DECODED_FIRST)
    return target.has_tma and has_kernel and blocks and not config.swap and whole


def _is_gemv(config: GemmConfig, kind: Kind, target: Target) -> bool:
    """Whether a program has one row of x, and each of its threads one group of a step.

    With scales of 128x128 blocks its rows of the weight have one scale.
    """
    threads = config.num_warps * (32 if target.backend == "cuda" else 64)
    group = GEMV_GROUP if kind is Kind.GEMV_NVFP4 else E4M3_GEMV_GROUP
    one_scale = kind is not Kind.GEMV_BLOCK or FP8_BLOCK % config.block_n == 0
    return config.block_m == 1 and config.block_k == group * threads and one_scale


def _stored_bytes(kind: Kind) -> tuple[float, float]:
    """Bytes of an element of x and of w in memory (16-bit or fp32 x; the largest w)."""
    if kind is Kind.NVFP4:
        return 0.5, 0.5
    if kind is Kind.GEMV_NVFP4:
        return 4, 0.5
    if kind is Kind.FP32:
        return 4, 1
    if kind in (Kind.FP8, Kind.FP8_FAST, Kind.FP8_BLOCK, Kind.MXFP8):
        return 1, 1
    return 2, 0.5 if kind is Kind.HALF_NVFP4 else 1


def _scale_bytes(config: GemmConfig, kind: Kind) -> float:
    """Bytes of pipelined block scales for each element of K in a step."""
    if kind is Kind.NVFP4:
        return (config.block_m + config.block_n) / 16
    if kind is Kind.MXFP8:
        return (config.block_m + config.block_n) / 32
    return config.block_n / {Kind.HALF_NVFP4: 16, Kind.HALF_MXFP8: 32, Kind.FP32: 16}.get(
        kind, ANY_M
    )
