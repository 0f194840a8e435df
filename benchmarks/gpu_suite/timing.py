"""Timing: contenders take turns, each as a graph of many calls on rotating buffers, between two events; medians."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_suite.errors import raise_if_lost
from gpu_suite.journal import TIMING

GRAPH_MS = 2.0
"""A graph is made of so many calls that the launch of the graph itself is lost in it."""

MOST_CALLS = 256
LEAD_CYCLES = 200_000
"""The GPU spins this long, about a tenth of a millisecond, before the clock starts: the host is then ahead of it, and
the launch of a graph is not part of its time."""

SLOW_MS = 40.0
"""A call as slow as this is timed a few times without a graph."""


@dataclasses.dataclass
class Contender:
    """One way to compute something.

    Attributes:
        call: Computes it on copy ``i % copies`` of its inputs.
        copies: Input sets that the calls go through, so many that none is in the cache when its turn comes again.
        bytes: What one call has to read (and write), for its bandwidth.
    """

    call: Callable[[int], Any]
    copies: int
    bytes: int


@dataclasses.dataclass
class Timing:
    """Median and quartiles of the time of one call, in microseconds, over some rounds."""

    us: float
    low: float
    high: float
    rounds: int
    graph: bool

    def row(self, size: int) -> dict[str, Any]:
        """The timing and, from the bytes that a call moves, its bandwidth."""
        return {
            "us": round(self.us, 3), "us_quartiles": [round(self.low, 3), round(self.high, 3)],
            "gb_per_s": round(size / self.us / 1e3, 1), "rounds": self.rounds, "graph": self.graph,
        }  # fmt: skip


def interleave(
    contenders: dict[str, Contender], device: torch.device, *, rounds: int = 11, failed: dict[str, str] | None = None,
    begin: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:  # fmt: skip
    """Times all contenders in turn, round after round.

    Args:
        failed: Gets the error of each contender that cannot be run; without it the first error is raised.
        begin: Told each contender that runs alone for the first time, then :data:`~gpu_suite.journal.TIMING`.
    """
    ready: dict[str, tuple[Callable[[], None], int, bool]] = {}
    for name, contender in contenders.items():
        begin(name)
        try:
            ready[name] = _prepare(contender, device)
        except Exception as error:
            raise_if_lost(error)
            if failed is None:
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:500]
    begin(TIMING)
    taken: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(rounds + 1):
        for name, (run, calls, _) in ready.items():
            us = _elapsed_ms(run, device) * 1e3 / calls
            if number:  # the first replay of a graph still uploads it
                taken[name].append(us)
    return {name: _timing(values, ready[name][2]) for name, values in taken.items()}


def copies_for(size: int, device: torch.device, l2: int, budget: float = math.inf) -> int:
    """Copies of an input of ``size`` bytes that a rotation needs to go past the cache twice over; 2 at least.

    Args:
        budget: Bytes that all copies together may take; at least one copy is always made.
    """
    wanted = max(2, math.ceil(2.2 * l2 / max(size, 1))) if device.type == "cuda" else 2
    return max(1, int(min(wanted, budget / max(size, 1), MOST_CALLS)))


def _timing(values: list[float], graph: bool) -> Timing:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Timing(statistics.median(values), quartiles[0], quartiles[2], len(values), graph)


def _prepare(contender: Contender, device: torch.device) -> tuple[Callable[[], None], int, bool]:
    """(a function that makes some calls, how many, whether they are a graph)."""
    call, copies = contender.call, contender.copies
    if device.type != "cuda":
        return (lambda: call(0)), 1, False
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for index in range(3):  # compiles, makes handles and plans, allocates workspaces
            call(index)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if min(_elapsed_ms(lambda: call(0), device), _elapsed_ms(lambda: call(1), device)) > SLOW_MS:
        return (lambda: call(0)), 1, False
    # A call by itself is mostly the host's work: how long one takes is read off a first, short graph.
    graph = _graph(call, copies)
    graph.replay()
    one = _elapsed_ms(graph.replay, device) / copies
    calls = math.ceil(GRAPH_MS / max(one, 1e-3) / copies) * copies
    calls = max(copies, min(calls, MOST_CALLS // copies * copies))
    return (graph if calls == copies else _graph(call, calls)).replay, calls, True


def _graph(call: Callable[[int], Any], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    return graph


def _elapsed_ms(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(LEAD_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
