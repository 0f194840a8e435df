"""Floating point instructions: float32 with one rounding each, and conversions."""

from __future__ import annotations

import numpy as np

from ptx.integers import arithmetic, assign, elementwise
from ptx.machine import DTYPES, EmulationError, Instruction, Machine, Step, builds

UFUNCS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
APPROXIMATION_ULPS = 2
"""Of ``ex2.approx`` and ``div.full``, by their documentation."""


@builds("add", "sub", "mul", "mad", modifiers="rn lo hi wide")
@builds("min", "max", modifiers="xorsign abs")
@builds("neg", "abs")
def arithmetic_of_any_type(machine: Machine, instruction: Instruction) -> Step:
    """The float forms of these instructions; integers are dealt with elsewhere."""
    kind, name = instruction.types[-1], instruction.name
    if not kind.startswith(("f", "bf")):
        return arithmetic(machine, instruction)
    target, *operands = instruction.operands
    if name in ("neg", "abs"):
        return change_sign(machine, instruction)
    if kind == "f16x2" and name in UFUNCS:
        pairs = [machine.value(operand, "b32") for operand in operands]
        return assign(machine.target(target, "b32"), lambda: of_halves(UFUNCS[name], *pairs))
    if kind != "f32":
        raise EmulationError("only float32 and add, sub and mul of float16 pairs are known")
    out, (x, y) = machine.target(target, kind), (machine.value(operand, kind) for operand in operands)
    if name in UFUNCS:
        return elementwise(UFUNCS[name], out, x, y)
    if instruction.has("xorsign"):
        return assign(out, lambda: with_product_sign(extremum(name, np.abs(x), np.abs(y)), x, y))
    return assign(out, lambda: extremum(name, x, y))


def of_halves(operation: np.ufunc, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """An operation on the two float16 numbers of 32-bit registers, each rounded to nearest."""
    halves = []
    for shift in (np.uint32(0), np.uint32(16)):
        numbers = [(bits >> shift).astype(np.uint16).view(np.float16).astype(np.float32) for bits in (x, y)]
        halves.append(to_f16(operation(*numbers)).astype(np.uint32) << shift)
    return halves[0] | halves[1]


def extremum(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """min or max: of a number and NaN the number, and -0 is less than 0."""
    result = (np.fmin if name == "min" else np.fmax)(x, y)
    both = np.bitwise_or if name == "min" else np.bitwise_and
    return np.where((x == 0) & (y == 0), both(x.view(np.uint32), y.view(np.uint32)).view(np.float32), result)


def with_product_sign(magnitude: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A magnitude with the sign that ``x * y`` has."""
    return np.where(np.signbit(x) != np.signbit(y), -magnitude, magnitude)


def change_sign(machine: Machine, instruction: Instruction) -> Step:
    """neg and abs turn sign bits, of NaN as well."""
    kind = instruction.types[-1]
    unsigned = {"f16": "b16", "bf16": "b16", "f32": "b32", "f64": "b64"}.get(kind, "b32")
    signs = {"b16": 0x8000, "b32": 0x80000000, "b64": 1 << 63}[unsigned] if not kind.endswith("x2") else 0x80008000
    target, source = instruction.operands
    out, x = machine.target(target, unsigned), machine.value(source, unsigned)
    if instruction.name == "neg":
        return elementwise(np.bitwise_xor, out, x, out.dtype.type(signs))
    return elementwise(np.bitwise_and, out, x, out.dtype.type(~signs % (1 << 8 * out.itemsize)))


@builds("fma", modifiers="rn")
def fused_multiply_add(machine: Machine, instruction: Instruction) -> Step:
    """``x * y + z`` with one rounding."""
    if instruction.opcode != "fma.rn.f32":
        raise EmulationError("only fma.rn.f32 is known")
    target, *operands = instruction.operands
    out, values = machine.target(target, "f32"), [machine.value(operand, "f32") for operand in operands]
    return assign(out, lambda: fma(*values))


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """float32 ``x * y + z`` rounded once: the product is exact in float64, and the sum is rounded to odd there."""
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    # To odd: where something was lost and the last bit is even, one step towards what was lost.
    inexact = (error != 0) & np.isfinite(total) & (total.view(np.int64) & 1 == 0)
    stepped = total.view(np.int64) + np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, stepped.view(np.float64), total).astype(np.float32)


def divide_floats(machine: Machine, instruction: Instruction) -> Step:
    """div.rn rounds correctly, div.full may be off by two units in the last place."""
    target, *operands = instruction.operands
    out, (x, y) = machine.target(target, "f32"), (machine.value(operand, "f32") for operand in operands)
    if instruction.opcode == "div.rn.f32":
        return elementwise(np.divide, out, x, y)
    if instruction.opcode != "div.full.f32":
        raise EmulationError("only div.rn.f32 and div.full.f32 are known")
    return assign(out, lambda: roughly(machine, x / y))


def roughly(machine: Machine, x: np.ndarray) -> np.ndarray:
    """A finite result, off by what an approximating instruction may be off; the same for the same number."""
    if not machine.rough:
        return x
    ulps = (x.view(np.uint32) * np.uint32(2654435761) >> np.uint32(16)) % np.uint32(2 * APPROXIMATION_ULPS + 1)
    moved = (x.view(np.int32) + ulps.astype(np.int32) - APPROXIMATION_ULPS).view(np.float32)
    return np.where(np.isfinite(x) & np.isfinite(moved) & (np.abs(x) > 2 * np.finfo(np.float32).tiny), moved, x)


@builds("sqrt", modifiers="rn")
def square_root(machine: Machine, instruction: Instruction) -> Step:
    """sqrt.rn."""
    if instruction.opcode != "sqrt.rn.f32":
        raise EmulationError("only sqrt.rn.f32 is known")
    target, x = instruction.operands
    return elementwise(np.sqrt, machine.target(target, "f32"), machine.value(x, "f32"))


@builds("ex2", modifiers="approx ftz")
def power_of_two(machine: Machine, instruction: Instruction) -> Step:
    """ex2.approx.ftz: subnormal numbers are 0, going in and coming out."""
    if instruction.opcode != "ex2.approx.ftz.f32":
        raise EmulationError("only ex2.approx.ftz.f32 is known")
    target, x = instruction.operands
    value = machine.value(x, "f32")

    def power() -> np.ndarray:
        result = roughly(machine, np.exp2(flush(value).astype(np.float64)).astype(np.float32))
        return flush(result)

    return assign(machine.target(target, "f32"), power)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers to zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, half to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of float16, half to even."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


NARROW = {"f16": to_f16, "bf16": to_bf16}


@builds("cvt", modifiers="rn")
def convert(machine: Machine, instruction: Instruction) -> Step:
    """Between integers (cut off or extended), and to and from float32."""
    to, source = instruction.types
    target, *operands = instruction.operands
    values = [machine.value(operand, source) for operand in operands]
    if to.endswith("x2") and source == "f32":
        narrow, out = NARROW[to.removesuffix("x2")], machine.target(target, "b32")
        high, low = values
        return assign(out, lambda: narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low))
    if to in NARROW and source == "f32":
        return assign(machine.target(target, "b16"), lambda: NARROW[to](values[0]))
    if source == "bf16" and to == "f32":
        return assign(machine.target(target, "f32"), lambda: from_bf16(values[0]))
    if "bf16" in instruction.opcode or "x2" in instruction.opcode:
        raise EmulationError("conversion not known")
    out = machine.target(target, to)
    return assign(out, lambda: values[0].astype(DTYPES[to]))
