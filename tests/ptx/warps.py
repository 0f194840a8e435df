"""Instructions that a warp carries out together: shuffles, matrix loads, stores and products."""

from __future__ import annotations

import numpy as np

from ptx.floats import from_bf16
from ptx.machine import WARP, EmulationError, Instruction, Machine, Step, Where, builds

BITS_KEPT = 24
"""Of a matrix product's terms, below the leading bit of the largest one, where products are truncated."""


def whole_warps(machine: Machine, where: Where) -> np.ndarray:
    """Numbers of the warps that take part.

    Raises:
        EmulationError: A warp does so in part.
    """
    if where is True:
        return np.arange(len(machine.lanes) // WARP)
    parts = np.asarray(where).reshape(-1, WARP)
    if (parts.any(1) != parts.all(1)).any():
        raise EmulationError("only some threads of a warp are here")
    return np.flatnonzero(parts.any(1))


@builds("bar", "barrier", modifiers="warp sync")
def warp_barrier(machine: Machine, instruction: Instruction) -> Step:
    """bar.warp.sync; barriers of all threads end a block and are dealt with there."""
    return lambda where: machine.clock.pass_warp(machine.active(where))


@builds("shfl", modifiers="sync bfly idx up down")
def shuffle(machine: Machine, instruction: Instruction) -> Step:
    """A register of another lane of the warp; of the own lane where that one lies outside the segment."""
    target, source, by, bounds, members = instruction.operands
    if machine.value(members, "b32").tolist() != [0xFFFFFFFF]:
        raise EmulationError("only shuffles of whole warps are known")
    out, value = machine.target(target, "b32"), machine.value(source, "b32")
    offset, bound = machine.value(by, "u32").astype(np.int64) & 31, machine.value(bounds, "u32").astype(np.int64)
    dynamic = by in machine.program.registers
    lane = machine.lanes % WARP
    segment = (bound >> 8) & 31
    last = (lane & segment) | (bound & 31 & ~segment)
    first = lane & segment
    mode = next(name for name in ("bfly", "idx", "up", "down") if instruction.has(name))

    def origins() -> np.ndarray:
        moved = machine.value(by, "u32").astype(np.int64) & 31 if dynamic else offset
        other = {"bfly": lane ^ moved, "idx": first | (moved & ~segment), "up": lane - moved, "down": lane + moved}[
            mode
        ]
        inside = other >= last if mode == "up" else other <= last
        return machine.lanes - lane + np.where(inside, other, lane)

    fixed = None if dynamic else origins()

    def exchange(where: Where) -> None:
        whole_warps(machine, where)
        np.copyto(out, value[origins() if fixed is None else fixed], where=where)

    return exchange


def matrix_rows(
    machine: Machine, addresses: np.ndarray, warps: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lanes [W, count * 8] that give the addresses of the matrices' rows, and those addresses."""
    lanes = (warps[:, None] * WARP + np.arange(count * 8)).reshape(-1)
    return lanes, addresses[lanes]


@builds("ldmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared")
def load_matrices(machine: Machine, instruction: Instruction) -> Step:
    """8 x 8 matrices of 16-bit numbers: lane ``4 r + c`` gets columns 2 c and 2 c + 1 of row r."""
    targets, address = instruction.operands
    outs, where_to = [machine.target(name, "b32") for name in targets], machine.addresses(address, is_shared=True)

    def fetch(where: Where) -> None:
        warps = whole_warps(machine, where)
        lanes, addresses = matrix_rows(machine, where_to(), warps, len(outs))
        rows = np.stack(machine.shared.load(lanes, addresses, 4, 4), 1)
        matrices = rows.view(np.uint16).reshape(len(warps), len(outs), 8, 8)
        if instruction.has("trans"):
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        words = matrices.view(np.uint32).reshape(len(warps), len(outs), WARP)
        for i, out in enumerate(outs):
            out.reshape(-1, WARP)[warps] = words[:, i]

    return fetch


@builds("stmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared")
def store_matrices(machine: Machine, instruction: Instruction) -> Step:
    """The inverse of ldmatrix."""
    address, sources = instruction.operands
    values, where_to = [machine.value(name, "b32") for name in sources], machine.addresses(address, is_shared=True)

    def put(where: Where) -> None:
        warps = whole_warps(machine, where)
        lanes, addresses = matrix_rows(machine, where_to(), warps, len(values))
        words = np.stack([value.reshape(-1, WARP)[warps] for value in values], 1)
        matrices = words.view(np.uint16).reshape(len(warps), len(values), 8, 8)
        if instruction.has("trans"):
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        rows = matrices.view(np.uint32).reshape(-1, 4)
        machine.shared.store(lanes, addresses, list(rows.T))

    return put


@builds("mma", modifiers="sync aligned m16n8k16 row col")
def multiply_matrices(machine: Machine, instruction: Instruction) -> Step:
    """``D [16, 8] = A [16, 16] B [16, 8] + C`` of float16 or bfloat16 numbers, in float32.

    Lane ``4 g + t`` holds, in pairs of columns ``2 t, 2 t + 1``: of A rows g and g + 8, then the same of columns 8
    on; of B (columns being rows there) column g; of C and D rows g and g + 8.
    """
    kind = instruction.types[1]
    if instruction.opcode != f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" or kind not in ("f16", "bf16"):
        raise EmulationError("only m16n8k16 of 16-bit floats into float32 is known")
    out_names, a_names, b_names, c_names = instruction.operands
    outs = [machine.target(name, "f32") for name in out_names]
    a, b = ([machine.value(name, "b32") for name in names] for names in (a_names, b_names))
    c = [np.broadcast_to(machine.value(name, "f32"), machine.lanes.shape) for name in c_names]

    def numbers(registers: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
        """[register, W, g, t, 2] in float64."""
        words = np.stack([register.reshape(-1, 8, 4, 1)[warps] for register in registers])
        halves = words.view(np.uint16)
        return (halves.view(np.float16) if kind == "f16" else from_bf16(halves)).astype(np.float64)

    def multiply(where: Where) -> None:
        warps = whole_warps(machine, where)
        left = numbers(a, warps).reshape(2, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)
        right = numbers(b, warps).transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)
        start = np.stack([x.reshape(-1, 8, 4)[warps] for x in c], -1).reshape(-1, 8, 4, 2, 2)
        start = start.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)
        result = (truncated_product if machine.truncating else rounded_product)(left, right, start)
        result = result.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1, WARP)
        for i, out in enumerate(outs):
            out.reshape(-1, WARP)[warps] = result[i]

    return multiply


def rounded_product(left: np.ndarray, right: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Almost exact, rounded once."""
    return (left @ right + start).astype(np.float32)


def truncated_product(left: np.ndarray, right: np.ndarray, start: np.ndarray) -> np.ndarray:
    """All terms aligned to the largest, cut off, summed exactly, and cut off to float32."""
    terms = left[:, :, :, None] * right[:, None, :, :]
    terms = np.concatenate([terms, start[:, :, None, :].astype(np.float64)], 2)
    largest = np.abs(terms).max(2, keepdims=True)
    _, exponent = np.frexp(np.where(np.isfinite(largest), largest, 1))
    unit = np.ldexp(1.0, exponent - BITS_KEPT)
    total = (np.trunc(terms / unit) * unit).sum(2)
    rounded = total.astype(np.float32)
    too_large = np.abs(rounded.astype(np.float64)) > np.abs(total)
    return np.where(too_large & np.isfinite(total), np.nextafter(rounded, np.float32(0)), rounded)
