"""Writes the measured tables into the documents, from the result files named here, and the plot.

    make tables

A table stands between "<!-- NAME: ... -->" and "<!-- end -->"; tests/test_benchmarks.py fails where it differs from its
result file.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu import tables  # benchmarks are run as files, so their folder is on the path
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "README.md")
DECODE = RESULTS / "intel-xeon-processor-2-threads.json"
GENERATE = RESULTS / "generate-llama-1b-intel-xeon-processor-2-threads.json"
REAL_MODEL = RESULTS / "real-model-smollm2-intel-xeon-processor-2-threads.json"
PLOT = RESULTS / "decode-attention.png"

OURS = ("int4", "base", "small")
AS_CALLED = "SDPA repeat_kv bf16"
BLOCK = re.compile(r"(<!-- ([a-z-]+): [^>]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)


def load(path: Path) -> dict:
    """A result file."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(rows: Sequence[Any], headers: str | Sequence[str]) -> str:
    """A Markdown table of texts; of mappings, ``headers="keys"``."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def conditions(result: dict) -> str:
    """Where, with what and when a result was measured."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers") if name in machine)
    where = f"{machine.get('cpu name', 'CPU')} ({machine['cpu']})"
    return f"{where}, {versions}, commit {machine.get('commit', 'unknown')}, {machine.get('date', 'undated')}"


