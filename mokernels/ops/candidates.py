"""Other ways to launch a GEMM that give the same bits: what tuning may choose from.

A pure function of the closed form's choice (:func:`mokernels.ops.configs.choose`), the kind and the
target. Candidates keep the order of addition: kernel, matrix instruction, K step, number of partial
sums, promotion and operand order are those of the closed form. They differ in the size of a tile,
the number of warps, the depth of the pipeline and the order in which programs walk. Codes by codes
may also come by TMA where the closed form loads them from pointers. None of those reaches a sum as
long as the matrix instruction stays the same one, which is what :func:`objection` sees to for each
generation:

- Hopper multiplies by wgmma where the M side of a tile has 64 rows and the warps come in fours; a
  smaller tile goes to mma.sync, an instruction for 16-bit operands.
- Datacenter Blackwell has one instruction for an M side of 64 rows and one for 128.
- AMD's compiler takes 32x32 instructions where both sides have 32 rows, and else 16x16, whose steps
  along K are twice as long.
- mma.sync has one shape for a dtype, and fp32 has none: its products are added one by one.

Which operand is the M side changes no order where the instruction is one for both sides; it is kept
all the same, since on Hopper and Blackwell it decides which tiles have the instruction at all. Only
by TMA, where x is the M side always, it may change.

GEMVs add their threads' sums at the end, in an order that tile and warps decide: nothing varies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from itertools import product

from mokernels.ops.config_limits import config_ok, is_narrow, narrowed
from mokernels.ops.config_tables import generation
from mokernels.ops.gemm_config import GemmConfig, decodes_first
from mokernels.ops.kinds import GEMVS, Kind
from mokernels.ops.target import Target

MOST_CANDIDATES = 24
"""Most candidates of one choice, the closed form's own included: what compiling them may cost."""
FREE_FIELDS = ("block_m", "block_n", "num_warps", "num_stages", "group_m")
"""What candidates may differ in, besides how operands come (``tma``, and with it ``swap``)."""
FEW_ROWS = 64
"""Up to this bucket a tile has all rows: fewer would read the weight twice, more are padding."""
MOST_BY_TMA = 8
"""Most candidates by TMA where the closed form loads from pointers."""
FEWEST_BY_TMA = 64
"""From this bucket on: fewer rows may be quantized by the product's own launch, which TMA is not
for."""
_CODES_BY_CODES = (Kind.FP8, Kind.FP8_FAST, Kind.FP8_BLOCK, Kind.NVFP4, Kind.MXFP8)
_SUMS_OF_A_THREAD = 128
"""Most accumulators of a thread in registers; more spill beside the operands."""
_HALF_OF_THEM = (
    *(Kind.FP8_BLOCK, Kind.HALF_BLOCK),  # with a second accumulator, as with promotion
    *(Kind.HALF_FP8, Kind.HALF_NVFP4, Kind.HALF_MXFP8),  # with a decoded tile of the weight
)


def candidates_of(base: GemmConfig, kind: Kind, target: Target) -> tuple[GemmConfig, ...]:
    """The closed form's choice first, then what else may be tried, the nearest to it first.

    Args:
        base: what :func:`mokernels.ops.configs.choose` returned, not for batch invariance.
        kind: of the product.
        target: what it is launched on.
    """
    return _candidates(base, kind, target)


def objection(config: GemmConfig, base: GemmConfig, kind: Kind, target: Target) -> str | None:
    """Why a configuration may not stand in for the closed form's, as a clause; None if it may.

    Args:
        config: what somebody wants to launch.
        base: the closed form's choice for the same product.
        kind: of the product.
        target: what it is launched on.
    """
    if config == base:
        return None
    free = (*FREE_FIELDS, "tma", "swap") if _goes_by_tma(config, base, kind) else FREE_FIELDS
    for name in (field.name for field in fields(GemmConfig) if field.name not in free):
        found, wanted = getattr(config, name), getattr(base, name)
        if found != wanted:
            return f"its {name} is {found} and the closed form's is {wanted}, so it adds otherwise"
    if kind in GEMVS:
        return "a GEMV adds in an order that its tile and warps decide, so that nothing may vary"
    if not _is_sane(config) or not all(config_ok(c, kind, target) for c in _launched(config)):
        return f"its program does not fit {target.name}"
    if instruction_rows(config, kind, target) != instruction_rows(base, kind, target):
        return "its tile takes another matrix instruction than the closed form's"
    return None


