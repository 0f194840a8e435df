"""Integer, logic and predicate instructions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.machine import EmulationError, Instruction, Machine, Step, Where, builds

ARITHMETIC: dict[str, np.ufunc] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not,
    "neg": np.negative, "abs": np.abs,
}  # fmt: skip
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def elementwise(ufunc: np.ufunc, out: np.ndarray, *values: np.ndarray) -> Step:
    """``out = ufunc(values)`` in the lanes that take part."""
    return lambda where: ufunc(*values, out=out, where=where)


def assign(out: np.ndarray, compute: Callable[[], np.ndarray]) -> Step:
    """``out = compute()`` in the lanes that take part."""
    return lambda where: np.copyto(out, compute(), where=where)


def arithmetic(machine: Machine, instruction: Instruction) -> Step:
    """add, sub, mul, mad, min, max and logic; ``.wide`` and ``.hi`` of products."""
    (kind,), (target, *operands) = instruction.types, instruction.operands
    name = instruction.name
    if kind == "s16x2":
        x, y = (machine.value(operand, "b32") for operand in operands)
        halves = machine.target(target, "b32").view(np.uint16)
        ufunc = ARITHMETIC[name]

        def both(where: Where) -> None:
            result = ufunc(_whole(x, machine).view(np.uint16), _whole(y, machine).view(np.uint16))
            np.copyto(halves.view(np.uint32), result.view(np.uint32), where=where)

        return both
    if name not in ("mul", "mad"):
        out = machine.target(target, kind)
        return elementwise(ARITHMETIC[name], out, *(machine.value(operand, kind) for operand in operands))
    if instruction.has("hi"):
        return high_product(machine, instruction)
    wide = WIDER[kind] if instruction.has("wide") else kind
    out = machine.target(target, wide)
    x, y = (machine.value(operand, kind) for operand in operands[:2])
    if name == "mul":
        return assign(out, lambda: np.multiply(x.astype(out.dtype), y.astype(out.dtype)))
    z = machine.value(operands[2], wide)
    return assign(out, lambda: x.astype(out.dtype) * y.astype(out.dtype) + z)


def high_product(machine: Machine, instruction: Instruction) -> Step:
    """The upper half of a product, through Python's integers."""
    (kind,), (target, *operands) = instruction.types, instruction.operands
    if instruction.name != "mul":
        raise EmulationError("mad.hi is not known")
    out, (x, y) = machine.target(target, kind), (machine.value(operand, kind) for operand in operands)
    return assign(out, lambda: (x.astype(object) * y.astype(object) >> 8 * out.itemsize).astype(out.dtype))


def _whole(x: np.ndarray, machine: Machine) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(x, machine.lanes.shape))


@builds("and", "or", "xor", "not")
def logic(machine: Machine, instruction: Instruction) -> Step:
    """Bits, or predicates."""
    return arithmetic(machine, instruction)


@builds("div", "rem", modifiers="rn full")
def divide(machine: Machine, instruction: Instruction) -> Step:
    """Quotient towards zero, or what remains."""
    from ptx.floats import divide_floats

    kind = instruction.types[0]
    if kind.startswith("f"):
        return divide_floats(machine, instruction)
    out = machine.target(instruction.operands[0], kind)
    x, y = (machine.value(operand, kind) for operand in instruction.operands[1:])

    def quotient(where: Where) -> None:
        if (y == 0).any() and (np.broadcast_to(y == 0, machine.lanes.shape) & where).any():
            raise EmulationError("division by zero")
        whole = np.abs(x) // np.abs(y)  # of unsigned numbers abs does nothing
        result = np.where((x < 0) != (y < 0), np.negative(whole), whole)
        np.copyto(out, result if instruction.name == "div" else x - result * y, where=where)

    return quotient