def times(result: dict) -> dict[tuple[str, int], dict[str, float]]:
    """(shape, context) -> contender -> milliseconds."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in result["attention"]:
        found.setdefault((row["shape"], row["context"]), {})[row["contender"]] = row["ms"]
    return dict(sorted(found.items(), key=lambda item: (int(item[0][0].split("/")[-1]), item[0][1])))


def fastest(result: dict, shape: str, context: int, quantized: bool) -> tuple[str, float] | None:
    """The fastest rival with a 16- or 32-bit cache, or with fewer bits: name and milliseconds."""
    bits = {row["contender"]: row["bits"] for row in result["rivals"]}
    taken = times(result)[shape, context]
    some = [(ms, name) for name, ms in taken.items() if name in bits and (bits[name] < 16) == quantized]
    return min(some)[::-1] if some else None


def real_model() -> str:
    """A pretrained model: what each preset costs on every text, and what it saves."""
    result = load(REAL_MODEL)
    full = result["speed"]["full precision"]
    qualities = result["quality"]
    rows = []
    for name, speed in result["speed"].items():
        found = [quality["rows"].get(name) for quality in qualities]
        first = found[0] or {"bits": 16.0}
        row = [name, f"{first['bits']:.2f}", f"{speed['bytes'] / 1e6:.1f}", f"{full['bytes'] / speed['bytes']:.1f}x"]
        row += [f"{speed['ms']:.0f}"]
        for each in found:
            row += [""] * 3 if each is None else [
                f"{each['kl']:.4f} ± {each['kl_error']:.4f}",
                f"{100 * each['perplexity_change']:+.1f} %",
                f"{100 * each['agreement']:.1f} %",
            ]  # fmt: skip
        rows.append(row)
    headers = ["cache", "bits", "MB", "smaller", "ms a token"]
    for quality in qualities:
        headers += [f"KL, {quality['text']}", "perplexity", "same choice"]
    return f"{table(rows, headers)}\n\n{conditions(result)}"


def decode_attention() -> str:
    """One layer: ours against the fastest rivals, a row per head_dim and context."""
    result = load(DECODE)
    shares = {(r["shape"], r["context"], r["contender"]): r.get("share_of_read") for r in result["attention"]}
    rows = []
    for (shape, context), taken in times(result).items():
        if AS_CALLED not in taken:
            continue
        best = [fastest(result, shape, context, quantized) for quantized in (False, True)]
        named = [f"{rival[1]:.2f} ({rival[0]})" if rival else "not measured" for rival in best]
        ratios = [f"{rival[1] / taken['base']:.1f}x" if rival else "" for rival in best]
        head = [shape.split("/")[-1], str(context), f"{taken[AS_CALLED]:.1f}"]
        ours = [f"{taken[name]:.2f}" for name in OURS]
        rows.append([*head, *named, *ours, *ratios, f"{100 * shares[shape, context, 'base']:.0f} %"])
    headers = ["head_dim", "tokens", "as transformers calls it, bf16", "fastest 16 or 32 bit", "fastest quantized"]
    headers += [*OURS, "base vs 16 bit", "base vs quantized", "base: share of a plain read"]
    return f"{table(rows, headers)}\n\n{conditions(result)}"


def headline() -> str:
    """One sentence: by how much `base` beats the fastest rival of any precision where the cache is long."""
    result = load(DECODE)
    ratios = []
    for (shape, context), taken in times(result).items():
        best = [fastest(result, shape, context, quantized) for quantized in (False, True)]
        if context >= 16384 and any(best):
            ratios.append(min(rival[1] for rival in best if rival) / taken["base"])
    return (
        f"On {result['threads']} CPU cores one layer's attention over 16384 tokens or more is {min(ratios):.1f} to "
        f"{max(ratios):.1f} times as fast\nas the fastest alternative that could be installed, 16-bit or quantized "
        "([every contender](benchmarks/README.md))."
    )


def rivals() -> str:
    """Every contender at every context: milliseconds, the bits it stores and its error."""
    result = load(DECODE)
    parts = [conditions(result)]
    for shape in dict.fromkeys(shape for shape, _ in times(result)):
        cases = {context: taken for (name, context), taken in times(result).items() if name == shape}
        ours = [row for row in result["attention"] if "mib" in row]
        facts = {row["contender"]: row for row in (*ours, *result["rivals"]) if row["shape"] == shape}
        reads = [name for name in next(iter(cases.values())) if name.startswith("read ")]
        rows = []
        for name in dict.fromkeys([*facts, *reads]):
            fact = facts.get(name, {})
            cells = [f"{taken[name]:.2f}" if name in taken else "" for taken in cases.values()]
            if "missing" in fact:
                cells = [fact["missing"]] + [""] * (len(cells) - 1)
            error = f"{fact['error']:.1e}" if "error" in fact else ""
            version = f"{fact.get('package', '')} {fact.get('version', '')}".strip()
            rows.append([name, str(fact.get("bits", "")), *cells, error, "yes" if fact.get("appends") else "", version])
        headers = ["contender", "bits", *(f"{context}" for context in cases), "error", "appends", "package"]
        parts += [f"### Hq/Hkv/D {shape}", table(rows, headers)]
    return "\n\n".join(parts)


def errors() -> str:
    """Our kernels' errors over the same dequantized cache, and what a step's append and a prefill cost."""
    result = load(DECODE)
    rows = [[r["shape"], r["preset"], f"{r['integer']:.1e}", f"{r['exact']:.1e}"] for r in result["errors"]]
    costs = {(row["shape"], row["preset"]): row for row in result["append"]}
    for row in rows:
        cost = costs[row[0], row[1]]
        ms = times(result).get((row[0], cost["context"]), {}).get(row[1])
        share = f"{cost['append_us'] / ms / 10:.1f} %" if ms else ""
        row += [f"{cost['append_us']:.0f}", share, f"{cost['prefill_gb_per_s_per_core']:.1f}"]
    names = ["append, us", "of the attention", "prefill, GB/s"]
    return table(rows, ["shape", "preset", "error, integer", "error, exact=True", *names])


def generate_table(result: dict) -> str:
    """Decode tokens per second, a row per context and cache."""
    rows = []
    for r in result["results"]:
        speed, share = f"{1 / r['step_seconds']:.2f}", f"{100 * r['attention_share']:.0f} %"
        expected = f"{r['expected_speedup']:.2f}x" if r.get("expected_speedup") else ""
        rows.append([str(r["context"]), r["contender"], speed, share, expected, f"{r['speedup']:.2f}x"])
    return table(rows, ["context", "cache", "tokens/s", "share of attention", "expected", "vs StaticCache"])


def generate() -> str:
    """A whole model: decode tokens per second."""
    result = load(GENERATE)
    return f"{generate_table(result)}\n\n{conditions(result)}"


def cell(values: Sequence[float]) -> str:
    """``mean ± standard error`` in thousandths of a nat."""
    mean = 1e3 * statistics.fmean(values)
    error = 1e3 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean:.2f} ± {error:.2f}" if mean < 100 else f"{mean:.0f}"


def of_copies(copies: Sequence[dict[str, list[float]]], bits: str) -> list[float]:
    """The mean KL of each copy."""
    return [statistics.fmean(copy[bits]) for copy in copies]


def key_norm_tables(result: dict[str, Any]) -> str:
    """Everything, in thousandths of a nat."""
    rows = []
    for name, row in result["as trained"].items():
        copies = result["outliers"][name]
        cells = {f"K {b} bits": cell(values) for b, values in row.items()}
        cells |= {f"outliers, K {b}": cell(of_copies(copies, b)) for b in copies[0]}
        cells |= {f"start {s}, K 3": cell(part[name]["3"]) for s, part in result["short starts"].items()}
        rows.append({"key norm": name, **cells})
    kernels = [
        {"through the kernels": name}
        | {f"K {b}, {how}": cell(v) for how, part in result["kernels"].items() for b, v in part[name].items()}
        for name in result["kernels"]["exact"]
    ]
    return "\n\n".join(table(r, "keys") for r in (rows, kernels))


KEY_NORM_ROWS = {
    "off": "off",
    "max^0.5 (paper)": "at run time, the paper's root (`paper-*`)",
    "max^1, pairs": "at run time, ours without the center",
    "max^1, pairs, centred (default)": "at run time, ours (default)",
    "folded, max K^0.5 / Q^0.5, centred (default)": "folded, ours (default once folded)",
}


def key_norm() -> str:
    """What each key norm costs with keys at 3 bits. The last column compares the same prompts."""
    result = load(RESULTS / "key_norm.json")
    start = min(result["short starts"], key=int)
    rows = []
    for name, title in KEY_NORM_ROWS.items():
        trained, copies = result["as trained"][name]["3"], [copy["3"] for copy in result["outliers"][name]]
        ratio = statistics.fmean(map(statistics.fmean, copies)) / statistics.fmean(trained[: len(copies[0])])
        grown = result["short starts"][start][name]["3"]
        cells = {"as trained": cell(trained), f"norm fixed by the first {start} tokens": cell(grown)}
        cells["outliers: times as much"] = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
        rows.append({"key norm": title, **cells})
    return table(rows, "keys")


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "real-model": real_model,
    "decode-attention": decode_attention,
    "generate": generate,
    "rivals": rivals,
    "errors": errors,
    "gpu": lambda: tables.markdown(RESULTS),
    "key-norm": key_norm,
}


def render(page: str) -> str:
    """The page with every table of TABLES that it has a place for."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n\n{m[4]}", page)


