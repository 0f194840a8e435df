"""Runs a program: registers of all threads as arrays, masks where threads part, barriers, and a count of what ran."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ptx.memory import UNSIGNED, GlobalMemory, MemoryAccessError, SharedMemory
from ptx.parser import BARRIERS, Instruction, Program
from ptx.races import Clock, RaceError

WARP = 32

Where: TypeAlias = np.ndarray | bool
"""Which lanes take part: a bool array, or ``True`` for all of them, which NumPy is quicker with."""

Step: TypeAlias = Callable[[Where], None]
"""One instruction with its operands looked up."""

Builder: TypeAlias = Callable[["Machine", Instruction], Step]

BUILDERS: dict[str, Builder] = {}
"""First part of an opcode -> what makes a step of such an instruction."""

DTYPES: dict[str, Any] = {
    **{f"u{8 * width}": dtype for width, dtype in UNSIGNED.items()},
    **{f"b{8 * width}": dtype for width, dtype in UNSIGNED.items()},
    **{f"s{8 * width}": np.dtype(f"i{width}").type for width in UNSIGNED},
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
    "f16x2": np.uint32, "bf16x2": np.uint32, "bf16": np.uint16,
}  # fmt: skip


class EmulationError(Exception):
    """What went wrong, with the instruction and its line in the kernel's source."""


MODIFIERS: dict[str, frozenset[str]] = {}
"""First part of an opcode -> which others its builder knows, types aside. Any other one is refused."""


