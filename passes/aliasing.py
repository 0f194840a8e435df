"""Who may write into a buffer between two points of a graph. Errs on the side of seeing a write."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import fx

_VIEWS = frozenset(
    {"alias", "chunk", "detach", "expand", "flatten", "getitem", "narrow", "permute", "reshape", "select", "slice"}
    | {"split", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"}
)


def first_mutation(
    buffers: Iterable[fx.Node], *, after: fx.Node, before: fx.Node, ignoring: Container[fx.Node] = ()
) -> fx.Node | None:
    """The first node strictly between two nodes that may write into the storage of one of ``buffers``.

    Nodes in ``ignoring`` are known not to.
    """
    roots = {_root(buffer) for buffer in buffers}
    node = after.next
    while node is not before:
        if node not in ignoring and _may_write(node) and roots & {_root(argument) for argument in node.all_input_nodes}:
            return node
        node = node.next
    return None


def _may_write(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.op in {"call_function", "call_module"} and not _is_view(node)


def _root(node: fx.Node) -> fx.Node:
    """The node whose storage a chain of views shares; a fresh result is its own root."""
    while _is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_view(node: fx.Node) -> bool:
    if node.op not in {"call_method", "call_function"} or not node.args:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).split(".")[0] in _VIEWS