LINES = {
    "SDPA repeat_kv bf16": ("DynamicCache, bf16", "#999999", "s-"),
    "QuantizedCache hqq 4 bit": ("QuantizedCache (HQQ), 4 bit", "#b07aa1", "v-"),
    "llama.cpp q8_0": ("llama.cpp, q8_0", "#9c755f", "D-"),
    "OpenVINO u8": ("OpenVINO, u8", "#4e79a7", "^-"),
    "SDPA folded bf16": ("best torch SDPA, bf16", "#555555", "s-"),
    "int4": ("innerq int4", "#f28e2b", "o-"),
    "base": ("innerq base", "#e15759", "o-"),
    "read base": ("plain read of base's bytes", "#000000", "--"),
}
"""Contender -> label, colour and style of its line in the plot."""


def plot(path: Path) -> None:
    """Milliseconds of a step against context, log-log, with the time that reading the bytes takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = load(DECODE)
    shapes = list(dict.fromkeys(shape for shape, _ in times(result)))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4.6 * len(shapes), 4.2), squeeze=False, sharey=True)
    for axis, shape in zip(axes[0], shapes, strict=True):
        cases = {context: taken for (name, context), taken in times(result).items() if name == shape}
        for name, (label, colour, style) in LINES.items():
            points = [(context, taken[name]) for context, taken in cases.items() if name in taken]
            if points:
                axis.loglog(*zip(*points, strict=True), style, color=colour, label=label, markersize=4, linewidth=1.5)
        axis.set_title(f"head_dim {shape.split('/')[-1]}", fontsize=10)
        axis.set_xticks(list(cases), [f"{context // 1024}k" for context in cases])
        axis.minorticks_off()
        axis.set_xlabel("tokens in the cache")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("ms per step and layer")
    axes[0][0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    """Writes the pages and the plot."""
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    plot(PLOT)


if __name__ == "__main__":
    main()
