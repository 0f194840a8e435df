"""Times: contenders take turns, each a CUDA graph that ``do_bench`` times with a cold cache. Errors: from float64."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu.section import Section

Call = Callable[[], Any]
ROUNDS, WARM_UP_MS, ROUND_MS = 3, 2, 20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median and quartiles of all calls of all rounds, in microseconds."""

    us: float
    quartiles: tuple[float, float]
    calls: int

    def row(self, size: int) -> dict[str, Any]:
        """The timing, and the bandwidth of ``size`` bytes in that time."""
        found = {"us": round(self.us, 3), "us_quartiles": [round(x, 3) for x in self.quartiles], "calls": self.calls}
        return found | {"bytes": size, "gb_per_s": round(size / self.us / 1e3, 1)}


def interleaved(section: Section, calls: dict[str, Call]) -> dict[str, Timing]:
    """Times all calls in turn, round after round; one that cannot be captured is a row of ``failed``."""
    graphs: dict[str, Call] = {}
    for name, call in calls.items():
        with section.attempt(way=name):
            graphs[name] = call if section.dry else captured(call)
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(1 if section.dry else ROUNDS):
        for name, graph in graphs.items():
            taken[name] += milliseconds(graph, section.dry)
    return {name: _timing([1e3 * ms for ms in found]) for name, found in taken.items()}


def captured(call: Call) -> Call:
    """Replays a CUDA graph of one call; the calls before it compile, make handles and plans, allocate workspaces."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(call: Call, dry: bool) -> list[float]:
    """Of every call in one contender's turn."""
    if not dry:
        from triton.testing import do_bench

        return do_bench(call, warmup=WARM_UP_MS, rep=ROUND_MS, return_mode="all")
    began = time.perf_counter()
    call()
    return [1e3 * (time.perf_counter() - began)]


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return Timing(median, (low, high), len(values))


@dataclasses.dataclass(frozen=True)
class Checked:
    """Relative error in the 2-norm, and how large it may be: twice what the same rounding costs in plain torch."""

    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Within the budget; false for NaN."""
        return self.error <= self.budget


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """``|got - wanted| / |wanted|`` over all numbers."""
    return float((got.double() - wanted).norm() / wanted.norm())


def attention64(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rounded: torch.dtype) -> torch.Tensor:
    """``softmax(q K^T / sqrt(D)) V`` in float64, queries and weights (at most 1) rounded to a dtype.

    Args:
        query: [B, Hq, M, D]; keys, values: [B, H, N, D].
    """
    q = query.to(rounded).double().reshape(*keys.shape[:2], -1, keys.shape[3])
    scores = q @ keys.double().transpose(2, 3) * keys.shape[3] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights.to(rounded).double() @ values.double() / weights.sum(-1, keepdim=True)).reshape(query.shape)


def check_attention(out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Checked:
    """Error of attention whose queries and weights may be rounded to 16 bits, as kernels for matrix units have to.

    Scores are summed in float32, and an error of a score is a relative error of its weight.
    """
    wanted = attention64(query, keys, values, torch.float64)
    own = torch.float16 if query.dtype == torch.float32 else query.dtype
    largest = float(query.double().norm(dim=-1).amax() * keys.double().norm(dim=-1).amax()) * keys.shape[3] ** -0.5
    in_float32 = torch.finfo(torch.float32).eps * max(1.0, largest)
    rounding = relative(attention64(query, keys, values, own), wanted)
    return Checked(relative(out, wanted), 2 * (rounding + torch.finfo(own).eps + in_float32))
