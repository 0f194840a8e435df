"""Starts groups of rivals, each in a process of its own, and hands out their turns."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rivals import GROUPS, Case


@contextmanager
def started(groups: list[str], case: Case) -> Iterator[tuple[dict[str, Callable[[], float]], list[dict[str, object]]]]:
    """Turns of the rivals that run, by name (seconds of one timed step), and a row of facts for every rival."""
    workers, turns, rows = [], {}, []
    try:
        for group in groups:
            command = [sys.executable, "-m", "rivals.worker", group, json.dumps(dataclasses.asdict(case))]
            environment = {**os.environ, "PYTHONPATH": _search_path(), "OMP_NUM_THREADS": str(case.threads)}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            worker = subprocess.Popen(command, env=environment, **pipes)
            workers.append(worker)
            for number, rival in enumerate(GROUPS[group]):
                facts = json.loads(worker.stdout.readline() or '{"missing": "failed: its process ended"}')
                row = {"contender": rival.name, "package": rival.package, "bits": rival.bits, "appends": rival.appends}
                rows.append(row | facts)
                if "missing" not in facts:
                    turns[rival.name] = lambda worker=worker, number=number: _ask(worker, number)
        yield turns, rows
    finally:
        for worker in workers:
            worker.stdin.close()
            worker.wait()


def _search_path() -> str:
    ours = str(Path(__file__).parent.parent)
    return os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))


def _ask(worker: subprocess.Popen, number: int) -> float:
    print(number, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())
