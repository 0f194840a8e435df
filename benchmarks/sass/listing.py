"""Reads a disassembly of ``nvdisasm -c``: its innermost loop or longest way, and how many instructions of each kind.

Per 1000 codes a kernel's *lane operations* are counted: instructions of the innermost loop x 32 lanes x warps / codes
of an iteration; without a loop, of the longest way through the program.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable

KINDS = {
    "matrix": r"(HMMA|IMMA|QGMMA|HGMMA|IGMMA)",
    "shared": r"(LDS|STS|LDSM|STSM|SHFL|LDGSTS|ATOMS)\b",
    "global": r"(LDG|STG|LDL|STL|ATOMG|RED)\b",
    "conversion": r"(F2F|F2FP|I2F|I2FP|F2I|HADD2\.F32)",
    "float": r"(FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|FCHK|MUFU|HADD2|HFMA2|HMUL2|HMNMX2|FSET)",
    "integer": r"(LOP3|SHF|IADD3|IMAD|ISETP|VIADD|VIMNMX|LEA|PRMT|SEL|BFE|SGXT|IABS|IMNMX|POPC|PLOP3|I2I|BMSK|FLO)",
}
"""Kind of instruction by the beginning of its name, first match first. HADD2.F32 turns float16 into float32."""

CLOCKS = 132 * 1.755e9
"""Multiprocessors times cycles per second of an H100 SXM (NVIDIA's data sheet)."""

BANDWIDTH, REACHED = 3.35e12, 3.0e12
"""Bytes per second of its memory: the data sheet's, and what the best kernels reach (FlashMLA, a plain copy)."""

RATES = {"integer": 64 * CLOCKS, "float": 128 * CLOCKS, "all": 128 * CLOCKS, "shared": 32 * CLOCKS}
"""Lane operations per second (CUDA C++ Programming Guide, throughput of native arithmetic instructions, 9.0)."""

AVOID = -1_000_000
_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?\s*([A-Z].*?)\s*;")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Its text without the guard, and the predicate that it runs under ("@!P0", or "")."""

    text: str
    guard: str = ""

    @property
    def name(self) -> str:
        """The part before the operands, with its modifiers."""
        return self.text.split(maxsplit=1)[0]

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @property
    def label(self) -> str | None:
        """What it jumps to, if it is a branch to a label."""
        found = re.search(r"`\((\.L_\w+)\)", self.text)
        return found[1] if found and self.base == "BRA" else None

    def successors(self, index: int, labels: dict[str, int]) -> list[int]:
        """Where the program may go on from this instruction at ``index``."""
        conditional = bool(self.guard) or "P" in self.text.split("`")[0].replace("BRA", "").split(",")[0]
        if self.base in ("EXIT", "RET"):
            return [index + 1] if conditional else []
        if self.label is None:
            return [index + 1]
        return [index + 1, labels[self.label]] if conditional else [labels[self.label]]


@dataclasses.dataclass(frozen=True)
class Program:
    """Instructions in the order of their addresses, and the index that each label stands for."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def counted(self) -> list[Instruction]:
        """Those of the longest innermost loop, or of the longest way where there is none; nothing that fills space."""
        loops = []
        for index, instruction in enumerate(self.instructions):
            first = self.labels.get(instruction.label or "")
            if first is not None and first < index:
                loops.append((first, index + 1))
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        first, last = max(inner, key=lambda pair: pair[1] - pair[0], default=(0, 0))
        return [item for item in self.instructions[first:last] or self.longest_way() if item.base != "NOP"]

    def longest_way(self) -> list[Instruction]:
        """From the start to an exit, never back and around calls: slow paths of divisions that hardly occur."""
        count = len(self.instructions)
        length, following = [0] * (count + 1), [count] * (count + 1)
        for index in range(count - 1, -1, -1):
            instruction = self.instructions[index]
            ways = [way for way in instruction.successors(index, self.labels) if index < way <= count]
            following[index] = max(ways, key=length.__getitem__, default=count)
            length[index] = length[following[index]] + (AVOID if instruction.base == "CALL" else 1)
        way, index = [], 0
        while index < count:
            way.append(self.instructions[index])
            index = following[index]
        return way


def parse(text: str) -> Program:
    """The program of a disassembly."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append(Instruction(instruction[2], instruction[1] or ""))
    return Program(tuple(found), labels)


def kind_of(name: str) -> str:
    """Kind of an instruction; "other" are branches, barriers and what a warp does once, in its uniform unit."""
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), "other")


def lane_operations(names: Iterable[str], warps: int, codes: int) -> dict[str, float]:
    """Lane operations per 1000 codes of each kind, and of "all"."""
    kinds = collections.Counter(kind_of(name) for name in names)
    kinds["all"] = kinds.total()
    return {kind: round(count * 1000 * 32 * warps / codes, 1) for kind, count in kinds.items()}


def share(numbers: dict[str, float], bytes_per_code: float) -> dict[str, float | str]:
    """The share of an H100's bandwidth that the counts allow at best, and what sets that limit."""
    seconds = {kind: numbers.get(kind, 0.0) / rate for kind, rate in RATES.items()}
    seconds["memory"] = 1000 * bytes_per_code / REACHED
    slowest = max(seconds, key=seconds.__getitem__)
    return {"share": round(1000 * bytes_per_code / BANDWIDTH / seconds[slowest], 3), "limit": slowest}
