"""Command line: compiles, measures, prints the table, and compares with what was recorded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget

import sass
from sass import hopper
from sass.calls import CONTEXTS, Call, DecodeAttention
from sass.compilation import TARGETS, Compiled, compile_for
from sass.counts import bounds, lane_operations
from sass.launches import QUICK, Specialisation, all_specialisations
from sass.paths import heaviest_way
from sass.predict import microseconds, predict

RESULTS = Path(__file__).resolve().parent.parent / "results"
TOLERANCE = 1.10
MODELLED = "90"
"""The target whose loops are timed."""


def measure(item: Specialisation, target: GPUTarget) -> dict[str, float | str]:
    """Registers, spills, shared bytes; on NVIDIA, lane operations per 1000 codes; on Hopper, what is predicted."""
    compiled = compile_for(item, target)
    numbers: dict[str, float | str] = {
        "registers": compiled.registers, "spills": compiled.spills, "shared bytes": compiled.shared_bytes,
    }  # fmt: skip
    if compiled.program is None:
        return numbers
    numbers["instructions"] = sum(item.base != "NOP" for item in compiled.program.instructions)
    if item.codes:
        body = compiled.program.body() if compiled.program.loop() else heaviest_way(compiled.program).instructions
        numbers |= lane_operations((instruction.name for instruction in body), item)
    if target == TARGETS[MODELLED]:
        numbers |= modelled(compiled, item)
    return numbers


def modelled(compiled: Compiled, item: Specialisation) -> dict[str, float | str]:
    """Predicted shares of the memory ceiling, and what stands in the way at the middle one of the latencies.

    Of kernels that do not go through the codes, the time of one program alone.
    """
    if not item.codes:
        return {"microseconds": round(microseconds(compiled, item, hopper.LATENCIES_NS[1]), 2)}
    found = {ns: predict(compiled, item, ns) for ns in hopper.LATENCIES_NS}
    middle = found[hopper.LATENCIES_NS[1]]
    return {
        "programs": middle.programs,
        **{share_at(ns): round(prediction.share, 3) for ns, prediction in found.items()},
        "cycles": round(middle.cycles),
        "codes per second": round(middle.codes_per_second / 1e9) * 1e9,
        "bytes in flight": round(middle.run.in_flight),
        "limit": middle.limit,
    }


def share_at(latency_ns: int) -> str:
    """Name of a figure."""
    return f"share at {latency_ns} ns"


GROWS = ("registers", "spills", "shared bytes", "instructions", "integer", "all")
SHRINKS = (share_at(hopper.LATENCIES_NS[1]),)


def regressions(now: dict[str, dict[str, float | str]], recorded: dict[str, dict[str, float | str]]) -> list[str]:
    """Figures that got worse by more than 10 %, spills that appeared, and kernels nobody recorded."""
    found = []
    for name, numbers in now.items():
        before = recorded.get(name)
        if before is None:
            found.append(f"{name}: not recorded, run with --record")
            continue
        worse = [key for key in GROWS if numbers.get(key, 0) > before.get(key, 0) * TOLERANCE]
        worse += [key for key in SHRINKS if numbers.get(key, 0) < before.get(key, 0) / TOLERANCE]
        found += [f"{name}: {key} {before.get(key, 0)} -> {numbers[key]}" for key in worse]
    return found


def table(measured: dict[str, dict[str, float | str]], items: dict[str, Specialisation]) -> str:
    """One row per kernel and target: lane operations per 1000 codes, what their number allows, what the model says."""
    columns = ["registers", "spills", "shared bytes"]
    kinds = ["integer", "float", "conversion", "shared", "matrix", "all"]
    shares = [share_at(ns) for ns in hopper.LATENCIES_NS]
    rows = []
    for name, numbers in measured.items():
        limits = bounds(numbers, items[name.split(" | ")[1]]) if "all" in numbers else {}
        slowest = max(limits, key=limits.__getitem__, default="")
        at_best = f"{slowest} ({limits['memory'] / limits[slowest]:.0%} of memory)" if slowest else ""
        predicted = [f"{numbers[key]:.0%}" if key in numbers else "" for key in shares]
        row = [
            *(numbers.get(key, "") for key in [*columns, *kinds]),
            at_best,
            *predicted,
            numbers.get("limit", numbers.get("microseconds", "")),
        ]
        rows.append([name, *row])
    model = [f"{ns} ns" for ns in hopper.LATENCIES_NS]
    return tabulate(rows, headers=["kernel", *columns, *kinds, "H100 by counts", *model, "by the model"])


def calls_table(attention: DecodeAttention) -> str:
    """One row per context, microseconds."""
    rows = []
    for context in CONTEXTS:
        call = attention.call(context)
        parts = [getattr(call, field.name) for field in dataclasses.fields(call)]
        rows.append([context, *parts, call.total, f"{call.floor / call.total:.0%}"])
    names = [field.name.replace("_", " ") for field in dataclasses.fields(Call)]
    return tabulate(rows, headers=["tokens", *names, "total", "share"], floatfmt=".1f")


def results_file() -> Path:
    """Figures belong to a Triton version: 3.6 and 3.9 generate different code."""
    return RESULTS / f"sass-triton-{'.'.join(triton.__version__.split('.')[:2])}.json"


def main() -> int:
    """Prints the table; 1 when something regressed."""
    parser = argparse.ArgumentParser(description=(sass.__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the figures instead of comparing")
    parser.add_argument("--quick", action="store_true", help="only presets base and small, in their usual shape")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--option", action="append", default=[], help="try another launch option: num_stages=3")
    parser.add_argument("--calls", metavar="PRESET", help="instead: times of whole calls of decode attention")
    options = parser.parse_args()
    tried = {name: int(value) for name, value in (each.split("=") for each in options.option)}
    if options.calls:
        print(calls_table(DecodeAttention(options.calls, hopper.LATENCIES_NS[1], tried)))
        return 0
    items = {item.name: item for item in all_specialisations() if options.only in item.name}
    if options.quick:
        items = {name: item for name, item in items.items() if name in QUICK}
    items = {name: dataclasses.replace(item, options=item.options | tried) for name, item in items.items()}
    measured = {}
    for target in options.target or TARGETS:
        for name, item in items.items():
            measured[f"{target} | {name}"] = measure(item, TARGETS[target])
            print(f"{target} | {name}", file=sys.stderr, flush=True)
    print(table(measured, items))
    if tried:
        return 0
    path = results_file()
    recorded = json.loads(path.read_text()) if path.exists() else {}
    if options.record:
        path.write_text(json.dumps({**recorded, **measured}, indent=1) + "\n")
        return 0
    found = regressions(measured, recorded)
    print("\n".join(["", *found]) if found else f"\nnothing got worse by more than 10 % over {path.name}")
    return 1 if found else 0
