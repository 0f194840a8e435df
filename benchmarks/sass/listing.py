"""Reads a disassembly of ``nvdisasm -c -hex``: instructions with their scheduling bits, and loops.

Since Volta an instruction has 128 bits, and bits 105 to 125 are the compiler's orders to the scheduler (Jia et al.,
arXiv 1804.06826, section 2; Huerta et al., arXiv 2503.20481, section 4): how many cycles the warp waits after it, which
of six counters ("scoreboards") it occupies until its operands are read or its result is written, and which of them must
be clear before it may issue. Latencies that are fixed are covered by the waits alone, so no registers are tracked here.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cached_property

NO_SCOREBOARD = 7


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its text without the guard, and its scheduling bits.

    Attributes:
        text: Name and operands.
        guard: Predicate that it runs under ("@!P0"), or "".
        stall: Cycles until the warp may issue its next instruction.
        read: Scoreboard that is held until the operands are read, or None.
        write: Scoreboard that is held until the result is there, or None.
        waits: Scoreboards that must be clear first.
    """

    text: str
    guard: str = ""
    stall: int = 1
    read: int | None = None
    write: int | None = None
    waits: tuple[int, ...] = ()

    @cached_property
    def name(self) -> str:
        """The part before the operands, with its modifiers."""
        return self.text.split(maxsplit=1)[0]

    @cached_property
    def base(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @cached_property
    def label(self) -> str | None:
        """What it jumps to, if it is a branch to a label."""
        found = re.search(r"`\((\.L_\w+)\)", self.text)
        return found[1] if found and self.base == "BRA" else None


@dataclasses.dataclass(frozen=True)
class Program:
    """Instructions in the order of their addresses, and the index that each label stands for."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def loop(self) -> tuple[int, int] | None:
        """First instruction of the longest innermost loop, and the one after its branch back."""
        ends = []
        for index, instruction in enumerate(self.instructions):
            first = self.labels.get(instruction.label or "")
            if first is not None and first < index:
                ends.append((first, index + 1))
        inner = [a for a in ends if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ends)]
        return max(inner, key=lambda pair: pair[1] - pair[0], default=None)

    def body(self) -> tuple[Instruction, ...]:
        """Instructions of that loop, or all of them where there is none; without what only fills space."""
        first, last = self.loop() or (0, len(self.instructions))
        return tuple(item for item in self.instructions[first:last] if item.base != "NOP")


_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?\s*([A-Z].*?)\s*;")
_ENCODING = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")


def parse(text: str) -> Program:
    """The program of a disassembly; without encodings (no ``-hex``) all scheduling bits are the defaults."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    words: list[list[int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append((instruction[2], instruction[1] or ""))
            words.append([])
        if words and (encoding := _ENCODING.search(line)):
            words[-1].append(int(encoding[1], 16))
    instructions = tuple(
        Instruction(text, guard, **(scheduling(encoding[1]) if len(encoding) == 2 else {}))
        for (text, guard), encoding in zip(found, words, strict=True)
    )
    return Program(instructions, labels)


def scheduling(high: int) -> dict:
    """The scheduling bits of an instruction, from the upper 64 of its 128 bits."""
    bits = high >> 41
    read, write = bits >> 8 & 7, bits >> 5 & 7
    return {
        "stall": bits & 15,
        "write": None if write == NO_SCOREBOARD else write,
        "read": None if read == NO_SCOREBOARD else read,
        "waits": tuple(index for index in range(6) if bits >> 11 + index & 1),
    }
