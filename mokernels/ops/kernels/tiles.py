"""What the GEMM kernels share: which tile a program computes, how it loads, multiplies and ends.

Activations are x [M, K] and weights w [N, K], both with K contiguous and any row stride. A program
computes one [BLOCK_M, BLOCK_N] tile. With SWAP the weight is the M side of the matrix instruction:
the accumulator is [BLOCK_N, BLOCK_M], which changes no product and no order of addition, only which
rows the hardware pads.

SPLIT says how a program goes through K. None: at once. "last" and "parts": over one part of it,
whose sum goes to a workspace; :mod:`reduce` adds these up. "serial": over the same parts one after
the other, each from a fresh accumulator, and it adds them in the same order: the bits are the same.
"""

import triton
import triton.language as tl

from mokernels.ops.kernels.elements import decode_e4m3, fnuz_of_e4m3


@triton.jit
def tile_at(place, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of the tile at this place in the order of tiles, in tiles.

    The order walks down GROUP_M row tiles before it goes to the next column, so that neighbours in
    time share weights in the L2 cache.
    """
    rows = tl.cdiv(M, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    group = place // (GROUP_M * columns)
    within = place % (GROUP_M * columns)
    first = group * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    return first + within % height, within // height


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of this program's tile, in tiles."""
    return tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)


@triton.jit
def indices(tile, BLOCK: tl.constexpr):
    """The BLOCK row (or column) indices of a tile."""
    return tile * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def row_pointers(base, rows, stride):
    """Pointers [BLOCK, 1] to the starts of rows; 64-bit, since a matrix may pass 2 ** 31 items."""
    return base + rows.to(tl.int64)[:, None] * stride


@triton.jit
def weight_rows(w, rn, N, stride):
    """Pointers to the rows of a weight. Rows past N repeat the last one: their products are never
    stored, and a load without a mask on rows is cheaper in the main loop.
    """
    return row_pointers(w, tl.minimum(rn, N - 1), stride)


@triton.jit
def load_activations(rows, in_m, offset, COLUMNS: tl.constexpr, limit, EVEN_K: tl.constexpr):
    """[BLOCK_M, COLUMNS] items of x from column ``offset`` on; 0 beyond M and beyond ``limit``."""
    return load_columns(rows, in_m, offset + tl.arange(0, COLUMNS), limit, EVEN_K)


@triton.jit
def load_columns(rows, in_m, columns, limit, EVEN_K: tl.constexpr):
    """[BLOCK_M, C] items of x at ``columns`` [C]; 0 beyond M and beyond ``limit``."""
    columns = columns[None, :]
    if EVEN_K:
        tile = tl.load(rows + columns, mask=in_m[:, None], other=0.0)
    else:
        tile = tl.load(rows + columns, mask=in_m[:, None] & (columns < limit), other=0.0)
    return tile


@triton.jit
def load_weights(rows, offset, COLUMNS: tl.constexpr, limit, EVEN_K: tl.constexpr):
    """[BLOCK_N, COLUMNS] items of w (or of its scales); 0 beyond ``limit``."""
    columns = offset + tl.arange(0, COLUMNS)[None, :]
    if EVEN_K:
        tile = tl.load(rows + columns)
    else:
        tile = tl.load(rows + columns, mask=columns < limit, other=0.0)
    return tile


@triton.jit
def split_bounds(part, K, blocks_per_split, BLOCK_K: tl.constexpr):
    """[start, stop) of the K range of a part.

    ``blocks_per_split`` counts K blocks instead of elements, so that the compiler sees that every
    start is a multiple of BLOCK_K and keeps its loads wide.
    """
    start = part * blocks_per_split * BLOCK_K
    return start, tl.minimum(start + blocks_per_split * BLOCK_K, K)


@triton.jit
def number_of_parts(K, blocks_per_split, BLOCK_K: tl.constexpr):
    """How many parts cover K."""
    return tl.cdiv(K, blocks_per_split * BLOCK_K)


@triton.jit
def as_operand(tile, DTYPE: tl.constexpr):
    """A loaded tile in the dtype that the dot multiplies; exact, or exactly half of it.

    E4M3 comes as ``float8e4nv``, or as bytes on targets that lack the type. Half of it is what
    ``float8e4b8`` gives, e4m3fnuz; see :func:`in_units`.
    """
    if tile.dtype == tl.uint8:
        if DTYPE == tl.float8e4b8:
            tile = fnuz_of_e4m3(tile).to(DTYPE, bitcast=True)
        else:
            tile = decode_e4m3(tile, DTYPE, False)
    else:
        tile = tile.to(DTYPE)
    return tile


@triton.jit
def in_units(value, DTYPE: tl.constexpr):
    """Value, a sum of products of operands of this dtype or its scale, times what 1 stands for.

    Both operands are halves where they are e4m3fnuz: 4, and exact.
    """
    if DTYPE == tl.float8e4b8:
        value = value * 4.0
    return value


@triton.jit
def new_accumulator(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """fp32 zeros for a tile."""
    if SWAP:
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return zeros


@triton.jit
def no_parts(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """A sum of no parts: fp32 -0, to which the first part adds as itself, -0 included."""
    return new_accumulator(BLOCK_M, BLOCK_N, SWAP) * -1.0


@triton.jit
def multiply(x, w, acc, SWAP: tl.constexpr, PROMOTE: tl.constexpr):
    """Acc + x @ w.T, for x [BLOCK_M, K], w [BLOCK_N, K] of one dtype.

    PROMOTE is the number of FP8 products after which Hopper's accumulator is added to an fp32 one;
    None leaves the hardware's own. fp32 operands are multiplied as such, never as TF32.
    """
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE)
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE)
    return acc


@triton.jit
def by_rows(acc, SWAP: tl.constexpr):
    """An accumulator as [BLOCK_M, BLOCK_N]."""
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def store_output(
    acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, stride_out=None
):
    """out[rm, rn] = acc * scale_x * scale_w + bias, in out's dtype.

    The rows of out [M, N] are dense, and N items apart unless ``stride_out`` says otherwise.
    Scales are pointers to fp32 vectors (stride 0 repeats a scalar) and, like the bias, may be None;
    scale_x may also be the values of the rows ``rm``. The order of these operations is the same in
    every kernel, so that a result does not depend on which launch or program ends it.
    """
    in_m = rm < M
    in_n = rn < N
    if scale_x is not None:
        if scale_x.dtype.is_ptr():
            scale_x = tl.load(scale_x + rm * stride_sx, mask=in_m, other=0.0)
        acc = acc * scale_x[:, None]
    if scale_w is not None:
        acc = acc * tl.load(scale_w + rn * stride_sw, mask=in_n, other=0.0)[None, :]
    if bias is not None:
        acc = acc + tl.load(bias + rn, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if stride_out is None:
        stride_out = N
    pointers = row_pointers(out, rm, stride_out) + rn[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def store_partial(acc, rm, rn, M, N, partials):
    """Partial sums of this program's part of K, to fp32 ``partials`` [parts, M, N]."""
    base = partials + tl.program_id(1).to(tl.int64) * M * N
    pointers = row_pointers(base, rm, N) + rn[None, :]
    tl.store(pointers, acc, mask=(rm < M)[:, None] & (rn < N)[None, :])