def instruction_rows(config: GemmConfig, kind: Kind, target: Target) -> int:
    """Rows of the M side of the matrix instruction, as far as a tile decides on the instruction.

    Equal numbers mean the same instruction, for one kind and target; 0 is a tile that the wanted
    one does not fit.
    """
    m_side, n_side = config.block_m, config.block_n
    if config.swap:
        m_side, n_side = n_side, m_side
    made = generation(target)
    if kind is Kind.FP32:
        return 1
    if made == "mma":
        return 16 if m_side >= 16 else 0
    if made == "mfma":
        return 32 if min(m_side, n_side) >= 32 else 16
    if made == "wgmma" and 16 <= m_side < 64:
        return 16
    if config.num_warps % 4 or m_side < 64:
        return 0
    if made == "tcgen05":
        return min(m_side, 128)
    # A warp has 16 rows of the M side; with fewer, warps share rows and split the N side.
    return 64 if m_side >= 16 * config.num_warps else 0


@cache
def _candidates(base: GemmConfig, kind: Kind, target: Target) -> tuple[GemmConfig, ...]:
    legal = {
        config
        for config in _neighbours(base)
        if objection(config, base, kind, target) is None and _keeps_registers(config, kind)
    }
    others = sorted(legal - {base}, key=lambda config: _distance(config, base))
    by_tma = [config for config in others if config.tma != base.tma][:MOST_BY_TMA]
    others = [config for config in others if config.tma == base.tma]
    return (base, *others[: MOST_CANDIDATES - 1 - len(by_tma)], *by_tma)


def _goes_by_tma(config: GemmConfig, base: GemmConfig, kind: Kind) -> bool:
    """Whether it is operands by TMA that set a configuration apart from the closed form's."""
    by_tma = config.tma is True and config.swap is False and not base.tma
    return by_tma and kind in _CODES_BY_CODES and base.block_m >= FEWEST_BY_TMA


def _neighbours(base: GemmConfig) -> Iterator[GemmConfig]:
    """Tiles of half and twice the size, other warps, pipelines a step flatter or some deeper."""
    few = base.block_m <= FEW_ROWS
    block_m = (base.block_m,) if few else (base.block_m // 2, base.block_m, 2 * base.block_m)
    block_n = (base.block_n // 2, base.block_n, 2 * base.block_n)
    warps = (base.num_warps // 2, base.num_warps, 2 * base.num_warps)
    stages = range(base.num_stages - 1, base.num_stages + 4)
    groups = (base.group_m,) if few else (base.group_m, 2 * base.group_m)
    for m, n, w, s, g in product(block_m, block_n, warps, stages, groups):
        yield replace(base, block_m=m, block_n=n, num_warps=w, num_stages=s, group_m=g)
    by_tma = product({64, base.block_m}, (64, 128, 256), (4, 8), (4, 6))
    for m, n, w, s in by_tma if not base.tma else ():
        tile = replace(base, block_m=m, block_n=n, num_warps=w, num_stages=s)
        yield replace(tile, tma=True, swap=False)


def _launched(config: GemmConfig) -> tuple[GemmConfig, ...]:
    """The configurations that are launched for one: by TMA, for some shapes, tiles of half size."""
    by_halves = config.tma and not is_narrow(config)
    return (config, narrowed(config)) if by_halves else (config,)


def _is_sane(config: GemmConfig) -> bool:
    """Numbers that a compiler takes at all; a file may hold anything."""
    if any(type(getattr(config, name)) is not int for name in FREE_FIELDS):
        return False
    tile = config.block_m >= 1 and config.block_n >= 16
    warps = config.num_warps in (1, 2, 4, 8)
    return tile and warps and 1 <= config.num_stages <= 16 and 1 <= config.group_m <= 64


def _keeps_registers(config: GemmConfig, kind: Kind) -> bool:
    """Whether a thread's sums leave registers for the rest, in the loop and at its end."""
    most = _SUMS_OF_A_THREAD
    halved = kind in _HALF_OF_THEM and not decodes_first(config, kind)
    if halved or config.promote is not None:
        most //= 2
    return config.block_m * config.block_n <= most * 32 * config.num_warps


def _distance(config: GemmConfig, base: GemmConfig) -> tuple[int, ...]:
    """How many fields differ, and how far; equal distances keep one order in every process."""
    values = [(getattr(config, name), getattr(base, name)) for name in FREE_FIELDS]
    steps = [max(a, b) // max(1, min(a, b)) for a, b in values]
    return (sum(a != b for a, b in values), sum(steps), *(a for a, _ in values))
