"""Finds every place where a layer attends to its quantized cache and says whether it can be rewritten, or why not.

The anchor is ``innerq::dequantize_kv``, an op of our own. From its two results the matcher walks forward: nothing but
the repetition of heads may stand between them and one ``scaled_dot_product_attention``, which must mean what
``innerq::decode_attention`` means. Whatever else it meets becomes a :class:`Refusal`; the graph is not touched.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from innerq_compile import ops
from innerq_compile.config import InnerQConfig
from innerq_compile.passes.aliasing import first_mutation
from innerq_compile.passes.canonicalize import (
    ATTENTION,
    AttentionCall,
    op_name,
    read_attention,
    repeats_heads,
    value_of,
)
from innerq_compile.report import LEFT, REFUSED


@dataclasses.dataclass(frozen=True)
class DecodeSite:
    """An attention over a dequantized cache that may read the packed codes instead.

    Attributes:
        path: Module path of the layer.
        dequantize: The ``dequantize_kv`` node.
        views: Its two results and their repetitions over the query heads: dead after the rewrite.
        attention: The attention node, where the fused op takes its place.
        query, mask: Arguments of the attention, [B, Hq, q_len, D] and broadcastable to [B, Hq, q_len, capacity].
        state: The layer's buffers, in the order of :class:`~innerq_compile.layout.LayerState`.
        sm_scale: Softmax scale.
        capacity: Slots of the cache: a number, or a node where it is symbolic.
        spec: The settings, as the ops carry them.
    """

    path: str
    dequantize: fx.Node
    views: tuple[fx.Node, ...]
    attention: fx.Node
    query: fx.Node
    state: tuple[fx.Node, ...]
    mask: fx.Node
    sm_scale: float
    capacity: fx.Node | int
    spec: str


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A site that stays as it is.

    Attributes:
        path: Module path of the layer.
        node: Its ``dequantize_kv``, or the ``append_kv`` of a prefill.
        reason: Why.
        status: ``"refused"``, or ``"left"`` where attending to exact keys is what the cache asked for.
    """

    path: str
    node: fx.Node
    reason: str
    status: str = REFUSED


class _Mismatch(Exception):  # noqa: N818  never leaves this file: how a check deep in the walk says why it stops
    def __init__(self, reason: str, status: str = REFUSED) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


def match(graph: fx.Graph) -> list[DecodeSite | Refusal]:
    """Every site of a graph, in graph order."""
    found: list[DecodeSite | Refusal] = []
    read = {node.args[0] for node in graph.nodes if node.target in (ops.dequantize_kv, ops.decode_attention)}
    read |= {node.args[1] for node in graph.nodes if node.target is ops.decode_attention}
    for node in graph.nodes:
        if node.target is ops.dequantize_kv:
            found.append(_match_site(node))
        elif node.target is ops.append_kv and node.args[2] not in read:
            found.append(Refusal(module_path(node), node, "prefill: attends to its own exact keys and values", LEFT))
    return found


