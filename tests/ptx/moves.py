"""Instructions that move bits: mov, selp, loads, stores, atomics, asynchronous copies."""

from __future__ import annotations

import dataclasses

import numpy as np

from ptx.integers import assign
from ptx.machine import DTYPES, EmulationError, Instruction, Machine, Step, Where, builds
from ptx.memory import UNSIGNED, Memory


@builds("mov")
def move(machine: Machine, instruction: Instruction) -> Step:
    """One register to another, or several narrow ones to or from a wide one, lowest first."""
    (kind,), (target, source) = instruction.types, instruction.operands
    if isinstance(target, tuple):
        part = f"b{int(kind[1:]) // len(target)}"
        outs, value = [machine.target(name, part) for name in target], machine.value(source, kind)

        def unpack(where: Where) -> None:
            parts = np.ascontiguousarray(np.broadcast_to(value, machine.lanes.shape)).view(DTYPES[part])
            for i, out in enumerate(outs):
                np.copyto(out, parts[i :: len(outs)], where=where)

        return unpack
    out = machine.target(target, kind)
    if isinstance(source, tuple):
        part = f"b{int(kind[1:]) // len(source)}"
        values = [machine.value(name, part) for name in source]
        both = [np.broadcast_to(value, machine.lanes.shape) for value in values]
        return assign(out, lambda: np.stack(both, 1).view(DTYPES[kind])[:, 0])
    value = machine.value(source, kind)
    return lambda where: np.copyto(out, value, where=where)


@builds("selp")
def select(machine: Machine, instruction: Instruction) -> Step:
    """The first where the predicate holds, else the second."""
    (kind,), (target, x, y, condition) = instruction.types, instruction.operands
    out = machine.target(target, kind)
    first, second, holds = machine.value(x, kind), machine.value(y, kind), machine.register(condition)
    return assign(out, lambda: np.where(holds, first, second))


def space_of(machine: Machine, instruction: Instruction) -> tuple[Memory, bool]:
    """The memory that an instruction names, and whether it is the shared one."""
    if instruction.has("shared", "shared::cta"):
        return machine.shared, True
    if instruction.has("global"):
        return machine.memory, False
    raise EmulationError("only global and shared memory are known")


@builds("ld", modifiers="global shared shared::cta param v2 v4")
def load(machine: Machine, instruction: Instruction) -> Step:
    """One number or a vector; what is narrower than its register is extended."""
    (kind,), (target, address) = instruction.types, instruction.operands
    names = target if isinstance(target, tuple) else (target,)
    width = int(kind[1:]) // 8
    outs = [machine.register(name) for name in names]
    if instruction.has("param"):
        return load_param(machine, outs[0], address, kind)
    memory, is_shared = space_of(machine, instruction)
    where_to = machine.addresses(address, is_shared=is_shared)

    def fetch(where: Where) -> None:
        lanes = machine.active(where)
        for out, value in zip(outs, memory.load(lanes, where_to()[lanes], width, len(outs)), strict=True):
            out[lanes] = value.view(DTYPES[kind])

    return fetch


def load_param(machine: Machine, out: np.ndarray, address: str, kind: str) -> Step:
    """A kernel's parameter."""
    number = machine.params[address.strip("[] ")]
    if isinstance(number, float):
        value = np.array([number], np.float32).view(np.uint32)
    else:
        dtype = np.dtype(DTYPES[kind])
        value = np.array([number % (1 << 8 * dtype.itemsize)], f"u{dtype.itemsize}").view(dtype)
    return assign(out, lambda: value.astype(out.dtype))


