"""How long a whole call of decode attention would take: prologue, loop, merge, the last wave of programs, the combine.

One layer, batch 1, no mask; kernels only, without what it takes to launch them (a few microseconds each).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

from innerq_compile.kernels.triton.decode_attention import BLOCKS_AT_ONCE, COMBINED_AT_ONCE, num_splits
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
        last_wave: From the end of the first of them to the end of the last, for want of room.
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
        self.compiled, self.compiled_combine = (compile_for(item, TARGETS["90"]) for item in (self.packed, combine))

    def call(self, tokens: int) -> Call:
        """One step over ``tokens`` packed tokens and the windows."""
        blocks = tokens // 32
        splits = num_splits(HEADS, blocks, hopper.PROCESSORS)
        windows = -(-WINDOWS // (32 * BLOCKS_AT_ONCE))
        trips = math.ceil(blocks / splits / BLOCKS_AT_ONCE)
        room = resident_programs(self.compiled.registers, self.compiled.shared_bytes, self.packed.options["num_warps"])
        programs = min(room, -(-(splits + windows) * HEADS // hopper.PROCESSORS))
        way = heaviest_way(_program(self.compiled), trips)
        before, loop, after = self._times(self.packed, way, programs, trips)
        outside = self._times(self.packed, heaviest_way(_program(self.compiled), 0), programs, 0)
        durations = ([before + loop + after] * splits + [sum(outside)] * windows) * HEADS
        end = schedule(durations, room * hopper.PROCESSORS)
        merging = heaviest_way(_program(self.compiled_combine), -(-(splits + windows) // COMBINED_AT_ONCE))
        combine = sum(self._times(self.combine, merging, 1, 0))
        floor = 2 * HEADS * tokens * 128 * self.packed.read / hopper.BANDWIDTH * 1e6
        last_wave = max(0.0, end - before - loop - after)
        return Call(splits, before, loop, after, last_wave, combine, floor)

    def _times(self, item: Specialisation, way: Way, programs: int, trips: int) -> tuple[float, float, float]:
        """Microseconds before, in and after the loop, with that many programs on a multiprocessor."""
        warps = item.options["num_warps"]
        first, last = way.loop
        every = range(len(way.instructions))
        in_cache = every if item is self.combine else [*every[:first], *every[last:]]
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
