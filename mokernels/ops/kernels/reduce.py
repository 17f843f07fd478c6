"""How a program of a product ends: it stores its sum, or it stores a part and the last one adds.

Where programs share the K of a tile (split-K), each stores its part to a workspace in memory. SPLIT
"last": the program that comes last at the tile's counter adds the parts. SPLIT "parts": a second
launch does, :func:`reduce_splits`. Both add in the order of the parts, by the same function, so
that neither the choice nor who comes last changes a bit.
"""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import let_the_next_begin, wait_for_inputs
from mokernels.ops.kernels.tiles import (
    indices,
    no_parts,
    store_output,
    store_partial,
)


@triton.constexpr_function
def parts_at_once(tile):
    """Of how many parts a program loads its tile together: up to 4096 sums, and four parts.

    Registers hold them until they are added in order; with 8192 some spill.
    """
    return min(4, max(1, 4096 // tile))


@triton.jit
def finish(
    acc,
    rm,
    rn,
    M,
    N,
    scale_x,
    stride_sx,
    scale_w,
    stride_sw,
    bias,
    out,
    SPLIT: tl.constexpr,
    tile=None,
):
    """End a program whose sums are ``acc`` [BLOCK_M, BLOCK_N], as store_output does.

    With SPLIT "parts" ``out`` is the fp32 workspace of partial sums [splits, M, N]; with "last" it
    is (out, workspace, counters), int32 zeros for every tile, which are zeros again at the end.
    ``tile`` is its number, by default the program's.
    """
    let_the_next_begin()
    if SPLIT == "parts":
        store_partial(acc, rm, rn, M, N, out)
    elif SPLIT == "last":
        result, partials, counters = out
        store_partial(acc, rm, rn, M, N, partials)
        if tile is None:
            tile = tl.program_id(0)
        if arrives_last(counters + tile):
            total = sum_of_parts(partials, rm, rn, M, N, tl.num_programs(1))
            store_output(total, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, result)
    else:
        store_output(acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out)


@triton.jit
def arrives_last(counter):
    """Whether all other programs of this tile have stored their parts; then these can be read.

    One thread counts for the program. The barrier has the stores of all threads come before the
    count, whose release publishes them to the device too: in PTX's memory model a release covers
    what barriers have ordered before it. (Elsewhere it may not: config_tables.rows_of.) Its acquire
    takes in what those who counted before have published. The other threads go on when they are
    told the count, by way of shared memory and a barrier.

    The last program sets the counter back, for the next launch, which begins when this one has
    ended. launch/counters.py says whose the counters are, and what if a launch is cut short.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_of_parts(partials, rm, rn, M, N, parts):
    """Fp32 partials[0] + partials[1] + ... of a tile, ``partials`` being [parts, M, N].

    They are added from the first to the last, to -0, to which the first adds as itself; so are
    parts beyond the last, of -0, which change nothing. The loads bypass the L1 cache, which is not
    coherent: other processors may have stored the parts in this launch. Those of AT_ONCE parts are
    in flight together.
    """
    AT_ONCE: tl.constexpr = parts_at_once(rm.shape[0] * rn.shape[0])
    # Columns first: in the shape of the tiles of x and of the result the compiler would give a
    # thread the 8 or 16 neighbours that it has of those, and threads would share their sectors.
    inside = (rn < N)[:, None] & (rm < M)[None, :]
    pointers = (partials + rm.to(tl.int64) * N)[None, :] + rn[:, None]
    size = tl.cast(M, tl.int64) * N
    nothing = no_parts(rm.shape[0], rn.shape[0], True)
    acc = nothing
    for first in range(0, parts, AT_ONCE):
        for offset in tl.static_range(AT_ONCE):
            given = inside & (first + offset < parts)
            acc += tl.load(pointers, mask=given, other=nothing, cache_modifier=".cg")
            pointers += size
    return tl.trans(acc)


@triton.jit(do_not_specialize=["M", "parts"])
def reduce_splits(
    partials,
    scale_x,
    scale_w,
    bias,
    out,
    M,
    N,
    stride_sx,
    stride_sw,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store out [M, N] = (partials[0] + partials[1] + ...) * scale_x [M] * scale_w [N] + bias [N].

    ``partials`` is fp32 [parts, M, N].
    """
    wait_for_inputs()
    rm = indices(tl.program_id(0), BLOCK_M)
    rn = indices(tl.program_id(1), BLOCK_N)
    acc = sum_of_parts(partials, rm, rn, M, N, parts)
    store_output(acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out)
