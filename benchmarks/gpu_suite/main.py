"""Command line of the suite; the same program is every section's own process."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1
"""Version of the result file's shape."""


def main(argv: list[str] | None = None) -> int:
    """Runs the suite, or one section of it as a child; returns the exit status.

    The status is 1 when a section failed or its kernels were wrong; a section that ran out of time is no failure.
    """
    began, args = time.monotonic(), _parse(argv)
    if args.child:
        _run_child(args)
        return 0
    import torch

    from gpu_suite import plan, summary

    dry = args.dry or not torch.cuda.is_available()
    if dry:
        # Triton reads this when it is first imported, here or in a section's process.
        os.environ["TRITON_INTERPRET"] = "1"
    sections = plan.chosen(args.only, dry)
    path = _result_path(args, dry)
    if dry:
        print("No GPU is used: a dry run on tiny shapes, whose numbers mean nothing.", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as scratch:
        folder = Path(scratch)
        flush = _writer(path, dry, args.commit)
        if args.in_process:
            results = _run_in_process(sections, folder, flush)
        else:
            from gpu_suite.schedule import Schedule

            schedule = Schedule(
                sections, folder, budget=(args.budget or plan.BUDGET) + began - time.monotonic(), dry=dry,
                environment=_environment(folder), flush=flush,
            )  # fmt: skip
            results = schedule.run()
        record = flush(results, force=True)
        if path is not None:
            logs = [f"==== {log.name}\n{log.read_text(errors='replace')}\n" for log in sorted(folder.glob("*.log"))]
            path.with_suffix(".log").write_text("".join(logs)[-8_000_000:], encoding="utf-8")
    print(summary.text(record))
    if path is not None:
        print(f"\nresult: {path}")
    return int(summary.failed(record))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the result; default: $OUT, else benchmarks/results")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections alone")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end within this time")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, also where there is a GPU")
    parser.add_argument("--in-process", action="store_true", help="a dry run without processes: quicker, not isolated")
    parser.add_argument("--commit", help="commit of this source, where git cannot tell")
    for name, kind in (("--child", str), ("--part", str), ("--rows", Path), ("--seconds", float), ("--gate", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _run_child(args: argparse.Namespace) -> None:
    import torch

    from gpu_suite.context import Context, use_interpreter, use_kernels

    device = torch.device("cpu" if args.dry else "cuda")
    deadline = time.monotonic() + args.seconds
    context = Context(device, args.dry, args.part or "", args.rows, deadline, args.gate)
    if args.dry:
        use_interpreter()
    else:
        torch.cuda.set_device(0)
        use_kernels()
    torch.manual_seed(0)
    importlib.import_module(f"gpu_suite.{args.child}").run(context)


def _run_in_process(sections: list[Any], folder: Path, flush: Callable[..., Any]) -> dict[str, Any]:
    """Every part of every section after the other in this process, on the CPU."""
    import traceback

    import torch

    from gpu_suite import journal
    from gpu_suite.context import Context, use_interpreter
    from gpu_suite.jobs import read_rows

    use_interpreter()
    results: dict[str, Any] = {}
    for section in sections:
        records, rows = [], folder / f"{section.name}.jsonl"
        for part in section.parts:
            began, error = time.monotonic(), None
            context = Context(torch.device("cpu"), True, part, rows, began + section.seconds)
            try:
                importlib.import_module(f"gpu_suite.{section.name}").run(context)
            except Exception:  # noqa: BLE001 one section's failure is a result, not the end of the others
                error = traceback.format_exc()
            seconds = round(time.monotonic() - began, 1)
            record = {"status": "failed" if error else "ok", "seconds": seconds, "part": part}
            records.append({**record, "error": error} if error else record)
        status = "failed" if any("error" in record for record in records) else "ok"
        tables = {name: found for name, found in read_rows(rows).items() if name != journal.TABLE}
        results[section.name] = {"title": section.title, "status": status, "processes": records, "tables": tables}
        flush(results)
    return results


def _environment(folder: Path) -> dict[str, str]:
    """Variables of the sections' processes: the checkout importable, its backend known by name, output unbuffered."""
    entry_points = folder / "path" / "innerq_compile-0+checkout.dist-info"
    entry_points.mkdir(parents=True)
    (entry_points / "METADATA").write_text("Metadata-Version: 2.1\nName: innerq-compile\nVersion: 0+checkout\n")
    (entry_points / "entry_points.txt").write_text("[torch_dynamo_backends]\ninnerq = innerq_compile.backend:innerq\n")
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(entry_points.parent), str(ROOT), *([inherited] if inherited else [])])
    # Few workers and threads a process: many processes compile and check at once.
    return {
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "OMP_NUM_THREADS": "2",
        # Triton's default; Inductor would have the processes that it runs in use another one.
        "TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache"),
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
    }


def _writer(path: Path | None, dry: bool, commit: str | None) -> Callable[..., dict[str, Any]]:
    """A function that writes the result file, whenever what it is given has changed."""
    from gpu_suite.environment import source

    began, last = time.time(), [""]
    head = {"schema": SCHEMA, "dry": dry, "source": source(commit)}

    def flush(sections: dict[str, Any], force: bool = False) -> dict[str, Any]:
        record = {**head, "seconds": round(time.time() - began, 1), "sections": sections}
        tables = json.dumps({name: section["tables"] for name, section in sections.items()})
        if path is not None and (force or tables != last[0]):
            last[0] = tables
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            part.replace(path)
        return record

    return flush


def _result_path(args: argparse.Namespace, dry: bool) -> Path | None:
    """Where the result goes; a dry run writes only where it is told to, and a part never replaces a whole."""
    from gpu_suite.environment import gpu_name

    folder = args.out or os.environ.get("OUT") or (None if dry else ROOT / "benchmarks" / "results")
    if folder is None:
        return None
    name = "dry" if dry else re.sub(r"[^a-z0-9]+", "-", gpu_name().lower()).strip("-")
    return Path(folder) / f"{'part' if args.only else 'gpu'}-{name}.json"
