"""From result files of ``make gpu`` to the README's GPU section. No number reaches the README any other way."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

LATE, NOT_MEASURED = "out of time", "Not yet measured on a GPU."
PRESETS = ("base", "small", "int4", "int8")


def markdown(results: Path) -> str:
    """The tables of every committed result file, with GPU, versions and commit; without one, a sentence says so."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("gpu-*.json"))]
    return "\n\n".join(of(record) for record in records if not record["dry"]) or NOT_MEASURED


def of(record: dict[str, Any]) -> str:
    """Where the numbers come from, what they are worth, and every table that has rows."""
    found = [make(record) for make in (provenance, checks, attention, append, models, memory)]
    return "\n\n".join(filter(None, found))


def provenance(record: dict[str, Any]) -> str:
    """GPU, software, ceiling."""
    gpu, machine = next(iter(_rows(record, "gpu")), {}), record["machine"]
    ceilings = [row["gb_per_s"] for row in _rows(record, "ceiling") if row["way"] != "copy"]
    reads = f" A plain read of 1 GiB runs at {max(ceilings):.0f} GB/s." if ceilings else ""
    versions = ", ".join(
        f"{name} {machine.get(name)}" for name in ("torch", "triton", "transformers", "commit", "date")
    )
    driver = f", driver {gpu['driver_version']}" if "driver_version" in gpu else ""
    return f"Measured by `make gpu` on {gpu.get('gpu', 'an unknown GPU')}{driver}, {versions}.{reads}"


def wrong(record: dict[str, Any]) -> list[str]:
    """What was over its budget, failed, or broke, a line each. What came too late or does not fit is neither."""
    found = [f"test {line}" for row in _rows(record, "tests") for line in row["wrong"]]
    for row in _rows(record, "attention"):
        if row.get("way") in PRESETS and not row["error"] <= row["budget"]:
            found.append(f"{row['way']} at {_case(row)}: error {row['error']:.1e}, budget {row['budget']:.1e}")
    for row in _rows(record, "failed"):
        ours = row.get("way") in (None, "append", "prefill", "tried", "static", "uncompiled", *PRESETS)
        if ours and not row["reason"].startswith("OutOfMemoryError"):
            found.append(f"{row.get('way', '')} at {_case(row)}: {row['reason']}")
    return found + [f"{unit['section']} {unit['part']} broke" for unit in record["units"] if unit["status"] == "failed"]


def checks(record: dict[str, Any]) -> str:
    """How many tests passed, and what was wrong or is missing."""
    counts: collections.Counter[str] = collections.Counter()
    for row in _rows(record, "tests"):
        counts.update(row["counts"])
    parts = [f"Tests on the device: {', '.join(f'{n} {name}' for name, n in counts.items())}."] if counts else []
    parts += [f"WRONG {line[:300]}." for line in wrong(record)]
    late = [
        f"{u['section']} {u['part']} ({u['status']})" for u in record["units"] if u["status"] not in ("ok", "failed")
    ]
    late += [f"{' '.join(row['files'])} ({row['status']})" for row in _rows(record, "tests") if row["status"] == LATE]
    for table in ("attention", "append", "models"):
        late += [f"{table} {_case(row)} ({row['skipped']})" for row in _rows(record, table) if "skipped" in row]
    late += [f"{row.get('way', '')} {_case(row)} (does not fit)" for row in _rows(record, "failed")
             if row["reason"].startswith("OutOfMemoryError")]  # fmt: skip
    return "\n\n".join([*parts, *([f"Not measured: {', '.join(late)}."] if late else [])])


def attention(record: dict[str, Any]) -> str:
    """Microseconds and share of the memory ceiling of one layer's decode attention."""
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in _rows(record, "attention"):
        if "us" in row:
            case = (f"{row['q_heads']}/{row['heads']}/{row['head_dim']}", row["batch"], row["context"])
            cases.setdefault(case, {})[row["way"]] = row
    lines = []
    for case, ways in sorted(cases.items()):
        best = ways.get(next(iter(ways.values())).get("best_bf16"))
        cells = [f"{best['us']:.1f} ({best['way']})" if best else "not measured"]
        cells += [f"{ways['FlexAttention']['us']:.1f}" if "FlexAttention" in ways else ""]
        cells += [_time(ways[preset]) if preset in ways else "-" for preset in PRESETS]
        lines.append([*case, *cells])
    title = (
        "Decode attention of one layer, cold L2, CUDA graph, medians: microseconds (times faster than the best bf16 "
        "way; GB/s; share of the speed of a plain read of the same bytes in the same run)"
    )
    return _table(title, lines, ("Hq/Hkv/D", "batch", "context", "best bf16", "FlexAttention", *PRESETS))


