"""Read NVIDIA machine code: the main loop, its instructions, and what they must and must not be.

These are regression alarms for what decides whether a kernel can be fast; they are no model of how
fast it is. Register counts and instruction totals are left alone, since they change from one Triton
to the next.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.support.aot import Compiled

MATRIX_OPCODES = (
    "HMMA", "IMMA", "QMMA", "OMMA",  # warp-wide: mma.sync
    "HGMMA", "IGMMA", "QGMMA",  # warpgroup-wide: wgmma (sm_90)
    "UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA",  # tcgen05 (sm_100)
)  # fmt: skip
_LINE = re.compile(r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>[^;/]+?)\s*;")
_ADDRESS = re.compile(r"0x([0-9a-f]+)")
_GLOBAL_LOADS = ("LDG", "LDGSTS")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction, for example ``@!P0 LDG.E.128 R4, [R2]``.

    Attributes:
        address: in bytes from the start of the kernel.
        opcode: with its modifiers, ``LDG.E.128``.
        operands: the rest of the text.
    """

    address: int
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """Bits that a memory instruction moves for each thread."""
        for part in self.opcode.split(".")[1:]:
            if part in ("U8", "S8", "U16", "S16", "64", "128"):
                return int(part.lstrip("US"))
        return 32


def instructions(sass: str) -> list[Instruction]:
    """Every instruction of a disassembly, in order."""
    found = []
    for line in _LINE.finditer(sass):
        words = re.sub(r"^@!?\w+\s+", "", line["text"].strip()).split(maxsplit=1)
        operands = words[1] if len(words) > 1 else ""
        found.append(Instruction(int(line["address"], 16), words[0], operands))
    return found


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops, shortest first: what a branch jumps back over.

    Behind a kernel's last exit are waits that had to be repeated, which jump back to where they
    belong: no loops, though they span what lies between.
    """
    bodies = []
    last = max((i.address for i in code if i.base == "EXIT"), default=code[-1].address)
    for instruction in (i for i in code if i.address <= last):
        target = _ADDRESS.search(instruction.operands) if instruction.base == "BRA" else None
        # A branch to itself follows the end of every kernel.
        if target is not None and int(target[1], 16) < instruction.address:
            span = range(int(target[1], 16), instruction.address + 1)
            bodies.append([i for i in code if i.address in span])
    return sorted(bodies, key=len)


def main_loop(compiled: Compiled, opcodes: Sequence[str] = MATRIX_OPCODES) -> list[Instruction]:
    """The shortest loop that holds one of these instructions, a matrix instruction by default."""
    for body in loops(instructions(compiled.sass)):
        if any(i.base in opcodes for i in body):
            return body
    raise AssertionError(f"{_where(compiled)}: no loop holds any of {', '.join(opcodes)}")


def count(code: Iterable[Instruction]) -> Counter[str]:
    """How often each opcode occurs, without modifiers."""
    return Counter(i.base for i in code)


def assert_matrix_instruction(compiled: Compiled, *opcodes: str) -> None:
    """The main loop multiplies with one of these instructions, and with no other."""
    used = {i.base for i in main_loop(compiled)} & set(MATRIX_OPCODES)
    assert used <= set(opcodes), (
        f"{_where(compiled)}: the main loop multiplies with {sorted(used)}, wanted {opcodes}"
    )


def assert_no_spills(compiled: Compiled) -> None:
    """No register goes to local memory."""
    used = count(instructions(compiled.sass))
    assert not compiled.spills, (
        f"{_where(compiled)}: registers spill (stack {compiled.stack} bytes, {used['STL']} stores, "
        f"{used['LDL']} loads)"
    )


def assert_wide_loads(
    compiled: Compiled, code: Iterable[Instruction] | None = None, at_least: int = 1
) -> None:
    """Operands come by TMA or by 128-bit loads, and all asynchronous copies are 128 bits wide.

    Args:
        compiled: for the message, and for ``code`` when that is None.
        code: where to look, the whole kernel by default.
        at_least: how many wide loads there have to be; plain loads of scales may be narrow.
    """
    code = list(instructions(compiled.sass) if code is None else code)
    loads = [i for i in code if i.base in _GLOBAL_LOADS]
    wide = [i for i in code if i.base == "UTMALDG"] + [i for i in loads if i.bits == 128]
    narrow = [i.opcode for i in loads if i.base == "LDGSTS" and i.bits < 128]
    assert len(wide) >= at_least, (
        f"{_where(compiled)}: {len(wide)} wide loads among {Counter(i.opcode for i in loads)}, "
        f"wanted at least {at_least}"
    )
    assert not narrow, f"{_where(compiled)}: narrow asynchronous copies {Counter(narrow)}"


def assert_no_narrow_loads(compiled: Compiled, bits: int = 128) -> None:
    """Every global load and store of more than one value moves at least this many bits."""
    code = [i for i in instructions(compiled.sass) if i.base in (*_GLOBAL_LOADS, "STG")]
    narrow = Counter(i.opcode for i in code if i.bits < bits)
    assert code, f"{_where(compiled)}: no memory accesses at all"
    assert not narrow, f"{_where(compiled)}: narrow memory accesses {narrow}"


def assert_opcode(compiled: Compiled, pattern: str) -> None:
    """Some instruction's opcode matches the regular expression."""
    opcodes = {i.opcode for i in instructions(compiled.sass)}
    assert any(re.search(pattern, opcode) for opcode in opcodes), (
        f"{_where(compiled)}: no instruction matches {pattern!r} among {sorted(opcodes)}"
    )


def assert_exact_division(compiled: Compiled) -> None:
    """Divisions are IEEE divisions: the PTX holds no approximate one, nor a reciprocal."""
    inexact = re.findall(r"\b(?:div\.full|div\.approx|rcp\.approx)[.\w]*", compiled.ptx)
    assert compiled.ptx, f"{_where(compiled)}: no PTX to look at"
    assert not inexact, f"{_where(compiled)}: {Counter(inexact)} in the PTX"


def assert_fits(compiled: Compiled) -> None:
    """A program's shared memory is within the target's limit."""
    limit = compiled.target.shared_memory
    assert compiled.shared <= limit, (
        f"{_where(compiled)}: {compiled.shared} bytes of shared memory, the limit is {limit}"
    )


def _where(compiled: Compiled) -> str:
    return f"{compiled.name} on {compiled.target.name}"