@builds("shl", "shr")
def shift(machine: Machine, instruction: Instruction) -> Step:
    """A count beyond the width shifts everything out, as it does in NumPy."""
    (kind,), (target, x, count) = instruction.types, instruction.operands
    out, value, by = machine.target(target, kind), machine.value(x, kind), machine.value(count, "u32")
    ufunc = np.left_shift if instruction.name == "shl" else np.right_shift
    return assign(out, lambda: ufunc(value, np.minimum(by, 64).astype(out.dtype)))


@builds("bfe")
def extract_field(machine: Machine, instruction: Instruction) -> Step:
    """``length`` bits from ``position`` on; signed numbers are extended with their last bit."""
    (kind,), (target, x, position, length) = instruction.types, instruction.operands
    out, value = machine.target(target, kind), machine.value(x, kind)
    first, count = (int(machine.value(y, "u32")[0]) & 255 for y in (position, length))
    bits = 8 * out.itemsize
    if {position, length} & machine.program.registers.keys() or first >= bits or count == 0:
        raise EmulationError("only fields at fixed places are known")
    count = min(count, bits - first)
    up, down = (out.dtype.type(n) for n in (bits - first - count, bits - count))
    return assign(out, lambda: value << up >> down)


@builds("bfi")
def insert_field(machine: Machine, instruction: Instruction) -> Step:
    """The lowest ``length`` bits of the first number, from ``position`` on, in place of those of the second."""
    target, x, y, position, length = instruction.operands
    if {position, length} & machine.program.registers.keys():
        raise EmulationError("only fields at fixed places are known")
    out, field, rest = machine.target(target, "b32"), machine.value(x, "b32"), machine.value(y, "b32")
    first, count = (int(machine.value(place, "u32")[0]) & 255 for place in (position, length))
    mask = out.dtype.type(((1 << count) - 1 << first) & 0xFFFFFFFF)
    up = out.dtype.type(first)
    return assign(out, lambda: field << up & mask | rest & ~mask)


@builds("lop3")
def look_up_logic(machine: Machine, instruction: Instruction) -> Step:
    """Any function of three bits: bit ``4 a + 2 b + c`` of the table is its value."""
    target, *operands, table = instruction.operands
    out = machine.target(target, "b32")
    a, b, c = (machine.value(operand, "b32") for operand in operands)
    terms = [i for i in range(8) if int(table, 0) >> i & 1]

    def combine() -> np.ndarray:
        result = np.zeros_like(out)
        for i in terms:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return assign(out, combine)


@builds("prmt")
def permute_bytes(machine: Machine, instruction: Instruction) -> Step:
    """Four of the eight bytes of two registers; bit 3 of a selector spreads the byte's sign instead."""
    target, *operands = instruction.operands
    out = machine.target(target, "b32")
    low, high, selector = (machine.value(operand, "b32") for operand in operands)

    def permute() -> np.ndarray:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        result = np.zeros_like(out)
        for i in range(4):
            pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> (8 * (pick & np.uint32(7))).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
            sign = np.where(byte >= 128, np.uint32(0xFF), np.uint32(0))
            result |= np.where(pick >= 8, sign, byte) << np.uint32(8 * i)
        return result

    return assign(out, permute)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


@builds("setp", modifiers=" ".join([*COMPARISONS, *(f"{name}u" for name in COMPARISONS)]))
def compare(machine: Machine, instruction: Instruction) -> Step:
    """A comparison with NaN is false; with ``u`` at its end (``neu``, ``ltu``) it is true."""
    (kind,), (target, *operands) = instruction.types, instruction.operands
    how = instruction.opcode.split(".")[1]
    out = machine.target(target, "pred")
    x, y = (machine.value(operand, kind) for operand in operands)
    if not kind.startswith("f"):
        return elementwise(COMPARISONS[how], out, x, y)
    ufunc = COMPARISONS[how.removesuffix("u")]
    unordered = how.endswith("u")
    return assign(out, lambda: np.where(np.isnan(x) | np.isnan(y), unordered, ufunc(x, y)))
