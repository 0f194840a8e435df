"""What an instruction costs on an H100: which unit takes it, for how long, and when its result is there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from sass import hopper
from sass.listing import Instruction

UNITS = ("alu", "fma heavy", "fma lite", "special", "uniform", "matrix", "memory", "issue")
"""Units of one scheduler. "memory" is the way to what the four schedulers share; "issue" costs the slot alone."""

ALU, HEAVY, LITE, SPECIAL, UNIFORM, MATRIX, MEMORY, ISSUE = range(len(UNITS))


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction as the simulator sees it.

    Attributes:
        instruction: Where it comes from.
        units: Units that can take it, the preferred first.
        busy: Cycles for which the unit takes nothing else.
        latency: Cycles until its result is there, where no queue decides that; "barrier": after the last warp.
        shared_cycles: Cycles of the multiprocessor's shared memory.
        kind: "" or what else happens: "load" and "copy" (global memory; a copy is asynchronous, into shared memory),
            "store", "commit" (closes a group of copies), "wait" (for copies), "barrier".
        memory_bytes: Bytes that the warp moves from or to device memory.
        groups: "wait": groups of copies that may be outstanding.
    """

    instruction: Instruction
    units: tuple[int, ...]
    busy: float
    latency: int = 0
    shared_cycles: float = 0.0
    kind: str = ""
    memory_bytes: float = 0.0
    groups: int = 0


_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "BREV", "FLO"}
_FLOAT = {"FFMA", "FADD", "FMUL", "FFMA32I", "FADD32I", "FMUL32I", "HFMA2", "HADD2", "HMUL2"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS", "REDUX", "MATCH"}
_GLOBAL = {
    "LDG": "load",
    "LDGSTS": "copy",
    "STG": "store",
    "LDL": "local",
    "STL": "local",
    "RED": "store",
    "ATOMG": "load",
}
_CONSTANT = {"LDC", "S2R", "S2UR", "R2UR", "VOTE", "VOTEU"}


def width(instruction: Instruction) -> int:
    """Bytes that one thread loads or stores."""
    if matrices := re.search(r"\.M?T?88(?:\.(\d))?", instruction.name):
        return 4 * int(matrices[1] or 1)
    if size := re.search(r"\.(128|64|U16|S16|U8|S8)\b", instruction.name):
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[size[1]]
    return 4


def step_of(instruction: Instruction) -> Step:
    """The cost of one instruction; global loads and stores move all bytes that its threads ask for."""
    base, name = instruction.base, instruction.name
    if instruction.guard == "@!PT":  # never runs: it is there to keep its neighbours apart
        return Step(instruction, (ISSUE,), 1)
    if base in ("HMMA", "IMMA"):
        halves = 0.5 if ".1688." in name or ".16816.S8" in name or ".8816" in name else 1.0
        return Step(instruction, (MATRIX,), hopper.MATRIX_CYCLES * halves)
    if base in _SPECIAL:
        return Step(instruction, (SPECIAL,), hopper.SPECIAL_CYCLES, hopper.SPECIAL_LATENCY)
    if base in _FLOAT:
        return Step(instruction, (LITE, HEAVY), hopper.FMA_CYCLES)
    if base == "IMAD":
        wide = ".WIDE" in name or ".HI" in name
        return Step(instruction, (HEAVY,), hopper.FMA_CYCLES * (2 if wide else 1), hopper.SPECIAL_LATENCY)
    if base in _GLOBAL:
        lanes = hopper.LANES_PER_WARP * width(instruction)
        kind = _GLOBAL[base]
        shared = max(1, lanes / hopper.SHARED_BYTES_PER_CYCLE)
        if kind == "local":  # spills stay in the first-level cache
            return Step(instruction, (MEMORY,), hopper.MEMORY_CYCLES, hopper.SHARED_LATENCY, shared)
        return Step(instruction, (MEMORY,), hopper.MEMORY_CYCLES, 0, shared, kind, lanes)
    if base in _SHARED:
        shared = max(1, hopper.LANES_PER_WARP * width(instruction) / hopper.SHARED_BYTES_PER_CYCLE)
        latency = hopper.SHUFFLE_LATENCY if base == "SHFL" else hopper.SHARED_LATENCY
        return Step(instruction, (MEMORY,), hopper.MEMORY_CYCLES, latency, 1 if base == "SHFL" else shared)
    if base == "LDGDEPBAR":
        return Step(instruction, (ISSUE,), 1, kind="commit")
    if base == "DEPBAR":
        allowed = re.search(r"SB\d, (0x[0-9a-f]+)", instruction.text)
        return Step(instruction, (ISSUE,), 1, kind="wait", groups=int(allowed[1], 16) if allowed else 0)
    if base == "BAR":
        return Step(instruction, (ISSUE,), 1, hopper.BARRIER_LATENCY, kind="barrier")
    if base in _CONSTANT:
        return Step(instruction, (UNIFORM,), hopper.UNIFORM_CYCLES, hopper.CONSTANT_LATENCY)
    if base.startswith("U"):
        return Step(instruction, (UNIFORM,), hopper.UNIFORM_CYCLES)
    if base in ("BRA", "EXIT", "NOP", "BSSY", "BSYNC", "WARPSYNC", "CALL", "RET"):
        return Step(instruction, (ISSUE,), 1)
    return Step(instruction, (ALU,), hopper.ALU_CYCLES, hopper.SPECIAL_LATENCY)


NEXT_PROGRAM = Step(Instruction("EXIT"), (ISSUE,), 1, hopper.PROGRAM_LATENCY, kind="barrier")
"""When the last warp of a program has come to its end, another program takes its place."""


def steps_of(
    instructions: Sequence[Instruction],
    read: float | None = None,
    written: float | None = None,
    cached: Iterable[int] = (),
) -> list[Step]:
    """The costs of a sequence.

    Args:
        instructions: One after the other, as a warp runs them.
        read: What a warp really needs from device memory, in bytes. Threads that ask for the same bytes are served
            once, so the bytes of all loads are scaled to this sum; None takes them as they are.
        written: The same for stores.
        cached: Positions of loads that the second-level cache answers; copies come from device memory.
    """
    steps = [step_of(instruction) for instruction in instructions]
    for position in cached:
        if steps[position].kind == "load":
            latency = hopper.L2_LATENCY
            steps[position] = dataclasses.replace(steps[position], kind="", memory_bytes=0.0, latency=latency)
    stores = _asked(steps, ("store",))
    loads = _asked(steps, ("load", "copy"))
    factor = {"store": 1.0 if written is None else written / (stores or 1)}
    factor["load"] = factor["copy"] = 1.0 if read is None else read / (loads or 1)
    return [
        dataclasses.replace(step, memory_bytes=step.memory_bytes * factor[step.kind]) if step.kind in factor else step
        for step in steps
    ]


def _asked(steps: Sequence[Step], kinds: tuple[str, ...]) -> float:
    """Bytes that threads ask for, also those that others have asked for."""
    return sum(step.memory_bytes for step in steps if step.kind in kinds)
