"""From a result file to the README's GPU section. No number reaches the README any other way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

NOT_MEASURED = "Not yet measured on a GPU."
PRESETS = ("base", "small", "int4", "int8")
FLEX, FP16, KIVI = "FlexAttention", "fp16", "KIVI 2/2"
INNERQ = ("InnerQ base", "InnerQ small", "InnerQ hybrid 1%", "InnerQ hybrid 50%")


def markdown(results: Path) -> str:
    """The tables of every committed result file, with GPU, versions and commit; without one, a sentence says so."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("gpu-*.json"))]
    parts = [f"{provenance(record)}\n\n{tables(record)}" for record in records if not record.get("dry", True)]
    return "\n\n".join(parts) or NOT_MEASURED


def provenance(record: dict[str, Any]) -> str:
    """Where the numbers come from."""
    machine = next(iter(_rows(record, "environment", "machine")), {})
    source, smi = record["source"], machine.get("smi", {})
    commit = source["commit"] or "unknown"
    driver = f", driver {smi['driver_version']}" if "driver_version" in smi else ""
    ceilings = [row["gb_per_s"] for row in _rows(record, "environment", "ceiling") if row["way"] != "copy"]
    reads = f" A plain read of its memory runs at {max(ceilings):.0f} GB/s." if ceilings else ""
    return (
        f"Measured by `make gpu` on {machine.get('gpu', 'an unknown GPU')}{driver}, torch {machine.get('torch')}, "
        f"Triton {machine.get('triton')}, transformers {machine.get('transformers')}, commit {commit} "
        f"(source digest {source['digest']}).{reads}"
    )


def tables(record: dict[str, Any]) -> str:
    """Every table that has rows, each under a line that says what it is."""
    found = [make(record) for make in (checks, attention, flex, goals, products, append, end_to_end, memory)]
    return "\n\n".join(table for table in found if table)


def checks(record: dict[str, Any]) -> str:
    """How many comparisons and tests held, and what broke or was cut short: what the tables below are worth."""
    rows = _rows(record, "correctness", "checks")
    wrong = [row for row in rows if not row["ok"]]
    found = []
    if rows:
        kinds = sorted({f"{row['op']} of {row['part']}" for row in wrong})
        found.append(f"{len(rows) - len(wrong)} of {len(rows)} comparisons of the kernels with the reference hold.")
        found += [f"Wrong: {', '.join(kinds)}."] if wrong else []
    for row in _rows(record, "gpu_tests", "pytest"):
        counts = ", ".join(f"{number} {name}" for name, number in row["counts"].items())
        found.append(f"Tests ({row['part']}): {counts or row['status']}.")
    stopped = [
        f"{name} {process.get('part', '')}".strip() + f" ({process['status']})"
        for name, section in record["sections"].items()
        for process in section.get("processes", [])
        if process["status"] != "ok"
    ]
    found += [f"Broken or cut short: {', '.join(stopped)}."] if stopped else []
    broken = [f"{row['way']} in {row['case']}" for name in record["sections"] for row in _rows(record, name, "broken")]
    found += [f"Kernels that ended their process: {', '.join(broken)}."] if broken else []
    return " ".join(found)


def attention(record: dict[str, Any]) -> str:
    """Microseconds and share of the memory ceiling of one layer's decode attention."""
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    skipped = []
    for row in _rows(record, "decode", "attention"):
        case = (f"{row['q_heads']}/{row['heads']}/{row['head_dim']}", row["batch"], row["context"])
        if "skipped" in row:
            skipped.append(f"{'x'.join(map(str, case))} ({row['skipped']})")
        else:
            cases.setdefault(case, {})[row["way"]] = row
    lines = []
    for case, ways in sorted(cases.items()):
        some = next(iter(ways.values()))
        best = ways.get(some.get("best_bf16"))
        line = [*case, f"{best['us']:.1f} ({some['best_bf16']})" if best else "does not fit"]
        for preset in PRESETS:
            row = ways.get(preset)
            line.append(_cell(row) if row else "-")
        lines.append(line)
    if not lines:
        return ""
    headers = ("Hq/Hkv/D", "batch", "context", "best bf16", *PRESETS)
    note = f"\n\nNot measured: {', '.join(skipped)}." if skipped else ""
    title = (
        "Decode attention of one layer, cold L2, CUDA graph, medians: microseconds (times faster than the best bf16 "
        "way; share of the measured read bandwidth)"
    )
    return f"{title}:\n\n{_table(lines, headers)}{note}"


