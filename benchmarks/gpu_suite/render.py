"""From a result file to the README's GPU section. No number reaches the README any other way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

NOT_MEASURED = "Not yet measured on a GPU."
OURS = ("base", "small", "int4", "int8", "hybrid")


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
    found = [make(record) for make in (attention, goals, products, append, end_to_end, memory)]
    return "\n\n".join(table for table in found if table)


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
        for preset in ("base", "small", "int4", "int8"):
            row = ways.get(preset)
            line.append(_cell(row) if row else "-")
        lines.append(line)
    if not lines:
        return ""
    headers = ("Hq/Hkv/D", "batch", "context", "best bf16", "base", "small", "int4", "int8")
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


def products(record: dict[str, Any]) -> str:
    """The paper's experiment."""
    rows = [row for row in _rows(record, "products", "products") if "us" in row]
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    lines = []
    for setting in sorted({(row["heads"], row["queries"], row["tokens"]) for row in rows}):
        line: list[Any] = list(setting)
        for layout in layouts:
            times = [
                min((r["us"] for r in rows if (r["heads"], r["queries"], r["tokens"], r["layout"], r["product"])
                     == (*setting, layout, product)), default=None)
                for product in ("qk", "av")
            ]  # fmt: skip
            line.append("-" if None in times else f"{times[0]:.1f} + {times[1]:.1f} = {sum(times):.1f}")
        lines.append(line)
    if not lines:
        return ""
    title = "The products QK^T + AV alone, microseconds (best kernel of each layout)"
    headers = ("KV heads", "queries a head", "tokens", *layouts)
    return f"{title}:\n\n{_table(lines, headers)}"


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
        cells.setdefault(key, {})[row["cache"]] = f"{row['tokens_per_s']:.1f} ({row['peak_bytes'] / 1e9:.1f} GB)"
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
