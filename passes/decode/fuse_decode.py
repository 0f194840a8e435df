"""Replaces dequantize-then-attend by one ``innerq::decode_attention`` that reads the packed codes."""

from __future__ import annotations

from torch import fx

from innerq_compile import ops
from innerq_compile.passes.decode.match import DecodeSite
from innerq_compile.passes.graph import value_of


def fuse_decode(graph: fx.Graph, site: DecodeSite, *, exact: bool) -> fx.Node:
    """Rewrites one site in place and erases what it leaves dead.

    The fused op stands where the attention stood, so it reads the cache after everything that the attention was to see.

    Args:
        exact: Forbids a kernel to round queries and probabilities (on a CPU to integers, on a GPU to float16).

    Returns:
        The fused node, with the attention's users and metadata.
    """
    with graph.inserting_before(site.attention):
        fused = graph.call_function(
            ops.decode_attention,
            (site.query, *site.state, site.mask, site.sm_scale, site.capacity, site.spec, exact),
        )
    fused.meta = dict(site.attention.meta)
    site.attention.replace_all_uses_with(_like(site, fused))
    for node in (site.attention, *reversed(site.dead), site.dequantize):
        graph.erase_node(node)
    return fused


def _like(site: DecodeSite, fused: fx.Node) -> fx.Node:
    """``fused`` in the dtype of the attention it replaces: ``torch.autocast`` casts the operands of one of its own."""
    query, result = value_of(site.query), value_of(site.attention)
    if getattr(result, "dtype", query.dtype) == query.dtype:
        return fused
    with fused.graph.inserting_after(fused):
        cast = fused.graph.call_method("to", (fused, result.dtype))
    cast.meta, fused.meta["example_value"] = dict(fused.meta), query
    return cast
