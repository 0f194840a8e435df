"""The end of the suite's output: the tables, what failed, and last what ran, short enough to read in a terminal."""

from __future__ import annotations

import textwrap
from typing import Any

from tabulate import tabulate

from gpu_suite import render


def text(record: dict[str, Any]) -> str:
    """The tables that the README would show, then what was wrong or broke, then the status of every section."""
    parts = [render.tables(record)]
    for row in record["sections"].get("gpu_tests", {}).get("tables", {}).get("pytest", []):
        parts.append(f"pytest, {row['part']}: {row['counts'] or row['status']}")
    parts += [f"WRONG {line}" for line in wrong(record)]
    lines = []
    for name, section in record["sections"].items():
        states = []
        for process in section["processes"]:
            states.append(f"{process.get('part', '')} {process['status']} {process['seconds']:.0f} s".strip())
            if process.get("error"):
                last = process["error"].strip().splitlines()[-1:] or [""]
                parts.append(f"{process['status'].upper()} {name} {process.get('part', '')}: {last[0][:300]}")
        lines.append((name, section["status"], textwrap.fill(", ".join(states), 90)))
    parts.append(tabulate(lines, headers=("section", "status", "processes")))
    parts.append(f"{record['seconds']:.0f} s")
    return "\n\n".join(parts)


def wrong(record: dict[str, Any]) -> list[str]:
    """Every check that did not hold, in words."""
    found = []
    for section in record["sections"].values():
        for row in section["tables"].get("checks", []):
            if not row["ok"]:
                found.append(", ".join(f"{key} {value}" for key, value in row.items() if key != "ok")[:400])
        found += [f"ended its process: {row}" for row in section["tables"].get("broken", [])]
        found += [f"over its budget: {row}" for row in section["tables"].get("wrong", [])]
    return found


def failed(record: dict[str, Any]) -> bool:
    """Whether something was wrong or broke; running out of time is neither."""
    return bool(wrong(record)) or any(section["status"] == "failed" for section in record["sections"].values())
