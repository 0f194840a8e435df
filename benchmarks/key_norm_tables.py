"""The tables of benchmarks/bench_key_norm.py, from its stored result alone. KL in thousandths of a nat."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate


def cell(values: Sequence[float]) -> str:
    """``mean ± standard error`` in thousandths of a nat."""
    mean = 1e3 * statistics.fmean(values)
    error = 1e3 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean:.2f} ± {error:.2f}" if mean < 100 else f"{mean:.0f}"


def of_copies(copies: Sequence[dict[str, list[float]]], bits: str) -> list[float]:
    """The mean KL of each copy."""
    return [statistics.fmean(copy[bits]) for copy in copies]


def tables(result: dict[str, Any]) -> str:
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
    return "\n\n".join(tabulate(r, headers="keys", tablefmt="github", disable_numparse=True) for r in (rows, kernels))


README_ROWS = {
    "off": "off",
    "max^0.5 (paper)": "at run time, the paper's root (`paper-*`)",
    "max^1, pairs": "at run time, ours without the center",
    "max^1, pairs, centred (default)": "at run time, ours (default)",
    "folded, max K^0.5 / Q^0.5, centred (default)": "folded, ours (default once folded)",
}


def readme_table(result: dict[str, Any]) -> str:
    """The README's table: keys at 3 bits. The last column compares the same prompts."""
    start = min(result["short starts"], key=int)
    rows = []
    for name, title in README_ROWS.items():
        trained, copies = result["as trained"][name]["3"], [copy["3"] for copy in result["outliers"][name]]
        ratio = statistics.fmean(map(statistics.fmean, copies)) / statistics.fmean(trained[: len(copies[0])])
        grown = result["short starts"][start][name]["3"]
        rows.append(
            {
                "key norm": title,
                "as trained": cell(trained),
                f"norm fixed by the first {start} tokens": cell(grown),
                "outliers: times as much": f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}",
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
