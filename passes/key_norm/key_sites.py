"""Finds the keys and queries of every attention of a graph, before they reach a cache and before heads are repeated."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

from torch import fx

from innerq_compile import ops
from innerq_compile.passes.graph import AttentionCall, base_name, module_path, read_attention, repeats_heads

CACHE_WRITES = frozenset({"append_kv", "index_copy", "index_copy_", "cat"})
"""Ops that put new keys into a cache: what comes out is that cache, and goes on as keys."""

CHECKS = frozenset({"_assert_tensor_metadata"})
"""Ops that torch.export writes beside a value and that compute nothing."""


@dataclasses.dataclass(frozen=True)
class KeySite:
    """One attention, seen from the side of its scores.

    Attributes:
        path: Module path of the layer.
        key: The new keys [B, Hk, T, D], one head per KV head where the graph repeats them later.
        query: The queries [B, Hq, T, D].
        attention: The attention node.
    """

    path: str
    key: fx.Node
    query: fx.Node
    attention: fx.Node

    def misuse(self, sites: list[KeySite]) -> str:
        """Who else reads the keys or queries than attentions in their place and caches; empty if nobody does."""
        if base_name(self.key) in {"new_empty", "empty"}:
            return "the keys are assembled in place, as latent attention does from what it caches instead"
        keys, queries = {site.key for site in sites}, {site.query for site in sites}
        for user, call in _consumers(self.key):
            if call is None and base_name(user) in {*CACHE_WRITES, "output"}:
                continue
            if call is None or new_keys(call.key) not in keys or new_keys(call.value) is self.key:
                return f"the keys also go to {base_name(user)}"
        for user, call in _consumers(self.query):
            if call is None or _before_repeats(call.query) not in queries:
                return f"the queries also go to {base_name(user)}"
        return ""


def key_sites(graph: fx.Graph) -> list[KeySite]:
    """Every ``scaled_dot_product_attention`` of a graph, in graph order."""
    sites = []
    for node in graph.nodes:
        call = read_attention(node)
        if call is not None:
            query = _before_repeats(call.query)
            sites.append(KeySite(module_path(node), new_keys(call.key), query, node))
    return sites


def new_keys(key: fx.Node) -> fx.Node:
    """The keys of this call alone: what stands before the repetition of heads and before the cache."""
    node = _before_repeats(key)
    if node.target is operator.getitem and node.args[0].target is ops.dequantize_kv:  # type: ignore[union-attr]
        appends = [user for user in node.args[0].args[0].users if user.target is ops.append_kv]  # type: ignore[union-attr]
        return _before_repeats(appends[-1].args[node.args[1]]) if appends else node  # type: ignore[arg-type,index]
    if node.op == "placeholder":
        writes = [user for user in node.users if user.target == "index_copy_" and user.args[0] is node]
        return _before_repeats(writes[-1].args[3]) if writes else node  # type: ignore[arg-type]
    name, (base, *rest) = base_name(node), node.args or (None,)
    if name == "index_copy" and isinstance(base, fx.Node) and _root(base).op == "placeholder":
        return _before_repeats(rest[2])  # type: ignore[arg-type]
    if name == "cat" and isinstance(base, list | tuple) and len(base) == 2 and _is_cached(base[0]):
        return _before_repeats(base[1])  # type: ignore[arg-type]
    return node


def _is_cached(past: object) -> bool:
    return isinstance(past, fx.Node) and _root(past).op in {"placeholder", "get_attr"}


def _root(node: fx.Node) -> fx.Node:
    while node.op not in {"placeholder", "get_attr"} and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _before_repeats(node: fx.Node) -> fx.Node:
    while node.op in {"call_function", "call_method"} and node.args and repeats_heads(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _consumers(node: fx.Node) -> Iterator[tuple[fx.Node, AttentionCall | None]]:
    """Who reads a tensor of heads, behind its repetitions; with the call where it is an attention."""
    for user in node.users:
        if base_name(user) in CHECKS:
            continue
        if user.args and user.args[0] is node and repeats_heads(user):
            yield from _consumers(user)
        else:
            yield user, read_attention(user)
