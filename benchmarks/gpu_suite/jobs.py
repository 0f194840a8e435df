"""A section in a process of its own: started, limited in time, ended with everything that it started, and recorded."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOG_TAIL = 6000
"""Characters of a failed process's output that the result keeps; tracebacks of compilers are long."""


class Job:
    """One process.

    Args:
        section, part: Which part of which section it does.
        argv: What to run; :func:`child_argv` makes it for sections of this package.
        folder: Scratch folder for its rows, log and gate.
        seconds: It is killed this long after its start, or after :meth:`go`.
    """

    def __init__(self, section: str, part: str, folder: Path, seconds: float) -> None:
        self.section, self.part, self.seconds = section, part, seconds
        stem = folder / f"{section}-{part}".translate(str.maketrans("/, ", "---"))
        self.rows, self.log, self.gate = (stem.with_name(stem.name + end) for end in (".jsonl", ".log", ".gate"))
        self.status, self.starts, self.broken = "waiting", 0, False
        self.began = self.ended = 0.0
        self.process: subprocess.Popen | None = None

    def start(self, argv: list[str], environment: dict[str, str], nice: int = 0) -> None:
        """Starts the process in a session of its own, so that its workers can be ended with it; also once more."""
        self.began, self.ended, self.status, self.starts = time.monotonic(), 0.0, "running", self.starts + 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, preexec_fn=functools.partial(os.nice, nice) if nice else None,
            )  # fmt: skip

    def poll(self) -> bool:
        """Whether it is still running; ends it when its time is over."""
        if self.process is None or self.ended:
            return False
        code = self.process.poll()
        if code is None and time.monotonic() - self.began > self.seconds:
            self.end("timeout")
        elif code is not None:
            self.ended = time.monotonic()
            self.status = "ok" if code == 0 else "failed"
            self.broken |= code != 0
            self.kill_leftovers()
        return not self.ended

    def broke(self) -> bool:
        """It ended with an error, when it was last started."""
        return self.status == "failed"

    def is_ready(self) -> bool:
        """A held process has prepared itself and waits for :meth:`go`."""
        return self.gate.with_suffix(".ready").exists()

    def go(self, seconds: float) -> None:
        """Gives a held process the GPU for this long."""
        self.began, self.seconds = time.monotonic(), seconds + 10
        # Whole or not there: the process reads it as soon as it sees it.
        unfinished = self.gate.with_suffix(".unfinished")
        unfinished.write_text(str(seconds))
        unfinished.replace(self.gate.with_suffix(".go"))

    def end(self, status: str) -> None:
        """Kills the process if it still runs."""
        if self.process is not None and not self.ended:
            self.kill_leftovers()
            self.process.wait()
            self.ended, self.status = time.monotonic(), status

    def kill_leftovers(self) -> None:
        """Ends the whole process group that :meth:`start` made."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def record(self) -> dict[str, Any]:
        """Status, seconds and, unless all went well, the end of the log."""
        ended = self.ended or time.monotonic()
        status = "failed" if self.broken and self.ended else self.status
        found: dict[str, Any] = {"status": status, "seconds": round(ended - self.began, 1) if self.began else 0.0}
        if self.part:
            found["part"] = self.part
        if self.starts > 1:
            found["starts"] = self.starts
        if status not in ("ok", "running", "waiting") and self.log.exists():
            found["error"] = self.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]
        return found


def read_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Table -> rows of a file that :meth:`gpu_suite.context.Context.emit` wrote; a line cut short is left out."""
    tables: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                tables.setdefault(row.pop("table"), []).append(row)
    return tables


def child_argv(job: Job, *, dry: bool, seconds: float, held: bool) -> list[str]:
    """The command of a job that is a section of this package."""
    argv = [sys.executable, str(Path(__file__).resolve().parent), "--child", job.section, "--part", job.part]
    argv += ["--rows", str(job.rows), "--seconds", str(seconds)]
    return argv + (["--dry"] if dry else []) + (["--gate", str(job.gate)] if held else [])
