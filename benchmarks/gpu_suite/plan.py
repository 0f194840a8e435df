"""What the suite runs, in which order, for how long at most."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the suite: a module of this package with ``run(context)``.

    Attributes:
        seconds: A process of it is stopped after this long.
        least: What sections before it must leave it of the whole budget.
        parts: Run as one process each, given to the module as ``context.part``; ``("",)`` is a single process.
        together: Runs at the same time as its neighbours that say so: it checks or compiles, and times nothing.
        held: Its processes start early, compile beside everything else, and measure one by one when their turn comes.
        resumes: It keeps a journal: started again after a crash, it goes on behind what broke it.
        nice: What can wait gets the processors' spare time.
    """

    name: str
    title: str
    seconds: float
    least: float = 0.0
    parts: tuple[str, ...] = ("",)
    together: bool = False
    held: bool = False
    resumes: bool = False
    nice: int = 0


END_TO_END = (
    "8b/static/1/32768",
    "8b/base/1/8192,32768,131072",
    "8b/static/1/131072",
    "8b/static/8/32768",
    "8b/base/8/8192,32768,131072",
    "1b/static/1/32768",
    "1b/base/1/8192,32768,131072",
    "8b/static/1/8192",
    "8b/static/8/8192",
    "1b/static/8/32768",
    "1b/base/8/8192,32768,131072",
    "1b/static/1/131072",
    "1b/static/8/131072",
    "1b/static/1/8192",
    "1b/static/8/8192",
)
"""model / cache / batch / contexts, in order of value. A quantized cache takes one capacity for all its contexts (its
kernels read the length from the device); a StaticCache attends to its whole capacity, so it gets one for each."""

DRY_PARTS = {
    "end_to_end": ("tiny/static/1/192", "tiny/base/1/192,224"),
    "compile_ahead": ("decode base",),
    "decode": ("gqa",),
}
"""What a dry run does instead."""

CHECKED = (
    "base", "small", "hybrid", "int4", "int8", "base/masks", "hybrid/masks", "asymmetric", "hybrid keys", "paper",
    "shapes 1", "shapes 2", "shapes 3",
)  # fmt: skip
"""Parts of the comparison with the reference: presets, their 12 kinds of mask and query, other modes, other shapes."""

COMPILED = (
    "decode base", "decode small", "decode int4", "decode int8", "products 1", "products 4", "append", "flex",
)  # fmt: skip
"""What is compiled ahead: a table, and a preset of it or the queries a head."""

SECTIONS = (
    Section("environment", "Machine and memory ceiling", 60),
    Section(
        "correctness",
        "Kernels against the reference",
        170,
        parts=CHECKED,
        together=True,
    ),
    Section("gpu_tests", "The project's own tests", 170, parts=("marked", "kernels"), together=True, nice=5),
    Section(
        "compile_ahead",
        "Compilations that the tables would wait for",
        170,
        parts=COMPILED,
        together=True,
    ),
    Section("decode", "Decode attention of one layer", 90, least=60, parts=("gqa", "mha"), resumes=True),
    Section("products", "The paper's experiment: both products alone", 70, least=25, resumes=True),
    Section("append", "Append and prefill quantization", 30, least=10, resumes=True),
    Section("memory", "Largest batch and context", 20, least=5),
    Section("end_to_end", "Whole models", 45, least=80, parts=END_TO_END, held=True, nice=10),
)

BUDGET = 500.0
"""Seconds for everything: make gpu ends in less than nine minutes, and finds torch on a cold disk before it begins."""


def chosen(only: list[str] | None, dry: bool) -> list[Section]:
    """The sections to run.

    Raises:
        SystemExit: A name that no section has.
    """
    names = [section.name for section in SECTIONS]
    unknown = sorted(set(only or []) - set(names))
    if unknown:
        raise SystemExit(f"no section {', '.join(unknown)}; there are {', '.join(names)}")
    found = [section for section in SECTIONS if not only or section.name in only]
    if dry:
        found = [dataclasses.replace(s, parts=DRY_PARTS.get(s.name, s.parts)) for s in found]
    return found
