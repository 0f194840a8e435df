"""PTX text to instructions in basic blocks: only what Triton and LLVM write, no macros, no functions, one kernel."""

from __future__ import annotations

import dataclasses
import re

BARRIERS = ("bar", "barrier")
TYPE = re.compile(r"[bsuf]\d+(x2)?|bf16(x2)?|pred")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands``; an operand is text, or a tuple of texts that stood in braces."""

    opcode: str
    operands: tuple[str | tuple[str, ...], ...]
    guard: str = ""
    source: str = ""
    """Line of the kernel's Python source."""

    @property
    def name(self) -> str:
        """The first part of the opcode."""
        return self.opcode.split(".")[0]

    @property
    def types(self) -> tuple[str, ...]:
        """The parts of the opcode that name a type."""
        return tuple(part for part in self.opcode.split(".") if TYPE.fullmatch(part))

    @property
    def modifiers(self) -> frozenset[str]:
        """The parts of the opcode behind the first that name no type."""
        return frozenset(part for part in self.opcode.split(".")[1:] if not TYPE.fullmatch(part))

    def has(self, *modifiers: str) -> bool:
        """Whether one of these is a part of the opcode."""
        return any(part in modifiers for part in self.opcode.split("."))

    def __str__(self) -> str:
        """As in the PTX, with its place in the source."""
        operands = ", ".join(x if isinstance(x, str) else "{" + ", ".join(x) + "}" for x in self.operands)
        return f"{f'@{self.guard} ' if self.guard else ''}{self.opcode} {operands}  // {self.source}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel: parameters (name, type) in order, register types, threads of a CTA, and blocks of instructions.

    A block ends with a branch, a return or a barrier, or where another one begins. ``labels`` tells the number of the
    block that a branch goes to.
    """

    name: str
    params: tuple[tuple[str, str], ...]
    registers: dict[str, str]
    threads: int
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]


def parse(text: str) -> Program:
    """Reads the one kernel of a PTX module.

    Raises:
        ValueError: A statement that is none.
    """
    header, body = re.search(r"\.entry\s+(.*?)\n\{\n(.*?)\n\}\n", text + "\n", re.DOTALL).groups()
    params = tuple((p[1], p[0]) for p in re.findall(r"\.param\s+\.(\w+)[^,\n]*?\s([\w$]+)\s*,?\s*\n", header + "\n"))
    threads = re.search(r"\.reqntid\s+(\d+)", header)
    registers: dict[str, str] = {}
    statements: list[str | Instruction] = []
    source = ""
    for line in body.split("\n"):
        code, _, comment = line.partition("//")
        if code.strip().startswith(".loc"):
            source = comment.split("@[")[0].strip()
            continue
        for statement in code.split(";"):
            statement = statement.strip()
            while found := re.match(r"[{}]|[$\w]+:(?!:)", statement):  # a scope, or a label
                if found[0][-1] == ":":
                    statements.append(found[0][:-1])
                statement = statement[found.end() :].strip()
            if statement.startswith(".reg"):
                _declare(statement, registers)
            elif statement and not statement.startswith("."):
                statements.append(_instruction(statement, source))
    blocks, labels = _cut(statements)
    return Program(header.split("(")[0].strip(), params, registers, int(threads[1]) if threads else 32, blocks, labels)


def _declare(line: str, registers: dict[str, str]) -> None:
    kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", line).groups()
    for name in (part.strip() for part in names.split(",")):
        many = re.fullmatch(r"(.*)<(\d+)>", name)
        for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            # The name of an inner scope may come again: then with the same type, and written before it is read.
            if registers.setdefault(each, kind) != kind:
                raise ValueError(f"register {each} is both {registers[each]} and {kind}")


def _instruction(line: str, source: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", line, re.DOTALL)
    if not found:
        raise ValueError(f"not a statement: {line}")
    operands = []
    for operand in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[3]):
        operand = operand.strip()
        if operand[0] == "{":
            operands.append(tuple(part.strip() for part in operand[1:-1].split(",")))
        else:
            operands.append(operand)
    return Instruction(found[2], tuple(operands), found[1] or "", source)


def _cut(statements: list[str | Instruction]) -> tuple[tuple[tuple[Instruction, ...], ...], dict[str, int]]:
    """Statements to blocks; a label is the name of the block that it opens."""
    targets = {s.operands[-1] for s in statements if isinstance(s, Instruction) and s.name == "bra"}
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for statement in statements:
        if isinstance(statement, str):
            if statement in targets:
                if blocks[-1]:
                    blocks.append([])
                labels[statement] = len(blocks) - 1
        else:
            blocks[-1].append(statement)
            if statement.name in ("bra", "ret", "exit", *BARRIERS):
                blocks.append([])
    return tuple(map(tuple, blocks)), labels
