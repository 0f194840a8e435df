"""Runs the sections in their order: checks and compilations side by side, measurements alone on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_suite import journal
from gpu_suite.context import BROKEN
from gpu_suite.jobs import Job, child_argv, read_rows
from gpu_suite.plan import Section

GRACE = 10
"""Seconds between the moment a section should have ended by itself and the one at which it is killed."""

HELD_AT_ONCE = 6
"""Whole models that compile at the same time: each keeps a core and some gigabytes of memory busy."""

HELD_LEAST = 40
"""Seconds that compiling and measuring a whole model takes at least: later none is started."""

RESTARTS = 3
"""How often a section that can go on where it broke is started again."""


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
        self.waiting = [(section, job) for section in sections if section.held for job in self.jobs[section.name]]
        self.preparing: list[Job] = []

    def run(self) -> dict[str, Any]:
        """Runs everything and returns what :meth:`results` returns; no process outlives it."""
        try:
            first = [s for s in self.sections if s.name == "environment"]
            together = [s for s in self.sections if s.together]
            held = [s for s in self.sections if s.held]
            alone = [s for s in self.sections if s not in (*first, *together, *held)]
            for section in first:
                self._run_alone(section)
            self._run_together(together)
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
                    if table != journal.TABLE:
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
        argv = child_argv(job, dry=self.dry, seconds=seconds, held=section.held)
        job.start(argv, self.environment, nice=section.nice)

    def _run_alone(self, section: Section) -> None:
        for job in self.jobs[section.name]:
            self._start(section, job, self._seconds_for(section))
            self._wait_for([job])
            while section.resumes and job.broke() and job.starts <= RESTARTS and self._seconds_for(section) > GRACE:
                self._start(section, job, self._seconds_for(section))
                self._wait_for([job])

    def _run_together(self, together: list[Section]) -> None:
        """Checks and compilations."""
        for section in together:
            for job in self.jobs[section.name]:
                self._start(section, job, self._seconds_for(section))
        self._wait_for([job for section in together for job in self.jobs[section.name]])

    def _feed(self) -> None:
        """Starts the next held processes; they compile beside everything else and run nothing on the GPU."""
        self.preparing = [job for job in self.preparing if job.poll() and not job.is_ready()]
        left = self.end - time.monotonic()
        if left < HELD_LEAST:
            self.waiting.clear()
        while self.waiting and len(self.preparing) < HELD_AT_ONCE:
            section, job = self.waiting.pop(0)
            self._start(section, job, left)
            self.preparing.append(job)

    def _measure_held(self, section: Section) -> None:
        """One after the other, those first that are ready."""
        rest = list(self.jobs[section.name])
        while rest and (left := self.end - time.monotonic()) > 0:
            ready = [job for job in rest if job.is_ready() and job.poll()]
            if ready:
                others = 2 * (len(ready) - 1)
                ready[0].go(max(0.0, min(section.seconds, left - others)))
                self._wait_for(ready[:1])
            elif not (self.waiting or self.preparing):
                break
            rest = [job for job in rest if not job.ended]
            self._pause()

    def _wait_for(self, jobs: list[Job]) -> None:
        while any([job.poll() for job in jobs]):
            self._pause()

    def _pause(self) -> None:
        self._feed()
        self.flush(self.results())
        time.sleep(0.05 if self.dry else 0.4)
