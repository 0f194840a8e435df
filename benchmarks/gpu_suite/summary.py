"""The end of the suite's output: what ran, what failed, and the tables, short enough to read in a terminal."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from gpu_suite import render


def text(record: dict[str, Any]) -> str:
    """Status of every section, wrong or failed rows, then the tables that the README would show."""
    lines = []
    for name, section in record["sections"].items():
        states = ", ".join(
            f"{process.get('part', '')} {process['status']} {process['seconds']:.0f} s".strip()
            for process in section["processes"]
        )
        lines.append((name, section["status"], states if len(states) < 200 else states[:200] + " ..."))
    parts = [tabulate(lines, headers=("section", "status", "processes"))]
    parts += [f"WRONG {line}" for line in wrong(record)]
    for name, section in record["sections"].items():
        for process in section["processes"]:
            if process.get("error"):
                last = process["error"].strip().splitlines()[-1:] or [""]
                parts.append(f"{process['status'].upper()} {name} {process.get('part', '')}: {last[0][:300]}")
    parts.append(render.tables(record))
    parts.append(f"{record['seconds']:.0f} s")
    return "\n\n".join(parts)


def wrong(record: dict[str, Any]) -> list[str]:
    """Every check that did not hold, in words."""
    found = []
    for section in record["sections"].values():
        for row in section["tables"].get("checks", []):
            if not row["ok"]:
                found.append(", ".join(f"{key} {value}" for key, value in row.items() if key != "ok")[:400])
        found += [f"over its budget: {row}" for row in section["tables"].get("wrong", [])]
    return found


def failed(record: dict[str, Any]) -> bool:
    """Whether something was wrong or broke; running out of time is neither."""
    return bool(wrong(record)) or any(section["status"] == "failed" for section in record["sections"].values())
