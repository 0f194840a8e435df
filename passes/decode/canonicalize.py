"""Brings a graph's own ops to one spelling."""

from __future__ import annotations

from torch import fx

from innerq_compile.compat.pytorch import OpOverloadPacket
from innerq_compile.ops import NAMESPACE


def canonicalize(graph: fx.Graph) -> None:
    """Makes every ``torch.ops.innerq.x`` a ``torch.ops.innerq.x.default``, the form that the passes compare with."""
    for node in graph.nodes:
        if isinstance(node.target, OpOverloadPacket) and str(node.target).startswith(f"{NAMESPACE}."):
            node.target = node.target.default