def goals(record: dict[str, Any]) -> str:
    """Every goal, and in how many of the cases that it applies to it was met."""
    met: dict[tuple[str, str], list[bool]] = {}
    for row in _rows(record, "decode", "attention"):
        for goal, reached in row.get("goals", {}).items():
            met.setdefault((row["way"], goal), []).append(reached)
    lines = [(way, goal, f"{sum(m)} of {len(m)}", "met" if all(m) else "not met") for (way, goal), m in met.items()]
    return f"Goals, set for one H100:\n\n{_table(sorted(lines), ('preset', 'goal', 'cases', ''))}" if lines else ""


def flex(record: dict[str, Any]) -> str:
    """FlexAttention beside the best of the other 16-bit ways, where it was compiled."""
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in _rows(record, "decode", "flex"):
        case = (f"{row['q_heads']}/{row['heads']}/{row['head_dim']}", row["batch"], row["context"])
        cases.setdefault(case, {})[row["way"]] = row["us"]
    lines = []
    for case, times in sorted(cases.items()):
        others = [f"{us:.1f} ({way})" for way, us in times.items() if way != FLEX]
        lines.append((*case, f"{times[FLEX]:.1f}" if FLEX in times else "-", *(others or ["-"])))
    headers = ("Hq/Hkv/D", "batch", "context", FLEX, "best of the others")
    return f"FlexAttention, compiled, microseconds:\n\n{_table(lines, headers)}" if lines else ""


def products(record: dict[str, Any]) -> str:
    """The paper's experiment: a table, the average ratios that the paper states, and tensor cores alone."""
    rows = [row for row in _rows(record, "products", "products") if "us" in row]
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    lines = []
    ratios: dict[tuple[int, int], dict[str, list[tuple[float, float]]]] = {}
    for heads, queries, tokens in sorted({(row["heads"], row["queries"], row["tokens"]) for row in rows}):
        here = [row for row in rows if (row["heads"], row["queries"], row["tokens"]) == (heads, queries, tokens)]
        pairs = {layout: (_best(here, layout, "qk"), _best(here, layout, "av")) for layout in layouts}
        cells = [f"{qk:.1f} + {av:.1f} = {qk + av:.1f}" if qk and av else "-" for qk, av in pairs.values()]
        lines.append([heads, queries, tokens, *cells])
        totals = {layout: qk + av for layout, (qk, av) in pairs.items() if qk and av}
        for layout in totals.keys() & set(INNERQ) if {FP16, KIVI} <= totals.keys() else ():
            ratio = (totals[FP16] / totals[layout], totals[KIVI] / totals[layout])
            ratios.setdefault((heads, queries), {}).setdefault(layout, []).append(ratio)
    if not lines:
        return ""
    title = "The products QK^T + AV alone, microseconds (best kernel of each layout)"
    headers = ("KV heads", "queries a head", "tokens", *layouts)
    parts = [f"{title}:\n\n{_table(lines, headers)}"]
    for (heads, queries), found in ratios.items():
        means = [
            f"{layout} {sum(r[0] for r in found[layout]) / len(found[layout]):.2f}x over {FP16} and "
            f"{sum(r[1] for r in found[layout]) / len(found[layout]):.2f}x over KIVI"
            for layout in INNERQ
            if layout in found
        ]
        paper = " (the paper: 2.7x and 1.3x on a Jetson)" if queries == 1 else ""
        parts.append(f"Mean over the lengths, {heads} heads with {queries} queries each{paper}: {'; '.join(means)}.")
    return "\n\n".join([*parts, *filter(None, [tensor_cores(rows)])])


def tensor_cores(rows: list[dict[str, Any]]) -> str:
    """Whether groups along the inner axis win where a matrix unit multiplies: the same 2-bit values, both groupings."""
    lines = []
    for heads, queries, tokens in sorted({(row["heads"], row["queries"], row["tokens"]) for row in rows}):
        here = [row for row in rows if (row["heads"], row["queries"], row["tokens"]) == (heads, queries, tokens)]
        for kind in ("mma int8", "mma fp16"):
            inner, outer = (_best(here, layout, "av", kind) for layout in ("InnerQ small", KIVI))
            if inner and outer:
                lines.append((heads, queries, tokens, kind, f"{inner:.1f}", f"{outer:.1f}", f"{outer / inner:.2f}x"))
    headers = ("KV heads", "queries a head", "tokens", "kernel", "inner groups", "outer groups", "inner is faster by")
    return f"AV at 2 bits on tensor cores alone, microseconds:\n\n{_table(lines, headers)}" if lines else ""


