"""Recognises attention over caches that are not ours. Nothing is rewritten; the report says what to change."""

from __future__ import annotations

from torch import fx

from innerq_compile import ops
from innerq_compile.passes.canonicalize import op_name, read_attention, repeats_heads, value_of
from innerq_compile.passes.match import module_path
from innerq_compile.report import LEFT, Report, SiteReport

GROWING = "DynamicCache: kept in 16 bits and copied by torch.cat at every step"
FIXED = "StaticCache: kept in 16 bits"
ADVICE = (
    "This model decodes from a cache of 16-bit numbers. For a quantized one change one line: call "
    "innerq_compile.enable(model) and leave past_key_values out, or pass past_key_values=InnerQCache(model.config). "
    "innerq_compile.explain(model) says which layers that serves."
)


def foreign_caches(graph: fx.Graph) -> Report:
    """Every attention over a cache that the graph extends itself, with the line to change as the report's note.

    A graph that reads our cache has nothing foreign: its 16-bit layers are the choice of our own cache.
    """
    if any(node.target in (ops.append_kv, ops.dequantize_kv, ops.decode_attention) for node in graph.nodes):
        return Report()
    sites = []
    for node in graph.nodes:
        call = read_attention(node)
        kind = _kind_of_cache(call.key) if call else None
        if kind:
            sites.append(SiteReport(module_path(node), LEFT, kind))
    return Report(tuple(sites), ADVICE if sites else "")


def _kind_of_cache(key: fx.Node) -> str | None:
    """What the keys of an attention are read from, ``None`` for keys that come from no cache."""
    while isinstance(key, fx.Node) and key.args and isinstance(key.args[0], fx.Node) and repeats_heads(key):
        key = key.args[0]
    if not isinstance(key, fx.Node):
        return None
    if _name(key) == "cat":
        parts = key.args[0]
        return GROWING if isinstance(parts, list | tuple) and len(parts) == 2 and _is_buffer(parts[0]) else None
    if _is_buffer(key) and any(_name(user) == "index_copy_" for user in key.users):
        return FIXED
    return None


def _name(node: fx.Node) -> str:
    return op_name(node).split(".")[-1]


def _is_buffer(node: object) -> bool:
    if not isinstance(node, fx.Node) or node.op not in {"placeholder", "get_attr"}:
        return False
    value = value_of(node)
    return value is not None and value.dim() == 4
