"""Walks from the keys or queries of an attention back to the last parameters that scale each of their channels.

That is a projection (rows of a ``linear``, columns of GPT-2's ``addmm``, the matching rows of a fused one), or the
weight of a norm where a model normalizes its heads after projecting them, plus every bias added on the way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from innerq_compile.passes.graph import SAME, base_name, graph_order, value_of
from innerq_compile.passes.key_norm.traced_graph import ACTIVATION, PARAMETER, TracedGraph
from innerq_compile.refused import Refused

CASTS = frozenset({*SAME, "float", "half", "bfloat16", "double", "type_as"}) - {"expand", "slice"}
TURNS = frozenset({"t", "transpose", "permute", "numpy_T", "mT", "T"})


class FoldRefused(Refused):
    """Why a key norm cannot be folded into a model; the model is as it was."""

    def __init__(self, reason: str) -> None:
        super().__init__("", reason)

    def __str__(self) -> str:
        """The reason alone."""
        return self.reason


@dataclasses.dataclass(frozen=True)
class ScaledParameter:
    """A parameter whose slices along ``axis`` (its elements, where ``axis`` is ``None``) each carry one slot.

    ``offset`` is a constant that the graph adds before the parameter scales anything: Gemma's ``1 + weight``.
    """

    node: fx.Node
    axis: int | None
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A place where parameters scale channels.

    Attributes:
        node: The node whose value is proportional, slot by slot, to the parameters.
        slots: int64, broadcastable to that value: which slot an element belongs to.
        parameters: Everything to be scaled along with a slot; slot i is the i-th slice of each.
    """

    node: fx.Node
    slots: torch.Tensor
    parameters: tuple[ScaledParameter, ...]

    @property
    def num_slots(self) -> int:
        """How many factors can be chosen here."""
        return int(self.slots.max()) + 1


@dataclasses.dataclass(frozen=True)
class Channels:
    """How the channels of ``end`` (keys or queries) come about.

    Attributes:
        end: [B, H, T, D].
        scalings: Where its channels were scaled last; every path from the model's inputs to ``end`` goes through one.
        region: The nodes in between, ``end`` included, in graph order.
    """

    end: fx.Node
    scalings: tuple[Scaling, ...]
    region: tuple[fx.Node, ...]


def trace_projections(traced: TracedGraph, kinds: dict[fx.Node, str], end: fx.Node) -> Channels:
    """Walks back from ``end``.

    Raises:
        FoldRefused: Naming what stands in the way.
    """
    scalings: dict[fx.Node, Scaling] = {}
    region: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if kinds[node] != ACTIVATION or node in region or node in scalings:
            continue
        scaling = _read_scaling(traced, kinds, node)
        if scaling is not None:
            scalings[node] = scaling
            continue
        _check_passable(kinds, node)
        region.add(node)
        stack.extend(node.all_input_nodes)
        bias = _added_parameter(traced, kinds, node)
        if bias is not None:
            scalings[bias.node] = bias
    if not scalings:
        raise FoldRefused("no projection found in front of the attention")
    return Channels(end, tuple(scalings.values()), tuple(graph_order(traced.gm.graph, region)))


def _read_scaling(traced: TracedGraph, kinds: dict[fx.Node, str], node: fx.Node) -> Scaling | None:
    """The node as a scaling: matrix product, product, or norm with parameters."""
    name, args = base_name(node), _arguments(node)
    if name == "linear":
        return _matrix(traced, kinds, node, args.get("weight"), args.get("bias"), axis=0)
    if name == "addmm" and not {"alpha", "beta"} & set(node.kwargs):
        return _matrix(traced, kinds, node, args.get("mat2"), args.get("input"), axis=1)
    if name in {"matmul", "mm", "__matmul__"} and len(node.args) == 2:
        return _matrix(traced, kinds, node, node.args[1], None, axis=1)
    if name in {"mul", "__mul__", "multiply"}:
        weights = [source for source in node.all_input_nodes if kinds[source] == PARAMETER]
        if len(weights) == 1 and len(node.all_input_nodes) == 2 and _value(traced, weights[0]).numel() > 1:
            return _vector(traced, node, weights[0])
    if name in {"layer_norm", "rms_norm"} and args.get("weight") is not None and kinds[args["weight"]] == PARAMETER:
        return _vector(traced, node, args["weight"], args.get("bias"))
    return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    names: dict[str, tuple[str, ...]] = {
        "linear": ("input", "weight", "bias"),
        "addmm": ("input", "mat1", "mat2"),
        "layer_norm": ("input", "normalized_shape", "weight", "bias"),
        "rms_norm": ("input", "normalized_shape", "weight"),
    }
    return dict(zip(names.get(base_name(node), ()), node.args, strict=False)) | node.kwargs