def _best(rows: list[dict[str, Any]], layout: str, product: str, method: str = "") -> float | None:
    """The shortest time of a layout's product among kernels whose name starts with ``method``."""
    times = [
        row["us"]
        for row in rows
        if row["layout"] == layout and row["product"] == product and row["method"].startswith(method)
    ]
    return min(times, default=None)


def append(record: dict[str, Any]) -> str:
    """Cost of appending one token, bandwidth of quantizing a prompt."""
    prefill = {
        (row["preset"], row["batch"], row["context"]): row["gb_per_s"] for row in _rows(record, "append", "prefill")
    }
    lines = [
        (row["batch"], row["context"], row["preset"], f"{row['us_per_step']:.2f}",
         f"{prefill[key]:.0f}" if (key := (row["preset"], row["batch"], row["context"])) in prefill else "-")
        for row in _rows(record, "append", "append")
    ]  # fmt: skip
    headers = ("batch", "context", "preset", "append, us per step and layer", "prefill, GB/s of bf16")
    return f"Append and prefill quantization, 8 KV heads, D = 128:\n\n{_table(lines, headers)}" if lines else ""


def end_to_end(record: dict[str, Any]) -> str:
    """Tokens per second and peak memory of whole models."""
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    speeds: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in _rows(record, "end_to_end", "end_to_end"):
        if "skipped" in row:
            continue
        key = (f"Llama {row['model']}", row["batch"], row["context"])
        speeds.setdefault(key, {})[row["cache"]] = row["tokens_per_s"]
        plain = ", no CUDA graph" if row.get("cudagraph_skips") else ""
        cell = f"{row['tokens_per_s']:.1f} ({row['peak_bytes'] / 1e9:.1f} GB{plain})"
        cells.setdefault(key, {})[row["cache"]] = cell
    lines = []
    for key in sorted(cells):
        ratio = speeds[key]["base"] / speeds[key]["static"] if {"base", "static"} <= speeds[key].keys() else None
        cell = cells[key]
        lines.append((*key, cell.get("static", "-"), cell.get("base", "-"), f"{ratio:.2f}x" if ratio else "-"))
    headers = ("model", "batch", "context", "StaticCache + Inductor", "base", "faster")
    title = "Whole models, random bf16 weights, `reduce-overhead`: decode tokens/s (peak memory)"
    return f"{title}:\n\n{_table(lines, headers)}" if lines else ""


def memory(record: dict[str, Any]) -> str:
    """The largest batch that fits, computed and tried."""
    found: dict[tuple[Any, ...], dict[str, int]] = {}
    for row in _rows(record, "memory", "fits"):
        found.setdefault((f"Llama {row['model']}", row["context"]), {})[row["cache"]] = row["batch"]
    if not found:
        return ""
    caches = list(next(iter(found.values())))
    lines = [(*key, *(batches.get(cache, "-") for cache in caches)) for key, batches in sorted(found.items())]
    tried = "".join(
        f"\n\nTried: {row['cache']}, batch {row['batch']} at {row['context']} tokens, {row['peak_bytes'] / 1e9:.1f} GB."
        for row in _rows(record, "memory", "tried")
    )
    headers = ("model", "context", *caches)
    return f"Largest batch beside the weights, by the bytes of the buffers:\n\n{_table(lines, headers)}{tried}"


def _cell(row: dict[str, Any]) -> str:
    speedup = f"{row['speedup']:.2f}x; " if "speedup" in row else ""
    return f"{row['us']:.1f} ({speedup}{row['share_of_ceiling']:.0%})"


def _rows(record: dict[str, Any], section: str, table: str) -> list[dict[str, Any]]:
    return record["sections"].get(section, {}).get("tables", {}).get(table, [])


def _table(lines: Any, headers: tuple[str, ...]) -> str:
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    print(markdown(Path(__file__).resolve().parents[1] / "results"))