@builds("st", modifiers="global shared shared::cta v2 v4")
def store(machine: Machine, instruction: Instruction) -> Step:
    """One number or a vector."""
    (kind,), (address, source) = instruction.types, instruction.operands
    names = source if isinstance(source, tuple) else (source,)
    dtype = UNSIGNED[int(kind[1:]) // 8]
    values = (
        [np.broadcast_to(machine.value(name, f"b{kind[1:]}"), machine.lanes.shape) for name in names]
        if (dtype != np.uint8)
        else [machine.register(name) for name in names]
    )
    memory, is_shared = space_of(machine, instruction)
    where_to = machine.addresses(address, is_shared=is_shared)

    def put(where: Where) -> None:
        lanes = machine.active(where)
        memory.store(lanes, where_to()[lanes], [value[lanes].astype(dtype) for value in values])

    return put


@builds("atom", modifiers="global gpu acq_rel relaxed add")
def atomic(machine: Machine, instruction: Instruction) -> Step:
    """An atomic addition, lane by lane."""
    if not instruction.has("add") or not instruction.has("global") or instruction.types[-1] not in ("u64", "u32"):
        raise EmulationError("only integer additions to global memory are known")
    width = int(instruction.types[-1][1:]) // 8
    target, address, operand = instruction.operands
    out, value = (
        machine.register(target),
        np.broadcast_to(machine.value(operand, instruction.types[-1]), machine.lanes.shape),
    )
    where_to = machine.addresses(address)

    def add(where: Where) -> None:
        lanes = machine.active(where)
        addresses = where_to()
        for lane in lanes:
            one = slice(lane, lane + 1)
            (old,) = machine.memory.load(machine.lanes[one], addresses[one], width)
            machine.memory.store(machine.lanes[one], addresses[one], [old + value[one]])
            out[one] = old

    return add


@dataclasses.dataclass
class Copy:
    """Asynchronous copies of some lanes, and the group of each."""

    lanes: np.ndarray
    to: np.ndarray
    source: np.ndarray
    size: int
    read: np.ndarray
    group: np.ndarray


@builds("cp", modifiers="async ca cg shared global commit_group wait_group")
def copy_asynchronously(machine: Machine, instruction: Instruction) -> Step:
    """cp.async, commit_group and wait_group."""
    if instruction.has("commit_group"):
        return lambda where: machine.copy_group.__setitem__(
            machine.active(where), machine.copy_group[machine.active(where)] + 1
        )
    if instruction.has("wait_group"):
        still = int(instruction.operands[0])
        return lambda where: finish_copies(machine, machine.active(where), still)
    if not instruction.has("async") or instruction.has("bulk"):
        raise EmulationError("only cp.async is known")
    to, source, size, *read = instruction.operands
    to_where, from_where = machine.addresses(to, is_shared=True), machine.addresses(source)
    count = int(size, 0)
    wanted = np.broadcast_to(machine.value(read[0] if read else size, "u32"), machine.lanes.shape)

    def issue(where: Where) -> None:
        lanes = machine.active(where)
        copy = Copy(lanes, to_where()[lanes], from_where()[lanes], count, wanted[lanes], machine.copy_group[lanes])
        if machine.late_copies:
            machine.copies.append(copy)
        else:
            perform(machine, copy, np.ones(len(lanes), bool))

    return issue


def finish_copies(machine: Machine, lanes: np.ndarray, still: int) -> None:
    """Performs all copies of these lanes but those of their latest ``still`` groups."""
    waiting = np.zeros(len(machine.lanes), bool)
    waiting[lanes] = True
    remaining = []
    for copy in machine.copies:
        due = waiting[copy.lanes] & (copy.group < machine.copy_group[copy.lanes] - still)
        perform(machine, copy, due)
        if not due.all():
            remaining.append(Copy(*(x if isinstance(x, int) else x[~due] for x in dataclasses.astuple(copy))))
    machine.copies = remaining


def perform(machine: Machine, copy: Copy, due: np.ndarray) -> None:
    """Copies what is due; bytes beyond those to be read become 0."""
    if not np.isin(copy.read, (0, copy.size)).all():
        raise EmulationError("a copy reads all or nothing here")
    reading = due & (copy.read > 0)
    words = [np.zeros(len(due), np.uint32) for _ in range(copy.size // 4)]
    fetched = machine.memory.load(copy.lanes[reading], copy.source[reading], 4, len(words))
    for word, value in zip(words, fetched, strict=True):
        word[reading] = value
    machine.shared.store(copy.lanes[due], copy.to[due], [word[due] for word in words])
