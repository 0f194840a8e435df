"""One reading for every dialect: Dynamo's methods and functions, and the ATen overloads of torch.export.

Nodes are left as they came, so that a refused site stays exactly as it was, and are *read* alike: the passes ask
:func:`op_name`, :func:`base_name`, :func:`read_attention` and :func:`repeats_heads` and never look at ``node.target``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from innerq_compile.compat.pytorch import OpOverload, assert_tensor_metadata, schema_of

ATTENTION = "scaled_dot_product_attention"

SAME = frozenset({"alias", "clone", "contiguous", "detach", "expand", "reshape", "slice", "to", "view"})
"""Ops that return their input unchanged whenever shape and dtype of the result are those of the input."""

ASSERTION = assert_tensor_metadata
"""What torch.export leaves before a cast: that the dtype is the one it saw."""

_FUNCTIONS = {
    getattr(owner, name): name
    for name in (*SAME, ATTENTION, "unsqueeze", "repeat_interleave", "transpose", "matmul", "index_copy")
    + ("add", "mul", "div", "softmax", "tanh", "cat", "dropout")
    for owner in (torch, F, torch.Tensor)
    if hasattr(owner, name)
}
_FUNCTIONS |= {operator.matmul: "matmul", operator.add: "add", operator.mul: "mul", operator.truediv: "div"}
_FUNCTIONS |= {operator.iadd: "add_", operator.imul: "mul_", operator.itruediv: "div_"}
_ATEN_NAMES = {"_to_copy": "to", "_unsafe_view": "view", "_softmax": "softmax"}


def op_name(node: fx.Node) -> str:
    """The dialect-free name of what a node does; an op that no pass cares for keeps a readable name of its own."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if isinstance(target, OpOverload):
        namespace, name = schema_of(target).name.split("::")
        return _ATEN_NAMES.get(name, name) if namespace == "aten" else f"{namespace}::{name}"
    if node.op == "call_function":
        # Only torch's own functions go by their bare name: a user's function called "reshape" may do anything.
        owner = getattr(target, "__module__", None) or "torch"
        return _FUNCTIONS.get(target) or f"{owner}.{getattr(target, '__name__', target)}"
    return node.op


def users_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that compute something from ``node``; what torch.export only asserts about it does not count."""
    return [user for user in node.users if user.target is not ASSERTION]


def value_of(node: Any) -> Any:
    """The fake tensor (or number) that a node stands for, ``None`` where the graph does not say."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node


def same_shape(shape: Any, expected: Any) -> bool:
    """Whether two shapes are known to be equal, without adding a guard."""
    return len(shape) == len(expected) and all(
        statically_known_true(a == b) for a, b in zip(shape, expected, strict=True)
    )


def repeats_heads(node: fx.Node) -> bool:
    """Whether a node is one step of repeating [B, H, N, D] to [B, H * n, N, D], head h becoming heads h*n .. h*n+n-1,
    or leaves the tensor as it is. Judged by the shapes that go in and come out, whatever the spelling.
    """
    source, result = value_of(node.args[0]), value_of(node)
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    if (source.dtype, source.device) != (result.dtype, result.device):
        return False
    name, before, after = op_name(node), source.shape, result.shape
    if same_shape(before, after):
        return name in SAME or _index_of(node) is not None
    if len(before) == 4 and len(after) == 5:  # [B, H, N, D] -> [B, H, 1, N, D]
        return _added_axis(node) == 2 and same_shape(after, (*before[:2], 1, *before[2:]))
    if len(before) == 5 and len(after) == 5:  # -> [B, H, n, N, D]
        return name == "expand" and same_shape((*before[:2], *before[3:]), (*after[:2], *after[3:]))
    if len(before) == 5 and len(after) == 4:  # -> [B, H * n, N, D]
        merged = (before[0], before[1] * before[2], *before[3:])
        return name in {"reshape", "view"} and same_shape(after, merged)
    if len(before) == 4 and len(after) == 4 and name == "repeat_interleave":
        arguments = {**dict(zip(("input", "repeats", "dim"), node.args, strict=False)), **node.kwargs}
        # A tensor of repeats may differ from head to head.
        return isinstance(arguments["repeats"], int) and same_shape((before[0], *before[2:]), (after[0], *after[2:]))
    return False


def _index_of(node: fx.Node) -> tuple[Any, ...] | None:
    """The index of ``x[...]`` if it only takes whole axes, keeps or adds some; ``None`` for every other node."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    whole = (slice(None), None, Ellipsis)
    index = node.args[1]
    return index if all(any(entry is w or entry == w for w in whole) for entry in index) else None


def _added_axis(node: fx.Node) -> int | None:
    """Where ``x.unsqueeze(i)`` or ``x[:, :, None]`` adds an axis to a 4-dimensional ``x``."""
    index = _index_of(node)
    if index is not None:
        return index.index(None) if index.count(None) == 1 and Ellipsis not in index[: index.index(None)] else None
    if op_name(node) != "unsqueeze":
        return None
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return axis + 5 if isinstance(axis, int) and axis < 0 else axis if isinstance(axis, int) else None


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """The arguments of a ``scaled_dot_product_attention``, however they were passed."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False


def read_attention(node: fx.Node) -> AttentionCall | None:
    """The call if ``node`` is a ``scaled_dot_product_attention``, else ``None``."""
    if op_name(node) != ATTENTION:
        return None
    names = [field.name for field in dataclasses.fields(AttentionCall)]
    arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return AttentionCall(**arguments)


def module_path(node: fx.Node) -> str:
    """Module path of the layer that a node came from, its name where the graph does not say."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("L['self']").removeprefix("L['fn']").strip(".") or node.name


def graph_order(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes in the order in which they stand in the graph."""
    chosen = set(nodes)
    return [node for node in graph.nodes if node in chosen]


def base_name(node: fx.Node) -> str:
    """What a node does, without the overload: ``mul`` for ``torch.mul``, ``x.mul`` and ``aten.mul.Tensor``."""
    if node.op not in {"call_function", "call_method"}:
        return node.op
    if isinstance(node.target, OpOverload):
        return schema_of(node.target).name.split("::")[-1]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
