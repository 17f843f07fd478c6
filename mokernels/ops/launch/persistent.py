"""Launches of products whose operands come by TMA: which can, in what tiles, and how.

TMA (tensor memory accelerator) copies blocks of a matrix to shared memory by a descriptor of it.
Codes that it cannot describe are multiplied by the kernels that load from pointers, to the same
bits.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mokernels.ops.config_limits import is_narrow, narrowed
from mokernels.ops.gemm_config import GemmConfig, ceil_div
from mokernels.ops.kernels.gemm_persistent import gemm_persistent
from mokernels.ops.launch.plan import Launch
from mokernels.ops.launch.product import Ending, Operands, plan_split
from mokernels.ops.target import Target

LARGEST_STRIDE: int = 1 << 40
"""Bytes from one row to the next have to be fewer (CUDA driver, cuTensorMapEncodeTiled)."""
EDGE_COST: int = 16
"""What an element of a tile's edges costs, in elements of its area: by that a 128x128 tile is 5 %
slower for its area than a 128x256 one, as on an H100."""


def tma_reads(matrix: Tensor, target: Target) -> bool:
    """Whether the target has TMA, and TMA can read a matrix.

    ==========================  ====================================================================
    items, in either dimension  at least one, and fewer than 2 ** 31 (32-bit coordinates)
    columns                     dense
    address, bytes of a row     multiples of 16
    rows                        apart: one that is repeated by a stride of 0 has no descriptor
    ==========================  ====================================================================
    """
    (rows, columns), (step, dense), item = matrix.shape, matrix.stride(), matrix.element_size()
    return (
        target.has_tma
        and 0 < rows < 2**31
        and 0 < columns < 2**31
        and dense == 1
        and columns <= step < LARGEST_STRIDE // item
        and step * item % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def tile_by_tma(config: GemmConfig, m: int, n: int, item: int, target: Target) -> GemmConfig:
    """A configuration by TMA, or one of half its tile if that is done first, or fits.

    Programs take tiles in turns, and the last turn takes as long as the others though few programs
    may have a tile in it. The order of addition is the same.

    Args:
        config: chosen without a look at the very shape.
        m: rows of x.
        n: rows of the weight.
        item: bytes of an item of the result.
        target: as many programs as it has processors share the tiles.
    """
    if is_narrow(config):
        return config
    narrow = narrowed(config)
    if item > 2 or _time(narrow, m, n, target) < _time(config, m, n, target):
        return narrow
    return config


def plan_persistent(
    operands: Operands,
    ending: Ending,
    config: GemmConfig,
    target: Target,
    element: Literal["e2m1", "e4m3"] | None = None,
) -> tuple[Launch, ...]:
    """The launches of one product, of operands of one dtype, whose configuration says ``tma``.

    The kernel takes what the others take (:mod:`product`), but for the strides of x and w, which
    their descriptors know, and with the stride of out for the steps of a part of K.

    Args:
        operands: x, w, the block scales of x and of w or None; :func:`tma_reads` both x and w.
        ending: what to do with the sums, and where to put them; out may be columns of a matrix.
        config: tile, split and pipeline; out is dense where it splits K.
        target: as many programs as it has processors share the tiles.
        element: of operands whose block scales the matrix unit applies.
    """
    x, w, *block_scales = operands.pointers
    m, n, k = operands.sizes
    columns = config.block_k // (2 if element == "e2m1" else 1)
    assert x is not None
    assert w is not None
    config = tile_by_tma(config, m, n, ending.out.element_size(), target)
    split = plan_split(ending, config, m, n)
    arguments = (
        _descriptor(x, config.block_m, columns),
        _descriptor(w, config.block_n, columns),
        *block_scales,
        *split.pointers,
        *operands.sizes,
        *operands.strides[2:],
        *split.strides,
        ending.out.stride(-2) if ending.out.dim() > 1 else n,
        config.blocks_per_split(k),
    )
    constants = {
        "PROGRAMS": target.processors,
        "ELEMENT": element,
        # Without scales nothing has to look where K ends: TMA reads 0 there.
        "EVEN_K": element is None or k % config.block_k == 0,
        "PROMOTE": config.promote,
        "SPLIT": config.split,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    launch = Launch(
        gemm_persistent,
        (min(split.tiles, target.processors), split.parts, 1),
        arguments,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return (launch, *split.reduction)


def _tiles(config: GemmConfig, m: int, n: int) -> int:
    return ceil_div(m, config.block_m) * ceil_div(n, config.block_n)


def _time(config: GemmConfig, m: int, n: int, target: Target) -> int:
    """Turns, times what a tile costs for each step along K."""
    height, width = config.block_m, config.block_n
    turns = ceil_div(_tiles(config, m, n), target.processors)
    return turns * (height * width + EDGE_COST * (height + width))


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix that TMA reads, in blocks [rows, columns].

    The constructor would ask again what :func:`tma_reads` has answered, for three times what this
    takes, which is no more than looking a descriptor up would. Triton reads the matrix' address and
    encodes the descriptor at every launch, so that none is ever stale.
    """
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.block_shape = matrix, [rows, columns]
    made.shape, made.strides = matrix.shape, matrix.stride()
    return made
