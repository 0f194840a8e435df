"""What the model of one multiprocessor says of a whole H100: the share of its memory ceiling that a kernel reaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sass import hopper
from sass.compilation import Compiled
from sass.launches import Specialisation
from sass.machine import NEXT_PROGRAM, Step, steps_of
from sass.paths import heaviest_way
from sass.simulate import BYTES_PER_CYCLE, Multiprocessor, Run

ITERATIONS, WARM_UP = 28, 8
BUSY = 0.9
"""A unit that works for this share of the time is what limits a kernel."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A loop on all multiprocessors.

    Attributes:
        programs: Resident on one multiprocessor.
        cycles: Of an iteration of one program.
        share: Of the memory ceiling (``hopper.BANDWIDTH``).
        codes_per_second: On the whole device.
        limit: The unit that is busy, or what the warps wait for longest.
        run: The simulation behind it.
    """

    programs: int
    cycles: float
    share: float
    codes_per_second: float
    limit: str
    run: Run


def resident_programs(registers: int, shared_bytes: int, warps: int) -> int:
    """Programs that fit on a multiprocessor; registers are given out to threads in steps of 8."""
    each = -(-registers // hopper.REGISTER_STEP) * hopper.REGISTER_STEP * hopper.LANES_PER_WARP * warps
    shared = -(-(shared_bytes + hopper.SHARED_PER_PROGRAM) // hopper.SHARED_STEP) * hopper.SHARED_STEP
    return min(hopper.REGISTERS // each, hopper.SHARED_BYTES // shared, hopper.WARPS // warps, hopper.PROGRAMS)


def predict(compiled: Compiled, item: Specialisation, latency_ns: float) -> Prediction:
    """The innermost loop of a compiled launch, in steady state, with as many programs as fit.

    Without a loop, one program after the other.
    """
    assert compiled.program is not None
    warps = item.options["num_warps"]
    moved = {"read": item.codes * item.read / warps, "written": item.codes * item.written / warps}
    if compiled.program.loop():
        steps = steps_of(compiled.program.body(), **moved)
    else:
        steps = [*steps_of(heaviest_way(compiled.program).instructions, **moved), NEXT_PROGRAM]
    programs = resident_programs(compiled.registers, compiled.shared_bytes, warps)
    return predict_loop(steps, warps, programs, latency_ns, item.codes * item.bytes_per_code, item.codes)


def microseconds(compiled: Compiled, item: Specialisation, latency_ns: float) -> float:
    """One program alone on a multiprocessor, from its first to its last instruction; a loop runs once."""
    assert compiled.program is not None
    steps = steps_of(heaviest_way(compiled.program).instructions)
    cycles = Multiprocessor(steps, item.options["num_warps"], 1, latency_ns * 1e-9 * hopper.CLOCK).run_once()
    return cycles / hopper.CLOCK * 1e6


def predict_loop(
    steps: Sequence[Step], warps: int, programs: int, latency_ns: float, needed_bytes: float, codes: int = 0
) -> Prediction:
    """A loop whose iteration, in each of ``programs`` programs, needs ``needed_bytes`` of device memory."""
    run = Multiprocessor(steps, warps, programs, latency_ns * 1e-9 * hopper.CLOCK).run(ITERATIONS, WARM_UP)
    # A burst at the beginning may be ahead of its share; in the long run nothing is.
    cycles = max(run.cycles, needed_bytes * programs / BYTES_PER_CYCLE)
    per_second = programs * hopper.PROCESSORS * hopper.CLOCK / cycles
    busiest = max(run.busy, key=run.busy.__getitem__)
    cause = next(name for name in run.waits if name != "issuing")
    limit = busiest if run.busy[busiest] >= BUSY else f"waits for {cause}"
    return Prediction(
        programs, cycles, needed_bytes * per_second / hopper.BANDWIDTH, codes * per_second, limit, run
    )  # fmt: skip
