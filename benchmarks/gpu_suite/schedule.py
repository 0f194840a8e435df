"""Runs the sections in their order: checks and compilations side by side, measurements alone on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_suite.context import BROKEN
from gpu_suite.jobs import Job, child_argv, read_rows
from gpu_suite.plan import Section

GRACE = 10
"""Seconds between the moment a section should have ended by itself and the one at which it is killed."""

HELD_AT_ONCE = 6
"""Whole models that compile at the same time: each keeps a core and some gigabytes of memory busy."""


class Schedule:
    """The state of a run.

    Args:
        sections: What to run.
        folder: Scratch folder.
        budget: Seconds for everything.
        environment: Variables of the processes.
        flush: Called with the sections' results whenever there is news.
    """

    def __init__(
        self, sections: list[Section], folder: Path, *, budget: float, dry: bool, environment: dict[str, str],
        flush: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self.sections, self.dry, self.environment, self.flush = sections, dry, environment, flush
        self.end = time.monotonic() + budget
        self.jobs = {s.name: [Job(s.name, part, folder, s.seconds + GRACE) for part in s.parts] for s in sections}

    def run(self) -> dict[str, Any]:
        """Runs everything and returns what :meth:`results` returns; no process outlives it."""
        try:
            first = [s for s in self.sections if s.name == "environment"]
            together = [s for s in self.sections if s.together]
            held = [s for s in self.sections if s.held]
            alone = [s for s in self.sections if s not in (*first, *together, *held)]
            for section in first:
                self._run_alone(section)
            self._run_together(together, held)
            self.environment[BROKEN] = ",".join(
                j.part for j in self.jobs.get("correctness", []) if j.status == "failed"
            )
            for section in alone:
                self._run_alone(section)
            for section in held:
                self._measure_held(section)
        finally:
            for job in self._all_jobs():
                job.end("timeout" if job.began else "skipped")
        return self.results()

    def results(self) -> dict[str, Any]:
        """Section -> status, seconds, processes and tables."""
        found = {}
        for section in self.sections:
            records = [job.record() for job in self.jobs[section.name]]
            tables: dict[str, list[Any]] = {}
            for job in self.jobs[section.name]:
                for table, rows in read_rows(job.rows).items():
                    tables.setdefault(table, []).extend(rows)
            states = {record["status"] for record in records}
            status = "ok" if states == {"ok"} else next((s for s in ("failed", "timeout") if s in states), "incomplete")
            found[section.name] = {"title": section.title, "status": status, "processes": records, "tables": tables}
        return found

    def _all_jobs(self) -> list[Job]:
        return [job for jobs in self.jobs.values() for job in jobs]

    def _seconds_for(self, section: Section) -> float:
        """Its own limit, or what is left when the later sections keep their least."""
        later = self.sections[self.sections.index(section) + 1 :]
        return max(0.0, min(section.seconds, self.end - time.monotonic() - sum(s.least for s in later)))

    def _start(self, section: Section, job: Job, seconds: float) -> None:
        job.seconds = seconds + GRACE
        job.start(child_argv(job, dry=self.dry, seconds=seconds, held=section.held), self.environment)

    def _run_alone(self, section: Section) -> None:
        for job in self.jobs[section.name]:
            self._start(section, job, self._seconds_for(section))
            self._wait_for([job])

    def _run_together(self, together: list[Section], held: list[Section]) -> None:
        """Checks and compilations; held processes are started as others of them get ready."""
        for section in together:
            for job in self.jobs[section.name]:
                self._start(section, job, self._seconds_for(section))
        running = [job for section in together for job in self.jobs[section.name]]
        waiting = [(section, job) for section in held for job in self.jobs[section.name]]
        started: list[Job] = []
        # Without checks beside it, preparing whole models may take most of the time.
        limit = time.monotonic() + max([s.seconds for s in together], default=0.6 * (self.end - time.monotonic()))
        while True:
            preparing = [job for job in started if job.poll() and not job.is_ready()]
            if waiting and len(preparing) < HELD_AT_ONCE and time.monotonic() < limit:
                section, job = waiting.pop(0)
                self._start(section, job, self.end - time.monotonic())
                started.append(job)
                continue
            busy = [job for job in running if job.poll()]
            if not busy and (time.monotonic() > limit or not (waiting or preparing)):
                break
            self._pause()

    def _measure_held(self, section: Section) -> None:
        ready = []
        for job in self.jobs[section.name]:
            if job.poll() and not job.is_ready():
                job.end("timeout")  # still compiling: it would disturb the others
            elif job.is_ready() and not job.ended:
                ready.append(job)
        for index, job in enumerate(ready):
            seconds = max(0.0, min(section.seconds, self.end - time.monotonic()) - 2 * (len(ready) - index - 1))
            job.go(seconds)
            self._wait_for([job])

    def _wait_for(self, jobs: list[Job]) -> None:
        while any([job.poll() for job in jobs]):
            self._pause()

    def _pause(self) -> None:
        self.flush(self.results())
        time.sleep(0.05 if self.dry else 0.4)
