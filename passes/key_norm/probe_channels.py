"""Finds out with numbers which parameters reach which channels of keys or queries, whatever the ops in between.

What stands between the last scaling and the attention (reshapes, RoPE in any spelling, partial or whole, repetitions)
must be linear. So a channel depends on a slot exactly when it answers to a change of that slot alone. Asking slot by
slot would take thousands of evaluations; exciting random thirds of the slots answers for all of them in 192.
"""

from __future__ import annotations

import torch
from torch import fx

from innerq_compile.passes.graph import base_name
from innerq_compile.passes.key_norm.trace_projections import Channels, FoldRefused
from innerq_compile.passes.key_norm.traced_graph import TracedGraph

NUM_PROBES = 192
DENSITY = 1 / 3
"""Group testing: a probe excites a third of the slots, and every slot excited while a channel stays silent is none of
that channel's. A channel never fails to answer to a slot of its own, so an error can only tie channels that need not
be. Beside a RoPE pair's own two slots a foreign one survives 192 probes with probability (1 - 1/3 * 4/9)**192 = 4e-14.
"""


def probe_channels(traced: TracedGraph, channels: Channels, free: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
    """Which slots reach which channels.

    Args:
        traced: The graph.
        channels: Keys or queries, with the scalings they come from.
        free: Values of everything outside that the region reads (RoPE tables, positions), several positions of them.

    Returns:
        Per scaling a bool matrix [H * D, slots].

    Raises:
        FoldRefused: The region is not linear.
    """
    probe = _Probe(traced, channels, free)
    probe.check_linear()
    counts = [scaling.num_slots for scaling in channels.scalings]
    active = torch.rand(NUM_PROBES, sum(counts), generator=probe.generator) < DENSITY
    answered = torch.stack([probe.answers(mask.split(counts)) for mask in active])
    foreign = active.T.float() @ (~answered).float() > 0  # [slots, channels]
    return [part.T for part in (~foreign).split(counts)]


def region_inputs(channels: Channels) -> list[fx.Node]:
    """What the region reads besides its scalings."""
    inside = {*channels.region, *(scaling.node for scaling in channels.scalings)}
    sources = {source for node in channels.region for source in node.all_input_nodes}
    return [source for source in sources if source not in inside]


class _Probe:
    def __init__(self, traced: TracedGraph, channels: Channels, free: dict[fx.Node, torch.Tensor]) -> None:
        self.traced, self.channels, self.free = traced, channels, free
        self.generator = torch.Generator().manual_seed(0)
        self.shapes = [free[scaling.node] for scaling in channels.scalings]

    def answers(self, masks: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Which channels [H * D] react, at any position, when the slots of ``masks`` are excited."""
        values = [
            value * mask[scaling.slots].to(value)
            for value, mask, scaling in zip(self.random(), masks, self.channels.scalings, strict=True)
        ]
        end = self.run(values)
        return (end != 0).any(2).any(0).flatten().cpu()

    def check_linear(self) -> None:
        """Compares f(0) with 0 and f(x - y) with f(x) - f(y)."""
        x, y = self.random(), self.random()
        zero = self.run([torch.zeros_like(a) for a in x])
        fx_, fy, both = self.run(x), self.run(y), self.run([a - b for a, b in zip(x, y, strict=True)])
        tolerance = 16 * torch.finfo(both.dtype).eps * float(fx_.abs().max() + fy.abs().max())
        if bool(zero.any()) or not float((both - (fx_ - fy)).abs().max()) <= tolerance:
            names = ", ".join(dict.fromkeys(base_name(node) for node in self.channels.region))
            raise FoldRefused(f"what stands between projection and attention is not linear: {names}")

    def random(self) -> list[torch.Tensor]:
        # At least 1/2 in magnitude: the product with a small sine must not vanish in 16 bit.
        noise = [torch.rand(value.shape, generator=self.generator) for value in self.shapes]
        return [((n - 0.5).sign() * (n + 0.5)).to(v) for n, v in zip(noise, self.shapes, strict=True)]

    def run(self, values: list[torch.Tensor]) -> torch.Tensor:
        nodes = [scaling.node for scaling in self.channels.scalings]
        return self.traced.evaluate([self.channels.end], {**self.free, **dict(zip(nodes, values, strict=True))})[0]
