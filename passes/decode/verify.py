"""Checks what the rewriter promises, on the graph that it left. A failure here is our bug and stops the compilation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from innerq_compile import ops
from innerq_compile.passes.decode.match import DecodeSite, Refusal
from innerq_compile.passes.graph import value_of
from innerq_compile.passes.report import Report


class PassError(RuntimeError):
    """The rewritten graph breaks a promise of the passes."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"innerq_compile internal error at {path}: {problem}; options={{'fuse': False}} avoids it")


def verify(gm: fx.GraphModule, found: Sequence[DecodeSite | Refusal], report: Report) -> None:
    """Checks the graph after the rewrite.

    Raises:
        PassError: Names the site: nodes that should be gone, keys or values of cache length in full precision, counts
            that differ from the report.
    """
    gm.graph.lint()
    alive = set(gm.graph.nodes)
    sites = [item for item in found if isinstance(item, DecodeSite)]
    kept = {item.node for item in found if isinstance(item, Refusal) and item.node.target is ops.dequantize_kv}
    for site in sites:
        survivors = [node for node in (site.dequantize, *site.dead, site.attention) if node in alive]
        if survivors:
            raise PassError(site.path, f"{survivors} survived the rewrite")
        for node in _derived(site.state, stop=kept):
            if _is_whole_cache(node, site):
                raise PassError(site.path, f"{node} holds the cache in full precision")
    fused = sum(node.target is ops.decode_attention for node in alive)
    dequantized = sum(node.target is ops.dequantize_kv for node in alive)
    if fused < report.rewritten or len(sites) != report.rewritten or dequantized != len(kept):
        raise PassError(
            "the graph",
            f"{fused} decode_attention and {dequantized} dequantize_kv nodes, report of {report.rewritten} rewritten "
            f"and {len(kept)} kept",
        )


def _derived(state: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Everything computed from the buffers, not looking behind an attention or a node of ``stop``."""
    derived: set[fx.Node] = set()
    front = list(state)
    while front:
        new = [node for node in front.pop().users if node not in stop | derived]
        derived.update(new)
        front += [node for node in new if node.target is not ops.decode_attention]
    return derived


def _is_whole_cache(node: fx.Node, site: DecodeSite) -> bool:
    """Whether a node computes a floating-point tensor [.., heads, capacity, head_dim]."""
    value, capacity = value_of(node), value_of(site.capacity)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    head_dim = value_of(site.query).shape[3]
    return value.dim() >= 4 and statically_known_true(value.shape[-2] == capacity) and value.shape[-1] == head_dim
