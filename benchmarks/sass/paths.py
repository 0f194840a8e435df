"""The instructions that one program runs from its start to its end, found without running it.

Of two ways at a branch it takes the one with more instructions, but none that calls a function: those are the slow
paths of a division, for operands that hardly occur. Loops run as often as they are told to.
"""

from __future__ import annotations

from sass.listing import Instruction, Program

CALL_COST = -1_000_000


def heaviest_path(program: Program, trips: int = 1) -> tuple[Instruction, ...]:
    """One run through a program, ``trips`` times through its longest innermost loop and once through any other."""
    way = _longest(program)
    loop = program.loop()
    if loop:
        inside = [index for index in way if loop[0] <= index < loop[1]]
        before = [index for index in way if index < loop[0]]
        way = [*before, *inside * trips, *way[len(before) + len(inside) :]]
    return tuple(program.instructions[index] for index in way)


def outside_loop(program: Program) -> frozenset[Instruction]:
    """Instructions that are not part of the longest innermost loop; none where there is no loop."""
    loop = program.loop()
    if loop is None:
        return frozenset()
    return frozenset(program.instructions) - frozenset(program.instructions[loop[0] : loop[1]])


def _longest(program: Program) -> list[int]:
    """Indices on the longest way to an exit that never goes back."""
    count = len(program.instructions)
    length, following = [0] * (count + 1), [count] * (count + 1)
    for index in range(count - 1, -1, -1):
        instruction = program.instructions[index]
        ways = [way for way in _successors(program, index) if index < way <= count]
        if not ways and instruction.base == "BRA":
            ways = [count]  # a loop without an end, behind the program's own
        following[index] = max(ways, key=length.__getitem__, default=count)
        length[index] = length[following[index]] + (CALL_COST if instruction.base == "CALL" else 1)
    way, index = [], 0
    while index < count:
        way.append(index)
        index = following[index]
    return way


def _successors(program: Program, index: int) -> list[int]:
    """Where the program may go on."""
    instruction = program.instructions[index]
    conditional = bool(instruction.guard) or "P" in instruction.text.split("`")[0].replace("BRA", "").split(",")[0]
    if instruction.base in ("EXIT", "RET"):
        return [index + 1] if conditional else []
    if instruction.base != "BRA" or instruction.label is None:
        return [index + 1]
    target = program.labels[instruction.label]
    return [index + 1, target] if conditional else [target]
