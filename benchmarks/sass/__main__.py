"""Command line: compiles, counts, prints the table, and compares with what was recorded."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import triton  # noqa: E402 the path comes first
import typer  # noqa: E402
from tabulate import tabulate  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from sass.compilation import TARGETS, compile_for  # noqa: E402
from sass.launches import QUICK, Specialisation, all_specialisations  # noqa: E402
from sass.listing import lane_operations, share  # noqa: E402

RESULTS = Path(__file__).resolve().parent.parent / "results"
TOLERANCE = 1.10
GROWS = ("registers", "spills", "shared bytes", "instructions", "integer", "all")
COLUMNS = ("registers", "spills", "shared bytes", "integer", "float", "conversion", "shared", "matrix", "all")


def measure(item: Specialisation, target: GPUTarget) -> dict[str, Any]:
    """Registers, spills, shared bytes; on NVIDIA, lane operations per 1000 codes; on Hopper, the share they allow."""
    compiled = compile_for(item, target)
    numbers: dict[str, Any] = {"registers": compiled.registers, "spills": compiled.spills}
    numbers["shared bytes"] = compiled.shared_bytes
    if compiled.program is not None:
        numbers["instructions"] = sum(each.base != "NOP" for each in compiled.program.instructions)
        if item.codes:
            names = [each.name for each in compiled.program.counted()]
            numbers |= lane_operations(names, item.options["num_warps"], item.codes)
            numbers |= share(numbers, item.bytes_per_code) if target == TARGETS["90"] else {}
    return numbers


def regressions(now: dict[str, dict[str, Any]], recorded: dict[str, dict[str, Any]]) -> list[str]:
    """Figures that got worse by more than 10 %, spills that appeared, and kernels nobody recorded."""
    found = []
    for name, numbers in now.items():
        before = recorded.get(name)
        if before is None:
            found.append(f"{name}: not recorded, run with --record")
            continue
        worse = [key for key in GROWS if numbers.get(key, 0) > before.get(key, 0) * TOLERANCE]
        worse += ["share"] if numbers.get("share", 0) < before.get("share", 0) / TOLERANCE else []
        found += [f"{name}: {key} {before.get(key, 0)} -> {numbers[key]}" for key in worse]
    return found


def table(measured: dict[str, dict[str, Any]]) -> str:
    """One row per kernel and target: lane operations per 1000 codes, and what their number allows on an H100."""
    rows = []
    for name, numbers in measured.items():
        allowed = f"{numbers['share']:.0%} ({numbers['limit']})" if "share" in numbers else ""
        rows.append([name, *(numbers.get(key, "") for key in COLUMNS), allowed])
    return tabulate(rows, headers=["kernel", *COLUMNS, "share of an H100's bandwidth"])


def results_file() -> Path:
    """Figures belong to a Triton version: 3.6 and 3.9 generate different code."""
    return RESULTS / f"sass-triton-{'.'.join(triton.__version__.split('.')[:2])}.json"


def main(
    record: Annotated[bool, typer.Option("--record", help="Write the figures instead of comparing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Only presets base and small, in their usual shape.")] = False,
    only: Annotated[str, typer.Option(help="Kernels whose name contains this.")] = "",
    target: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TARGETS)}; all by default.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Try another launch option: num_stages=3")] = None,
) -> None:
    """Compile the Triton kernels for GPUs that are not there; exit status 1 when something regressed."""
    tried = {name: int(value) for name, value in (each.split("=") for each in option or ())}
    measured = {}
    for name in target or TARGETS:
        for item in all_specialisations():
            if only in item.name and (not quick or item.name in QUICK):
                item = dataclasses.replace(item, options=item.options | tried)
                measured[f"{name} | {item.name}"] = measure(item, TARGETS[name])
                print(f"{name} | {item.name}", file=sys.stderr, flush=True)
    print(table(measured))
    if tried:
        return
    path = results_file()
    recorded = json.loads(path.read_text()) if path.exists() else {}
    if record:
        path.write_text(json.dumps({**recorded, **measured}, indent=1) + "\n")
        return
    found = regressions(measured, recorded)
    print("\n".join(["", *found]) if found else f"\nnothing got worse by more than 10 % over {path.name}")
    raise typer.Exit(bool(found))


if __name__ == "__main__":
    typer.run(main)