def module_path(node: fx.Node) -> str:
    """Module path of the layer that a node came from, its name where the graph does not say."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("L['self']").removeprefix("L['fn']").strip(".") or node.name


def _match_site(dequantize: fx.Node) -> DecodeSite | Refusal:
    path = module_path(dequantize)
    arguments: tuple[Any, ...] = dequantize.args
    *buffers, capacity, spec = arguments
    try:
        keys, values = _results(dequantize)
        key_views, attention, call = _walk_to_attention(keys, "keys", spec)
        value_views, value_attention, _ = _walk_to_attention(values, "values", spec)
        if attention is not value_attention:
            raise _Mismatch("keys and values go to different attentions")
        if call.key is not key_views[-1] or call.value is not value_views[-1]:
            raise _Mismatch("keys and values of the cache do not stand as keys and values of the attention")
        site = DecodeSite(
            path=path,
            dequantize=dequantize,
            views=(*key_views, *value_views),
            attention=attention,
            query=call.query,
            state=tuple(buffers),
            mask=call.attn_mask,
            sm_scale=_sm_scale(call),
            capacity=capacity,
            spec=spec,
        )
        _check_call(call, site.views)
        _check_shapes(site, call)
        mutation = first_mutation(site.state, after=dequantize, before=attention)
        if mutation is not None:
            raise _Mismatch(f"{op_name(mutation)} changes the cache between its read and the attention")
    except _Mismatch as mismatch:
        return Refusal(path, dequantize, mismatch.reason, mismatch.status)
    return site


def _results(dequantize: fx.Node) -> tuple[fx.Node, fx.Node]:
    taken = [user.args[1] for user in dequantize.users if user.target is operator.getitem]
    if len(taken) != len(dequantize.users) or sorted(taken, key=str) != [0, 1]:
        raise _Mismatch("keys and values are not each taken exactly once from dequantize_kv")
    keys, values = sorted(dequantize.users, key=lambda user: user.args[1])  # type: ignore[arg-type,return-value]
    return keys, values


def _walk_to_attention(first: fx.Node, which: str, spec: str) -> tuple[list[fx.Node], fx.Node, AttentionCall]:
    """The views of ``first`` up to the attention, that attention, and its arguments."""
    views = [first]
    while True:
        node = views[-1]
        if len(node.users) != 1:
            count = "no user" if not node.users else "a second user"
            raise _Mismatch(f"{which} have {count}: {', '.join(map(op_name, node.users)) or 'none'}")
        [user] = node.users
        call = read_attention(user)
        if call is not None:
            return views, user, call
        if not user.args or user.args[0] is not node or not repeats_heads(user):
            raise _foreign_op(user, which, spec)
        views.append(user)


def _foreign_op(node: fx.Node, which: str, spec: str) -> _Mismatch:
    name = op_name(node)
    if name == "index_copy" and len(node.args) > 3:
        longest = InnerQConfig.from_spec(spec).max_fused_q_len
        return _Mismatch(f"chunk of more than {longest} query tokens: attends through SDPA", LEFT)
    if name.split(".")[-1] in {"matmul", "transpose", "einsum", "bmm"}:
        return _Mismatch(
            f"{which} go to {name}: attention is spelled out instead of {ATTENTION}; "
            'load the model with attn_implementation="sdpa"'
        )
    return _Mismatch(f"{name} stands between dequantize_kv and the attention ({which})")


def _sm_scale(call: AttentionCall) -> float:
    if call.scale is None:
        return 1.0 / math.sqrt(_shape_of(call.query, "query")[-1])
    if not isinstance(call.scale, int | float):
        raise _Mismatch("the softmax scale is computed in the graph")
    return float(call.scale)


def _check_call(call: AttentionCall, views: tuple[fx.Node, ...]) -> None:
    if call.query in views or call.attn_mask in views:
        raise _Mismatch("the cache is also the query or the mask of its attention")
    if call.dropout_p != 0.0:
        raise _Mismatch(f"dropout_p = {call.dropout_p}")
    if call.is_causal is not False:
        raise _Mismatch("is_causal: a decode step needs an explicit mask")
    if call.attn_mask is None:
        raise _Mismatch("no mask: empty slots of the cache would be attended")


def _check_shapes(site: DecodeSite, call: AttentionCall) -> None:
    query, mask = _shape_of(call.query, "query"), _shape_of(call.attn_mask, "mask")
    keys, key_heads = _shape_of(site.views[0], "keys"), _shape_of(call.key, "keys")[1]
    if value_of(call.query).requires_grad or value_of(call.attn_mask).requires_grad:
        raise _Mismatch("query or mask need a gradient; decode under torch.no_grad() or torch.inference_mode()")
    if value_of(call.query).dtype != value_of(call.key).dtype:
        raise _Mismatch(f"query of {value_of(call.query).dtype}, keys of {value_of(call.key).dtype}")
    if len(query) != 4 or not statically_known_true(query[0] == keys[0]) or query[3] != keys[3]:
        raise _Mismatch(f"query of shape {tuple(query)} does not fit keys of shape {tuple(keys)}")
    if query[1] % keys[1]:
        raise _Mismatch(f"{query[1]} query heads are not a multiple of {keys[1]} key-value heads")
    if key_heads != query[1] and not call.enable_gqa and key_heads != 1:
        raise _Mismatch(f"{query[1]} query heads meet {key_heads} key-value heads without enable_gqa")
    longest = InnerQConfig.from_spec(site.spec).max_fused_q_len
    if not statically_known_true(query[2] <= longest):
        raise _Mismatch(f"chunk of more than {longest} query tokens: attends through SDPA", LEFT)
    wanted = (*query[:3], keys[2])
    offset = len(wanted) - len(mask)
    if offset < 0 or not all(
        statically_known_true(m == 1) or statically_known_true(m == w)
        for m, w in zip(mask, wanted[offset:], strict=True)
    ):
        raise _Mismatch(f"mask of shape {tuple(mask)} does not broadcast to {tuple(wanted)}")


def _shape_of(node: Any, which: str) -> torch.Size:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        raise _Mismatch(f"the shape of the {which} is unknown")
    return value.shape