def _time(row: dict[str, Any]) -> str:
    speedup = f"{row['speedup']:.2f}x; " if "speedup" in row else ""
    return f"{row['us']:.1f} ({speedup}{row['gb_per_s']:.0f}; {row['share_of_ceiling']:.0%})"


def append(record: dict[str, Any]) -> str:
    """Cost of appending one token, bandwidth of quantizing a prompt."""
    prefill = {_case(row): f"{row['gb_per_s']:.0f}" for row in _rows(record, "prefill")}
    lines = [(row["batch"], row["context"], row["preset"], f"{row['us_per_step']:.2f}", prefill.get(_case(row), "-"))
             for row in _rows(record, "append") if "us_per_step" in row]  # fmt: skip
    headers = ("batch", "context", "preset", "append, us per step and layer", "prefill, GB/s of bf16")
    return _table("Append and prefill quantization, 8 KV heads, D = 128", lines, headers)


def models(record: dict[str, Any]) -> str:
    """Tokens per second of whole models."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (row for row in _rows(record, "models") if "tokens_per_s" in row):
        found.setdefault((f"Llama {row['model']}", row["batch"], row["context"]), {})[row["cache"]] = row
    lines = []
    for key, rows in sorted(found.items()):
        ratio = rows["base"]["tokens_per_s"] / rows["static"]["tokens_per_s"] if len(rows) == 2 else None
        cells = [_speed(rows[cache]) if cache in rows else "-" for cache in ("static", "base")]
        lines.append((*key, *cells, f"{ratio:.2f}x" if ratio else "-"))
    title = (
        "Whole models, random bf16 weights, `reduce-overhead`: decode tokens/s (bytes of the cache; relative "
        "difference of the logits to the uncompiled model over the same cache)"
    )
    return _table(title, lines, ("model", "batch", "context", "StaticCache + Inductor", "base", "faster"))


def _speed(row: dict[str, Any]) -> str:
    plain = ", no CUDA graph" if row["cudagraph_skips"] else ""
    error = "not compared" if row["error"] is None else f"{row['error']:.0e}"
    return f"{row['tokens_per_s']:.1f} ({row['cache_bytes'] / 1e9:.2f} GB{plain}; {error})"


def memory(record: dict[str, Any]) -> str:
    """The largest batch that fits, computed and tried."""
    found: dict[tuple[Any, ...], dict[str, int]] = {}
    for row in _rows(record, "fits"):
        found.setdefault((f"Llama {row['model']}", row["context"]), {})[row["cache"]] = row["batch"]
    caches = tuple(next(iter(found.values()), ()))
    lines = [(*key, *batches.values()) for key, batches in sorted(found.items())]
    tried = [
        f"\n\nTried: {row['cache']}, batch {row['batch']} at {row['context']}, {row['peak_bytes'] / 1e9:.1f} GB."
        for row in _rows(record, "tried")
    ]
    title = "Largest batch beside the weights, by the bytes of the buffers"
    return _table(title, lines, ("model", "context", *caches)) + "".join(tried)


def _case(row: dict[str, Any]) -> str:
    names = ("model", "preset", "q_heads", "heads", "head_dim", "batch", "context")
    return "/".join(str(row[name]) for name in names if name in row)


def _rows(record: dict[str, Any], table: str) -> list[dict[str, Any]]:
    return record["tables"].get(table, [])


def _table(title: str, lines: Any, headers: tuple[str, ...]) -> str:
    """A Markdown table under a line that says what it is; nothing without rows."""
    return f"{title}:\n\n{tabulate(lines, headers=headers, tablefmt='github', disable_numparse=True)}" if lines else ""
