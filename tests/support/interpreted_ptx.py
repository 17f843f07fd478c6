"""Inline PTX for the interpreter: the few instructions that kernels use, one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch

from tests.support.interpreted_dots import model_of

Registers = dict[str, np.ndarray]


def emulate(assembly: str, outputs: int) -> Callable[..., tuple[np.ndarray, ...]]:
    """What a block of PTX computes, on words of 32 bits: $0 and so on are outputs, then inputs.

    Args:
        assembly: instructions that :data:`_WORD_OPERATIONS` lists, unpacking moves, conversions
            from fp16 to fp32 and from two E4M3 codes to fp16; anything else is refused.
        outputs: how many there are.
    """
    lines = [line.strip(" {}\n") for line in assembly.strip(" {}\n").split(";")]
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith(".reg")]

    def run(*inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        registers: Registers = {
            f"${outputs + i}": np.asarray(value).view(np.uint32) for i, value in enumerate(inputs)
        }
        for operation, operands in steps:
            _step(operation, operands, registers)
        return tuple(registers[f"${i}"] for i in range(outputs))

    return run


def _step(operation: str, operands: str, registers: Registers) -> None:
    names = [name for name in re.split(r"[\s,{}]+", operands) if name]
    if operation == "mov.b32" and len(names) == 3:
        word = registers[names[2]]
        registers[names[0]] = (word & np.uint32(0xFFFF)).astype(np.uint16)
        registers[names[1]] = (word >> np.uint32(16)).astype(np.uint16)
    elif operation == "cvt.f32.f16":
        registers[names[0]] = registers[names[1]].view(np.float16).astype(np.float32)
    elif operation == "cvt.rn.f16x2.e4m3x2":
        registers[names[0]] = _pair(*(_e4m3(registers[names[1]], s) for s in (0, 8)), torch.float16)
    elif operation in _WORD_OPERATIONS:
        values = [registers[n] if n in registers else np.uint32(int(n, 0)) for n in names[1:]]
        registers[names[0]] = _WORD_OPERATIONS[operation](*values)
    else:
        raise NotImplementedError(f"no model of the PTX instruction {operation}")


def _pair(low: np.ndarray, high: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Words of two numbers of 16 bits, each rounded once from fp32."""
    rounded = [torch.from_numpy(np.ascontiguousarray(v)).to(dtype) for v in (low, high)]
    bits = [v.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for v in rounded]
    return bits[0] | bits[1] << np.uint32(16)


def _e4m3(pairs: np.ndarray, shift: int) -> np.ndarray:
    """The code at a bit of each word of 16 bits, in fp32."""
    codes = (pairs >> np.uint16(shift) & np.uint16(0xFF)).astype(np.uint8)
    return torch.from_numpy(np.atleast_1d(codes)).view(torch.float8_e4m3fn).float().numpy()


def _fma_of_pairs(dtype: torch.dtype) -> Callable[..., np.ndarray]:
    """A * b + c of the numbers in words; a product of two of them is exact in fp64."""

    def fma(*words: np.ndarray) -> np.ndarray:
        halves = []
        for shift in (0, 16):
            bits = [(w >> np.uint32(shift) & np.uint32(0xFFFF)).astype(np.uint16) for w in words]
            a, b, c = (_from_bits(v, dtype) for v in bits)
            halves.append((a * b + c).astype(np.float32))
        return _pair(*halves, dtype)

    return fma


def _from_bits(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Numbers of 16 bits in fp64."""
    return torch.from_numpy(np.atleast_1d(bits).view(np.int16)).view(dtype).double().numpy()


def _pair_of(dtype: torch.dtype) -> Callable[..., np.ndarray]:
    """What cvt makes of two fp32 numbers: the first one is the high half."""

    def convert(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return _pair(low.view(np.float32), high.view(np.float32), dtype)

    return convert


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.uint32) -> np.ndarray:
    """Bit 4 a + 2 b + c of the table, for each bit of the operands."""
    result = np.zeros_like(a)
    for entry in range(8):
        if int(table) >> entry & 1:
            terms = (v if entry >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0)))
            first, second, third = terms
            result |= first & second & third
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.uint32) -> np.ndarray:
    """Bytes 0 to 3 are those of a, 4 to 7 those of b; the selector has one digit for each."""
    result = np.zeros_like(a)
    for place in range(4):
        digit = int(selector) >> 4 * place & 15
        if digit > 7:
            raise NotImplementedError("prmt that copies signs is not modelled")
        source = (a, b)[digit // 4]
        byte = (source >> np.uint32(8 * (digit % 4))) & np.uint32(0xFF)
        result |= byte << np.uint32(8 * place)
    return result


_WORD_OPERATIONS: Mapping[str, Callable[..., np.ndarray]] = MappingProxyType(
    {
        "mov.b32": lambda a: a,
        "mul.lo.u32": lambda a, b: a * b,
        "fma.rn.bf16x2": _fma_of_pairs(torch.bfloat16),
        "fma.rn.f16x2": _fma_of_pairs(torch.float16),
        "cvt.rn.bf16x2.f32": _pair_of(torch.bfloat16),
        "cvt.rn.f16x2.f32": _pair_of(torch.float16),
        "and.b32": lambda a, b: a & b,
        "shl.b32": lambda a, b: a << b,
        "shr.u32": lambda a, b: a >> b,
        "lop3.b32": _lop3,
        "prmt.b32": _prmt,
    }
)


def register_kernels() -> None:
    """Models of the assembly in mokernels' kernels."""
    from mokernels.ops.kernels.gemv import DECODE_WORD
    from mokernels.ops.kernels.gemv_e4m3 import DECODE_FOUR
    from mokernels.ops.kernels.words import BF16_PAIRS, BF16_TWICE, FP16_PAIRS, FP16_TWICE

    for block, outputs in (
        (DECODE_WORD, 8),
        (DECODE_FOUR, 4),
        (BF16_PAIRS, 4),
        (FP16_PAIRS, 4),
        (BF16_TWICE, 1),
        (FP16_TWICE, 1),
    ):
        model_of(block.value)(emulate(block.value, outputs))