def builds(*names: str, modifiers: str = "") -> Callable[[Builder], Builder]:
    """Makes a function the builder of the instructions of these names, with these modifiers (separated by blanks)."""

    def note(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        MODIFIERS.update(dict.fromkeys(names, frozenset(modifiers.split())))
        return builder

    return note


class Machine:
    """Some programs (CTAs) of a grid side by side.

    Args:
        program: What they run.
        params: Values of its parameters.
        ctas: int [C, 3], their places in the grid.
        grid: The grid's size.
        memory: Global memory, which they share.
        shared_bytes: Of each program.
        late_copies: An asynchronous copy happens when it is waited for; otherwise when it is issued.
        rough: Instructions that are allowed an error make it; otherwise they round correctly.
        truncating: Matrix products align their terms to the largest and cut off what is below its 24th bit, as
            tensor cores do; otherwise they are rounded once.
        races: Threads of a program that touch a byte without a barrier in between are an error. In global memory that
            is checked of a program that runs alone, where all threads are of one program.
    """

    def __init__(
        self,
        program: Program,
        params: Sequence[int | float],
        ctas: np.ndarray,
        grid: tuple[int, int, int],
        memory: GlobalMemory,
        shared_bytes: int,
        *,
        late_copies: bool = False,
        rough: bool = False,
        truncating: bool = False,
        races: bool = False,
    ) -> None:
        self.program, self.threads = program, program.threads
        self.params = dict(zip((name for name, _ in program.params), params, strict=True))
        self.lanes = np.arange(len(ctas) * self.threads)
        self.memory, self.shared = memory, SharedMemory(shared_bytes, len(ctas), self.threads)
        self.late_copies, self.rough, self.truncating = late_copies, rough, truncating
        self.copies: list[Any] = []  # asynchronous copies under way, see the copies module
        self.copy_group = np.zeros(len(self.lanes), np.int64)
        self.clock = Clock(len(self.lanes))
        if races:
            self.shared.watch(self.threads, self.clock)
        if races and len(ctas) == 1:
            memory.watch(self.threads, self.clock)
        self.executed: collections.Counter[str] = collections.Counter()
        self._registers: dict[str, np.ndarray] = {}
        self._specials = {"%tid.x": self.lanes % self.threads, "%ntid.x": self.threads, "%laneid": self.lanes % WARP}
        for axis, name in enumerate("xyz"):
            self._specials[f"%ctaid.{name}"] = ctas[self.lanes // self.threads, axis]
            self._specials[f"%nctaid.{name}"] = grid[axis]
        self._block = np.zeros(len(self.lanes), np.int64)
        self._is_done, self._is_waiting = np.zeros((2, len(self.lanes)), bool)

    # What builders need.

    def register(self, name: str) -> np.ndarray:
        """The register's bits in all lanes, unsigned; bool of a predicate."""
        if name not in self._registers:
            kind = self.program.registers[name]
            self._registers[name] = np.zeros(len(self.lanes), DTYPES[kind])
        return self._registers[name]

    def target(self, name: str, kind: str) -> np.ndarray:
        """A register to write, seen as this type; ``_`` is a register that nobody reads."""
        if name == "_":
            return np.zeros(len(self.lanes), DTYPES[kind])
        register = self.register(name)
        if register.dtype.itemsize != np.dtype(DTYPES[kind]).itemsize:
            raise EmulationError(f"register {name} does not hold a .{kind}")
        return register.view(DTYPES[kind])

    def value(self, operand: str, kind: str) -> np.ndarray:
        """An operand seen as this type: a register of all lanes, or a number as an array [1]."""
        dtype = np.dtype(DTYPES[kind])
        if operand in self.program.registers:
            register = self.register(operand)
            if register.dtype.itemsize < dtype.itemsize:
                raise EmulationError(f"register {operand} does not hold a .{kind}")
            return register.view(dtype)[:: register.dtype.itemsize // dtype.itemsize]  # the low bits
        if operand in self._specials:
            return np.broadcast_to(np.asarray(self._specials[operand], dtype), self.lanes.shape)
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            return np.array([int(found[1] or found[2], 16)], np.uint32 if found[1] else np.uint64).view(dtype)
        if operand == "global_smem":
            return np.array([SharedMemory.BASE], dtype)
        number = int(operand.rstrip("U"), 0)
        if dtype == np.bool_:
            return np.array([number != 0])
        return np.array([number & (1 << 8 * dtype.itemsize) - 1], f"u{dtype.itemsize}").view(dtype)

    def addresses(self, operand: str, *, is_shared: bool = False) -> Callable[[], np.ndarray]:
        """``[register + offset]`` as a function that computes uint64 addresses of all lanes."""
        base, offset = re.fullmatch(r"\[\s*([^\s+]+?)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        start, step = self.value(base, "b32" if is_shared else "b64"), np.uint64(int(offset or "0", 0) % 2**64)
        return lambda: np.broadcast_to(start.astype(np.uint64) + step, self.lanes.shape)

    def active(self, where: Where) -> np.ndarray:
        """Numbers of the lanes that take part."""
        return self.lanes if where is True else np.flatnonzero(where)

    # Running.

    def run(self) -> None:
        """Runs all lanes to their end: always those that are furthest behind, so that they meet again.

        Raises:
            EmulationError: A fault, a deadlock, or an instruction that is not known.
        """
        with np.errstate(all="ignore"):
            while not self._is_done.all():
                ready = ~(self._is_done | self._is_waiting)
                if not ready.any():
                    self._pass_barrier()
                    continue
                block = int(self._block[ready].min())
                self._run_block(block, ready & (self._block == block))

    def _pass_barrier(self) -> None:
        """Lets the lanes go on whose whole CTA waits; no lane is ready, so that is all of them or a deadlock."""
        waiting_at = self._block[self._is_waiting]
        for cta in np.unique(self.lanes[self._is_waiting] // self.threads):
            here = (self.lanes // self.threads == cta) & self._is_waiting
            if len(np.unique(self._block[here])) > 1:
                raise EmulationError(f"threads of program {cta} wait at different barriers, before {waiting_at}")
        self.clock.pass_program(np.flatnonzero(self._is_waiting))
        self._is_waiting[:] = False

    def _run_block(self, number: int, mask: np.ndarray) -> None:
        instructions, steps = self.program.blocks[number], self._steps(number)
        where: Where = True if mask.all() else mask
        warps = int(mask.reshape(-1, WARP).any(1).sum())
        self._block[mask] = number + 1
        for instruction, step in zip(instructions, steps, strict=True):
            try:
                step(where)
            except (MemoryAccessError, RaceError, EmulationError) as error:
                raise EmulationError(f"{self.program.name}: {error}\n  in {instruction}") from error
            self.executed[instruction.opcode] += warps

    @functools.cache  # noqa: B019, a machine lives for one launch
    def _steps(self, number: int) -> list[Step]:
        return [self._build(instruction) for instruction in self.program.blocks[number]]

    def _build(self, instruction: Instruction) -> Step:
        try:
            unknown = instruction.modifiers - MODIFIERS.get(instruction.name, instruction.modifiers)
            if unknown:
                raise EmulationError(f"modifiers not known: {sorted(unknown)}")
            step = self._flow(instruction) or BUILDERS[instruction.name](self, instruction)
        except (KeyError, ValueError, AttributeError, EmulationError) as error:
            raise EmulationError(f"{self.program.name}: cannot do {instruction}: {error!r}") from error
        if not instruction.guard:
            return step
        guard, wanted = self.register(instruction.guard.lstrip("!")), not instruction.guard.startswith("!")

        def guarded(where: Where) -> None:
            step((guard == wanted) & where)

        return guarded

    def _flow(self, instruction: Instruction) -> Step | None:
        """Steps that decide what runs next."""
        if instruction.name == "bra":
            target = self.program.labels[instruction.operands[-1]]
            return lambda where: self._block.__setitem__(self.active(where), target)
        if instruction.name in ("ret", "exit"):
            return lambda where: self._is_done.__setitem__(self.active(where), True)
        if instruction.name in BARRIERS and not instruction.has("warp"):
            if instruction.operands != ("0",):
                raise EmulationError("only barrier 0 of all threads is known")
            return lambda where: self._is_waiting.__setitem__(self.active(where), True)
        return None
