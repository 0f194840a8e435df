"""How long a whole call of decode attention would take: prologue, loop, merge, the last wave of programs, the combine.

One layer, batch 1, no mask; kernels only, without what it takes to launch them (a few microseconds each).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

from innerq_compile.kernels.triton.decode_attention import BLOCKS_AT_ONCE, combined_at_once, num_splits
from sass import hopper
from sass.compilation import TARGETS, Compiled, compile_for
from sass.launches import HEADS, Specialisation, attention
from sass.listing import Program
from sass.machine import steps_of
from sass.paths import Way, heaviest_way, without_idle_copies
from sass.predict import resident_programs
from sass.simulate import Multiprocessor

CONTEXTS = (1024, 4096, 8192, 32768, 131072)
WINDOWS = 32 + 128
"""Slots of the sink and the ring of the presets."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Microseconds of a call and of its parts.

    Attributes:
        splits: Programs that share the packed tokens of a head.
        before: Of one of them, until its loop begins.
        loop: Of its loop.
        after: From there to its end.
        last_wave: From the end of the first of them to the end of the last, which began later for want of room or had
            blocks left over to do.
        combine: Of the second kernel.
        floor: What reading the packed bytes takes at ``hopper.BANDWIDTH``.
    """

    splits: int
    before: float
    loop: float
    after: float
    last_wave: float
    combine: float
    floor: float

    @property
    def total(self) -> float:
        """Of both kernels."""
        return self.before + self.loop + self.after + self.last_wave + self.combine


class DecodeAttention:
    """The two kernels of a preset, compiled for Hopper, for 4 query heads per key-value head of 128 channels.

    Args:
        preset: Settings of the cache.
        latency_ns: Of device memory. What is read outside the loop (query, norms, counts) comes from the
            second-level cache, as does what the first kernel leaves to the second.
        options: Launch options of the first kernel to try instead of its own.
    """

    def __init__(self, preset: str, latency_ns: float, options: dict[str, int]) -> None:
        self.latency = latency_ns * 1e-9 * hopper.CLOCK
        packed, combine = attention(preset, preset=preset)
        self.packed = dataclasses.replace(packed, options=packed.options | options)
        self.combine = combine
        self.compiled = compile_for(self.packed, TARGETS["90"])

    def call(self, tokens: int) -> Call:
        """One step over ``tokens`` packed tokens and the windows."""
        blocks = tokens // 32
        splits = num_splits(HEADS, blocks, hopper.PROCESSORS)
        windows = -(-WINDOWS // (32 * BLOCKS_AT_ONCE))
        trips, left_over = divmod(math.ceil(blocks / BLOCKS_AT_ONCE), splits)
        room = resident_programs(self.compiled.registers, self.compiled.shared_bytes, self.packed.options["num_warps"])
        programs = min(room, -(-(splits + windows) * HEADS // hopper.PROCESSORS))
        before, loop, after = self._attend(programs, trips)
        # Few programs take what is left over, so each has a multiprocessor to itself for it.
        one_more = self._attend(1, trips + 1)[1] - self._attend(1, trips)[1]
        outside = self._attend(programs, 0)
        longer, usual = before + loop + one_more + after, before + loop + after
        durations = ([longer] * left_over + [usual] * (splits - left_over) + [sum(outside)] * windows) * HEADS
        end = schedule(durations, room * hopper.PROCESSORS)
        combine = self._merge(splits + windows)
        floor = 2 * HEADS * tokens * 128 * self.packed.read / hopper.BANDWIDTH * 1e6
        last_wave = max(0.0, end - usual)
        return Call(splits, before, loop, after, last_wave, combine, floor)

    def _attend(self, programs: int, trips: int) -> tuple[float, float, float]:
        """What :meth:`_times` returns, of the first kernel."""
        return self._times(self.packed, heaviest_way(_program(self.compiled), trips), programs, trips)

    def _merge(self, splits: int) -> float:
        """Microseconds of the second kernel."""
        at_once = combined_at_once(splits)
        item = dataclasses.replace(self.combine, arguments=self.combine.arguments | {"SPLITS": at_once})
        program = _program(compile_for(item, TARGETS["90"]))
        return sum(self._times(item, heaviest_way(program, -(-splits // at_once)), 1, 0))

    def _times(self, item: Specialisation, way: Way, programs: int, trips: int) -> tuple[float, float, float]:
        """Microseconds before, in and after the loop, with that many programs on a multiprocessor."""
        warps = item.options["num_warps"]
        first, last = way.loop
        every = range(len(way.instructions))
        in_cache = every if not item.codes else [*every[:first], *every[last:]]
        steps = steps_of(without_idle_copies(way), read=trips * item.codes * item.read / warps or None, cached=in_cache)
        machine = Multiprocessor(steps, warps, programs, self.latency)
        end = machine.run_once((first, last))
        begin, out = machine.passed[first], machine.passed[last]
        before, loop, after = (cycles / hopper.CLOCK * 1e6 for cycles in (begin, out - begin, end - out))
        return before, loop, after


def _program(compiled: Compiled) -> Program:
    assert compiled.program is not None
    return compiled.program


def schedule(durations: Sequence[float], room: int) -> float:
    """When the last program ends, if each starts in its turn as soon as there is room."""
    free = [0.0] * room
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)
