"""Runs a loop on one multiprocessor: who issues when, and what the others wait for.

A model, not a measurement. It knows the compiler's waits and scoreboards, one instruction per scheduler and cycle, the
rate of every unit, the path to shared memory, barriers between the warps of a program, and device memory as a latency
and a fair share of the bandwidth. It does not know bank conflicts of shared memory and of registers, misses of the
instruction cache, the first-level cache, pages of device memory, or other multiprocessors' luck.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Container, Iterator, Sequence

from sass import hopper
from sass.machine import HEAVY, ISSUE, LITE, MEMORY, UNITS, Step

BYTES_PER_CYCLE = hopper.REACHED_BANDWIDTH / hopper.PROCESSORS / hopper.CLOCK
"""Of device memory, for one multiprocessor."""

BURST_BYTES = 4096
"""What one multiprocessor may fetch ahead of its fair share of the bandwidth: the others do not all ask at the same
moment, so a burst after a pause is served sooner than a memory of its own with a 132nd of the bandwidth would. Chosen
so that one multiprocessor comes within 7 points of what 16 reach that share one queue (benchmarks/LOG.md)."""

STORES_IN_FLIGHT = 4096
"""Bytes of stores that wait for device memory before the next one has to: rough; without stores it plays no role."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What happened in the steady part of a run.

    Attributes:
        cycles: Per iteration of one program; all resident programs do one in that time.
        busy: Share of the time for which the busiest of each kind of unit worked, "memory bandwidth" among them.
        waits: Share of the warps' time spent waiting, by cause; "issuing" is the rest.
        in_flight: Mean bytes that were on their way from device memory.
    """

    cycles: float
    busy: dict[str, float]
    waits: dict[str, float]
    in_flight: float


class Multiprocessor:
    """One multiprocessor with ``programs`` of ``warps`` each, all running ``iterations`` of the same loop.

    Args:
        steps: The loop.
        warps: Warps of a program.
        programs: Programs that are there at a time.
        latency: Cycles of a load from device memory without a queue.
        bytes_per_cycle: Of device memory.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        warps: int,
        programs: int,
        latency: float,
        bytes_per_cycle: float = BYTES_PER_CYCLE,
    ) -> None:
        self.steps, self.warps, self.programs = steps, warps, programs
        self.latency, self.bytes_per_cycle = latency, bytes_per_cycle
        count = warps * programs
        self.position = [0] * count
        self.laps = [0] * count
        self.issued_at = [0.0] * count
        self.clear_at = [[0.0] * 6 for _ in range(count)]
        self.clears = [["fixed latency"] * 6 for _ in range(count)]
        self.newest_copy = [0.0] * count
        self.groups: list[collections.deque[float]] = [collections.deque(maxlen=64) for _ in range(count)]
        self.scheduler_free = [0.0] * hopper.SCHEDULERS
        self.unit_free = [[0.0] * len(UNITS) for _ in range(hopper.SCHEDULERS)]
        self.unit_busy = [[0.0] * len(UNITS) for _ in range(hopper.SCHEDULERS)]
        self.shared_free = self.shared_busy = self.memory_bytes = self.flight = self.port_free = 0.0
        self.memory_free = -1e9
        self.arrived: list[list[int]] = [[] for _ in range(programs)]
        self.arrived_at = [0.0] * count
        self.waits: collections.Counter[str] = collections.Counter()
        self.marks: Container[int] = ()
        self.passed: dict[int, float] = {}
        self.queue: list[tuple[float, float, int]] = []

    def run(self, iterations: int, warm_up: int) -> Run:
        """The loop ``iterations`` times in every program; counted from when all have done ``warm_up`` to the first end.

        Programs start staggered, by a part of what a lap takes without waiting for anyone.
        """
        alone = sum(max(step.instruction.stall, 1) for step in self.steps) + self.latency
        for warp in range(self.warps * self.programs):
            start = alone * (warp // self.warps) / self.programs
            self.issued_at[warp] = start
            heapq.heappush(self.queue, (start, 0.0, warp))
        begin = None
        for time, warp in self._laps(None):
            if begin is None:
                if min(self.laps) >= warm_up:
                    begin = (time, sum(self.laps), self._counters())
            elif self.laps[warp] >= iterations:
                return self._summary(begin, time)
        raise ValueError("the loop has no end")

    def run_once(self, marks: Container[int] = ()) -> float:
        """Cycles until all programs, started together, have done it once; ``passed`` is when all were at ``marks``."""
        self.marks = marks
        for warp in range(self.warps * self.programs):
            heapq.heappush(self.queue, (0.0, 0.0, warp))
        return max(time for time, _ in self._laps(1)) + 1

    def _laps(self, limit: int | None) -> Iterator[tuple[float, int]]:
        """Yields the time and the warp whenever one has finished a lap, until all have done ``limit`` of them."""
        last = len(self.steps) - 1
        while self.queue:
            time, _, warp = heapq.heappop(self.queue)
            scheduler = warp % hopper.SCHEDULERS
            step = self.steps[self.position[warp]]
            possible = self._possible(step, scheduler)
            if possible > time:
                heapq.heappush(self.queue, (possible, self.issued_at[warp], warp))
                continue
            if self.position[warp] in self.marks:
                self.passed[self.position[warp]] = time
            stays = self._issue(step, warp, scheduler, time)
            done = self.position[warp] == last
            self.position[warp] = 0 if done else self.position[warp] + 1
            if done:
                self.laps[warp] += 1
                yield time, warp
            if stays and not (done and self.laps[warp] == limit):
                self._schedule(warp, time + max(step.instruction.stall, 1), "fixed latency")

    def _possible(self, step: Step, scheduler: int) -> float:
        """When the scheduler and a unit could take it."""
        free = self.unit_free[scheduler]
        unit = min(free[unit] for unit in step.units) if len(step.units) > 1 else free[step.units[0]]
        if step.units[0] == MEMORY:
            unit -= (hopper.MEMORY_QUEUE - 1) * hopper.MEMORY_CYCLES
            if step.kind == "store":
                unit = max(unit, self.memory_free - STORES_IN_FLIGHT / self.bytes_per_cycle)
        return max(unit, self.scheduler_free[scheduler])

    def _issue(self, step: Step, warp: int, scheduler: int, time: float) -> bool:
        """Issues it; False if the warp now waits for others."""
        instruction = step.instruction
        self.scheduler_free[scheduler] = time + 1
        self.unit_busy[scheduler][ISSUE] += 1
        self.waits["issuing"] += 1
        if time > self.arrived_at[warp]:
            self.waits["unit or scheduler busy"] += time - self.arrived_at[warp]
        self.issued_at[warp] = time
        free = self.unit_free[scheduler]
        unit = min(step.units, key=free.__getitem__)
        start = max(time, free[unit], self.shared_free if unit == MEMORY else 0)
        free[unit] = start + step.busy
        if unit != ISSUE:
            self.unit_busy[scheduler][unit] += step.busy
        done, cause = start + step.latency, "special unit"
        if unit == MEMORY:
            self.shared_free = start + step.shared_cycles
            self.shared_busy += step.shared_cycles
            done, cause = self.shared_free - 1 + step.latency, "shared memory"
            if step.memory_bytes:
                done, cause = self._access(step, start), "device memory"
                if step.kind == "copy":
                    self.newest_copy[warp] = max(self.newest_copy[warp], done)
        elif step.kind == "commit":
            done, cause = self.newest_copy[warp], "device memory"
            self.groups[warp].append(done)
        if instruction.write is not None:
            self._hold(warp, instruction.write, done, cause)
        if instruction.read is not None:
            self._hold(warp, instruction.read, start + hopper.OPERANDS_READ, "operands to be read")
        return step.kind != "barrier" or self._arrive(warp, time + step.latency)

    def _access(self, step: Step, time: float) -> float:
        """When device memory has done it."""
        begin = max(self.memory_free, time - BURST_BYTES / self.bytes_per_cycle)
        self.memory_free = begin + step.memory_bytes / self.bytes_per_cycle
        self.port_free = max(time, self.port_free) + step.memory_bytes / hopper.PORT_BYTES_PER_CYCLE
        self.memory_bytes += step.memory_bytes
        done = max(self.memory_free, self.port_free) + self.latency
        if step.kind != "store":
            self.flight += step.memory_bytes * (done - time)
        return done

    def _hold(self, warp: int, scoreboard: int, until: float, cause: str) -> None:
        if until > self.clear_at[warp][scoreboard]:
            self.clear_at[warp][scoreboard] = until
            self.clears[warp][scoreboard] = cause

    def _arrive(self, warp: int, release: float) -> bool:
        """At a barrier; the last warp releases the others."""
        waiting = self.arrived[warp // self.warps]
        waiting.append(warp)
        if len(waiting) == self.warps:
            for other in waiting:
                # The last one's own position has not moved yet.
                ahead = 1 if other == warp else 0
                self._schedule(other, release, "barrier", ahead)
            waiting.clear()
        return False

    def _schedule(self, warp: int, ready: float, cause: str, ahead: int = 0) -> None:
        """Puts the warp back in the queue for its next step, when nothing holds it back any more."""
        step = self.steps[(self.position[warp] + ahead) % len(self.steps)]
        self.waits[cause] += ready - self.issued_at[warp] - 1
        clear_at = self.clear_at[warp]
        for scoreboard in step.instruction.waits:
            if clear_at[scoreboard] > ready:
                self.waits[self.clears[warp][scoreboard]] += clear_at[scoreboard] - ready
                ready = clear_at[scoreboard]
        if step.kind == "wait":
            groups = self.groups[warp]
            if len(groups) > step.groups and groups[-1 - step.groups] > ready:
                self.waits["device memory"] += groups[-1 - step.groups] - ready
                ready = groups[-1 - step.groups]
        self.arrived_at[warp] = ready
        heapq.heappush(self.queue, (ready, self.issued_at[warp], warp))

    def _counters(self) -> tuple:
        return (
            [list(busy) for busy in self.unit_busy], self.shared_busy, self.memory_bytes, self.flight,
            self.waits.copy(),
        )  # fmt: skip

    def _summary(self, begin: tuple, time: float) -> Run:
        begin_time, begin_laps, (units, shared, memory_bytes, flight, waits) = begin
        elapsed = time - begin_time
        laps = (sum(self.laps) - begin_laps) / (self.warps * self.programs)
        busy = {
            name: max(self.unit_busy[s][u] - units[s][u] for s in range(hopper.SCHEDULERS)) / elapsed
            for u, name in enumerate(UNITS)
        }
        busy["fma"] = (busy.pop(UNITS[HEAVY]) + busy.pop(UNITS[LITE])) / 2
        busy["shared memory"] = max((self.shared_busy - shared) / elapsed, busy.pop("memory"))
        busy["memory bandwidth"] = (self.memory_bytes - memory_bytes) / elapsed / self.bytes_per_cycle
        spent = self.waits - waits
        total = sum(spent.values())
        shares = {cause: value / total for cause, value in spent.most_common()}
        return Run(elapsed / laps, busy, shares, (self.flight - flight) / elapsed)
