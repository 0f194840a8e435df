"""Recognises attention over a ``DynamicCache``. Nothing is rewritten; the report says what the user can change."""

from __future__ import annotations

from torch import fx

from innerq_compile.passes.graph import module_path, op_name, read_attention, repeats_heads, value_of
from innerq_compile.passes.report import LEFT, Report, SiteReport

GROWING = "DynamicCache: kept in 16 bits and copied by torch.cat at every step"
ADVICE = (
    "This model decodes from a cache of 16-bit numbers. For a quantized one change one line: call "
    "innerq_compile.enable(model) and leave past_key_values out, or pass past_key_values=InnerQCache(model.config). "
    "innerq_compile.explain(model) says which layers that serves."
)


def find_dynamic_caches(graph: fx.Graph) -> Report:
    """Every attention over keys that the graph itself concatenates, with the line to change as the report's note."""
    sites = []
    for node in graph.nodes:
        call = read_attention(node)
        if call is not None and _is_concatenated(call.key):
            sites.append(SiteReport(module_path(node), LEFT, GROWING))
    return Report(tuple(sites), ADVICE if sites else "")


def _is_concatenated(key: fx.Node) -> bool:
    """Whether keys are ``cat([past, new])`` with a 4-dimensional input of the graph as the past."""
    while isinstance(key, fx.Node) and key.args and isinstance(key.args[0], fx.Node) and repeats_heads(key):
        key = key.args[0]
    if not isinstance(key, fx.Node) or op_name(key).split(".")[-1] != "cat":
        return False
    parts = key.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return False
    past = value_of(parts[0]) if isinstance(parts[0], fx.Node) and parts[0].op == "placeholder" else None
    return past is not None and past.dim() == 4
