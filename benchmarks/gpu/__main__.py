"""Runs the units of PLAN, each in a process of its own, and writes one JSON file: ``python benchmarks/gpu --help``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "benchmarks")
# Last, so that nothing installed is shadowed by kernels/ and passes/ of the repository root.
sys.path.append(str(ROOT))

import torch  # noqa: E402 the path comes first
import typer  # noqa: E402
from record import machine  # noqa: E402

from gpu import tables  # noqa: E402
from gpu.section import Section  # noqa: E402

PLAN = (
    ("machine", "", 30), ("correctness", "test_gpu.py", 110), ("correctness", "test_triton_kernels.py", 30),
    ("correctness", "test_triton_attention.py", 40),
    ("correctness", "test_triton_division.py test_triton_tiles.py", 20),
    ("attention", "gqa", 55), ("attention", "mha", 35), ("append", "", 15), ("memory", "", 10),
    ("models", "8b/1", 100), ("models", "1b/1", 60), ("models", "8b/8", 0), ("models", "1b/8", 0),
)  # fmt: skip
"""(section, part, seconds that it may take when the whole may take nine minutes); 0: whatever the others have left."""

MINUTES, GRACE = 9.0, 5.0


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Sections to run; all by default.")] = None,
    minutes: Annotated[float, typer.Option(help="End within this time; 25 measure every whole model.")] = MINUTES,
    dry: Annotated[bool, typer.Option("--dry", help="Tiny shapes on the CPU, also where there is a GPU.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the result; default: $OUT, else benchmarks/results.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Commit of this source, where git cannot tell.")] = None,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
    part: Annotated[str, typer.Option(hidden=True)] = "",
    rows: Annotated[Path | None, typer.Option(hidden=True)] = None,
    until: Annotated[float, typer.Option(hidden=True)] = 0.0,
) -> None:
    """Check and measure everything on a GPU. Exit status 1: something was wrong or broke."""
    if child and rows:
        section = Section(part, rows, until, dry)
        section.prepare()
        import_module(f"gpu.{child}").run(section)
        return
    began, dry = time.time(), dry or not torch.cuda.is_available()
    unknown = set(only or ()) - {section for section, _, _ in PLAN}
    if unknown:
        raise typer.BadParameter(
            f"no section {', '.join(unknown)}; there are {', '.join(dict.fromkeys(s for s, *_ in PLAN))}"
        )
    if dry:
        print("No GPU is used: a dry run on tiny shapes, whose numbers mean nothing.", flush=True)
    record: dict[str, Any] = {"dry": dry, "machine": machine(), "units": []}
    record["machine"] |= {"commit": commit} if commit else {}
    path = _result_path(out, dry, only)
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        rows, environment = Path(scratch) / "rows", _environment(Path(scratch), dry)
        # Dry, parts differ in nothing; the last test file is the one that takes seconds in Triton's interpreter.
        plan = {name: (name, *rest) for name, *rest in PLAN}.values() if dry else PLAN
        for section_name, part, own in plan:
            if only and section_name not in only:
                continue
            left = 60 * minutes - GRACE - (time.time() - began)
            limit = 300.0 if dry else min(own * minutes / MINUTES or left, left)
            record["units"].append(_run(section_name, part, limit, rows, environment, dry))
            record |= {"tables": _read(rows), "seconds": round(time.time() - began, 1)}
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n" + tables.of(record))
    print(f"\n{record['seconds']:.0f} s" + (f", result: {path}" if path else ""))
    raise typer.Exit(bool(tables.wrong(record)))


def _run(name: str, part: str, limit: float, rows: Path, environment: dict[str, str], dry: bool) -> dict[str, Any]:
    """One unit in a process of its own: its status, seconds and, where it broke, the end of what it printed."""
    unit: dict[str, Any] = {"section": name, "part": part, "status": "not reached", "seconds": 0.0}
    if limit >= 4 * GRACE:
        command = [sys.executable, str(Path(__file__).parent), "--child", name, "--part", part, "--rows", str(rows)]
        command += ["--until", str(time.time() + limit - GRACE), *(["--dry"] if dry else [])]
        began = time.monotonic()
        with tempfile.TemporaryFile() as log:
            try:
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=limit)
                unit["status"] = "failed" if done.returncode else "ok"
            except subprocess.TimeoutExpired:
                unit["status"] = "out of time"
            log.seek(0)
            if unit["status"] != "ok":
                unit["error"] = log.read().decode(errors="replace")[-6000:]
        unit["seconds"] = round(time.monotonic() - began, 1)
    print(f"{name} {part}: {unit['status']}, {unit['seconds']:.0f} s", flush=True)
    return unit


def _environment(scratch: Path, dry: bool) -> dict[str, str]:
    """Variables of the units: the checkout importable and its backend known by name, also where it is not installed."""
    folder = scratch / "innerq_compile-0+checkout.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: innerq-compile\nVersion: 0+checkout\n")
    (folder / "entry_points.txt").write_text(
        "[torch_dynamo_backends]\ninnerq = innerq_compile.compiler.backend:innerq\n"
    )
    path = os.pathsep.join(filter(None, [str(scratch), os.environ.get("PYTHONPATH")]))
    interpreted = {"TRITON_INTERPRET": "1"} if dry else {}
    return {"OMP_NUM_THREADS": "2", **os.environ, "PYTHONPATH": path, **interpreted}


def _read(rows: Path) -> dict[str, list[dict[str, Any]]]:
    """Table -> rows; a line that was cut short, because its unit ended in it, is left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found.setdefault(row.pop("table"), []).append(row)
    return found


def _result_path(out: Path | None, dry: bool, only: list[str] | None) -> Path | None:
    """Where the result goes; a dry run writes only where it is told to, and a part never replaces a whole."""
    folder = out or os.environ.get("OUT") or (None if dry else ROOT / "benchmarks" / "results")
    if folder is None:
        return None
    name = "dry" if dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return Path(folder) / f"{'part' if only else 'gpu'}-{name}.json"


if __name__ == "__main__":
    typer.run(main)
