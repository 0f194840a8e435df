"""The instructions that one program runs from its start to its end, found without running it.

Of two ways at a branch it takes the one with more instructions, but none that calls a function: those are the slow
paths of a division, for operands that hardly occur. Loops run as often as they are told to.
"""

from __future__ import annotations

import dataclasses

from sass.listing import Instruction, Program

AVOID = -1_000_000


@dataclasses.dataclass(frozen=True)
class Way:
    """What a warp runs, one after the other; ``loop``: first position of the loop's trips, and the one after them."""

    instructions: tuple[Instruction, ...]
    loop: tuple[int, int]


def heaviest_way(program: Program, trips: int = 1) -> Way:
    """One run through a program, ``trips`` times through its longest innermost loop and once through any other.

    No trips: on the heaviest way around that loop.
    """
    first, last = program.loop() or (0, 0)
    way = _longest(program, avoided=range(first, last) if trips == 0 else range(0))
    inside = [index for index in way if first <= index < last]
    begin = way.index(inside[0]) if inside else 0
    all_trips = inside * trips
    way = [*way[:begin], *all_trips, *way[begin + len(inside) :]]
    return Way(tuple(program.instructions[index] for index in way), (begin, begin + len(all_trips)))


def without_idle_copies(way: Way) -> tuple[Instruction, ...]:
    """The instructions, those copies never executed that would fetch ahead what lies behind the loop's last trip.

    As many as the copies before the loop: those fetch for the first trips what later each trip fetches for another.
    """
    copies = [index for index, each in enumerate(way.instructions) if each.base == "LDGSTS"]
    ahead = sum(index < way.loop[0] for index in copies)
    idle = set(copies[len(copies) - ahead :])
    return tuple(
        dataclasses.replace(each, guard="@!PT") if index in idle else each
        for index, each in enumerate(way.instructions)
    )


def _longest(program: Program, avoided: range) -> list[int]:
    """Indices on the longest way to an exit that never goes back."""
    count = len(program.instructions)
    length, following = [0] * (count + 1), [count] * (count + 1)
    for index in range(count - 1, -1, -1):
        instruction = program.instructions[index]
        ways = [way for way in _successors(program, index) if index < way <= count]
        if not ways and instruction.base == "BRA":
            ways = [count]  # a loop without an end, behind the program's own
        following[index] = max(ways, key=length.__getitem__, default=count)
        avoid = instruction.base == "CALL" or index in avoided
        length[index] = length[following[index]] + (AVOID if avoid else 1)
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
