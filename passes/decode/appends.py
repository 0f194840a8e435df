"""Finds where a graph appends to caches, for the check of their room before it runs; changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from innerq_compile import ops
from innerq_compile.cache.overflow import Append
from innerq_compile.numerics.layout import LayerState
from innerq_compile.passes.graph import module_path

_COUNTS = 2 + LayerState._fields.index("counts")  # behind the keys and the values


def find_appends(graph: fx.Graph) -> list[Append]:
    """The first append of every kind whose counts are an input of the graph.

    Appends of as many tokens to caches of one capacity are of a kind: the layers of a model take the same tokens.
    """
    inputs = list(graph.find_nodes(op="placeholder"))
    found: dict[tuple[str, str], Append] = {}
    for node in graph.find_nodes(op="call_function", target=ops.append_kv):
        arguments: tuple[Any, ...] = node.args
        counts, capacity = arguments[_COUNTS], _number(arguments[-2], inputs)
        if counts in inputs and capacity is not None:
            # A number of tokens that no input says is not announced: such a call is told by the next one.
            num_new = _number(arguments[0].meta["example_value"].shape[2], inputs) or 0
            append = Append(inputs.index(counts), num_new, capacity, module_path(node))
            found.setdefault((str(num_new), str(capacity)), append)
    return list(found.values())


def _number(size: Any, inputs: list[fx.Node]) -> int | list[int] | None:
    """A size as it is, or the place of the input that says it; ``None`` if none does."""
    if isinstance(size, int):
        return size
    symbol = size.meta["example_value"] if isinstance(size, fx.Node) else size
    for place, node in enumerate(inputs):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.expr == symbol.node.expr:
            return [place]
    return None