def _matrix(
    traced: TracedGraph, kinds: dict[fx.Node, str], node: fx.Node, weight: Any, bias: Any, axis: int
) -> Scaling | None:
    if kinds.get(weight) != PARAMETER:
        source = f"{value_of(weight).dtype} {weight}" if isinstance(value_of(weight), torch.Tensor) else str(weight)
        raise FoldRefused(f"the weight of {base_name(node)} is no parameter but {source}: quantized, or computed")
    scaled = [_resolve(traced, weight, axis)]
    if bias is not None:
        if kinds[bias] != PARAMETER:
            raise FoldRefused(f"the bias of {base_name(node)} is computed in the graph")
        scaled.append(_resolve(traced, bias, None))
    width = _value(traced, weight).shape[axis]
    if bias is not None and _value(traced, bias).numel() != width:
        raise FoldRefused(f"the bias of {base_name(node)} is broadcast")
    return Scaling(node, torch.arange(width), tuple(scaled))


def _vector(traced: TracedGraph, node: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> Scaling:
    value = _value(traced, weight)
    slots = torch.arange(value.numel()).view(value.shape)
    parameters = [_resolve(traced, source, None) for source in (weight, bias) if source is not None]
    return Scaling(node, slots, tuple(parameters))


def _added_parameter(traced: TracedGraph, kinds: dict[fx.Node, str], node: fx.Node) -> Scaling | None:
    if base_name(node) not in {"add", "__add__", "sub", "__sub__"}:
        return None
    added = [source for source in node.all_input_nodes if kinds[source] == PARAMETER]
    return _vector(traced, added[0], added[0]) if len(added) == 1 else None


def _resolve(traced: TracedGraph, node: fx.Node, axis: int | None) -> ScaledParameter:
    """Follows a weight through casts, transposes and an added constant to the parameter itself."""
    offset = 0.0
    while node not in traced.names:
        name, sources = base_name(node), node.all_input_nodes
        before, after = _value(traced, sources[0]), _value(traced, node)
        if name in TURNS and axis is not None and before.dim() == 2 and after.stride() == before.stride()[::-1]:
            axis = 1 - axis
        elif name in {"add", "__add__"} and len(sources) == 1 and axis is None and not node.kwargs:
            offset += next(float(number) for number in node.args if isinstance(number, int | float))
        elif name not in CASTS or (axis is not None and before.shape != after.shape) or before.numel() != after.numel():
            raise FoldRefused(f"a weight is computed in the graph by {name}")
        node = sources[0]
    tensor = traced.tensors[node]
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise FoldRefused(f"{traced.names[node]} is a {type(tensor).__name__}, not a plain tensor")
    if not tensor.is_floating_point():
        raise FoldRefused(f"{traced.names[node]} holds {tensor.dtype}: quantized")
    return ScaledParameter(node, axis, offset)


def _value(traced: TracedGraph, node: fx.Node) -> torch.Tensor:
    return traced.evaluate([node], {})[0]


def _check_passable(kinds: dict[fx.Node, str], node: fx.Node) -> None:
    name = base_name(node)
    if node.op not in {"call_function", "call_method"}:
        raise FoldRefused(f"{node.op} {node.target} stands between projection and attention")
    if name.endswith("_") and not name.endswith("__"):
        raise FoldRefused(f"{name} changes a tensor in place between projection and attention")
    if name == "embedding" and kinds[node] == ACTIVATION:
        raise FoldRefused("no projection found in front of the attention")
