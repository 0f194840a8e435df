"""Finds every place where a layer attends to its quantized cache and says whether it can be rewritten, or why not.

The anchor is ``innerq::dequantize_kv``, an op of our own. From its two results the matcher walks forward: nothing but
the repetition of heads may stand between them and one ``scaled_dot_product_attention``, or one attention written out as
matmul, softmax, matmul, which must mean what ``innerq::decode_attention`` means. Whatever else it meets becomes a
:class:`Refusal`; the graph is not touched.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from innerq_compile import ops
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.passes.aliasing import Memory
from innerq_compile.passes.decode.spelled_out import Attention, Mismatch, only_user, read_spelled_out
from innerq_compile.passes.graph import (
    ASSERTION,
    AttentionCall,
    graph_order,
    module_path,
    op_name,
    read_attention,
    repeats_heads,
    value_of,
)
from innerq_compile.passes.report import LEFT, REFUSED


@dataclasses.dataclass(frozen=True)
class DecodeSite:
    """An attention over a dequantized cache that may read the packed codes instead.

    Attributes:
        path: Module path of the layer.
        dequantize: The ``dequantize_kv`` node.
        dead: Everything between it and the attention's result, in graph order: dead after the rewrite.
        attention: The node of the attention's result, where the fused op takes its place.
        query, mask: Arguments of the attention, [B, Hq, q_len, D] and broadcastable to [B, Hq, q_len, capacity].
        state: The layer's buffers, in the order of :class:`~innerq_compile.numerics.layout.LayerState`.
        sm_scale: Softmax scale.
        capacity: Slots of the cache: a number, or a node where it is symbolic.
        spec: The settings, as the ops carry them.
    """

    path: str
    dequantize: fx.Node
    dead: tuple[fx.Node, ...]
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


def match(graph: fx.Graph) -> list[DecodeSite | Refusal]:
    """Every site of a graph, in graph order."""
    found: list[DecodeSite | Refusal] = []
    read = {node.args[0] for node in graph.nodes if node.target in (ops.dequantize_kv, ops.decode_attention)}
    read |= {node.args[1] for node in graph.nodes if node.target is ops.decode_attention}
    memory = Memory(graph)
    for node in graph.nodes:
        if node.target is ops.dequantize_kv:
            found.append(_match_site(node, memory))
        elif node.target is ops.append_kv and node.args[2] not in read:
            found.append(Refusal(module_path(node), node, "prefill: attends to its own exact keys and values", LEFT))
    return found


def _match_site(dequantize: fx.Node, memory: Memory) -> DecodeSite | Refusal:
    path = module_path(dequantize)
    arguments: tuple[Any, ...] = dequantize.args
    *buffers, capacity, spec = arguments
    try:
        keys, values = _results(dequantize)
        key_views, value_views = _views(keys, "keys"), _views(values, "values")
        attention = _attention_over(key_views[-1], spec)
        call = attention.call
        _check_values(attention, value_views[-1], spec)
        if call.key is not key_views[-1] or call.value is not value_views[-1]:
            raise Mismatch("keys and values of the cache do not stand as keys and values of the attention")
        site = DecodeSite(
            path=path,
            dequantize=dequantize,
            dead=_with_assertions((*key_views, *value_views, *attention.steps)),
            attention=attention.result,
            query=call.query,
            state=tuple(buffers),
            mask=call.attn_mask,
            sm_scale=_sm_scale(call),
            capacity=capacity,
            spec=spec,
        )
        _check_call(call, site.dead)
        _check_shapes(site, call)
        _check_writes(site, attention, memory)
    except Mismatch as mismatch:
        return Refusal(path, dequantize, mismatch.reason, mismatch.status)
    return site


def _with_assertions(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    asserted = [user for node in nodes for user in node.users if user.target is ASSERTION]
    return tuple(graph_order(nodes[0].graph, (*nodes, *asserted)))


def _results(dequantize: fx.Node) -> tuple[fx.Node, fx.Node]:
    taken = [user.args[1] for user in dequantize.users if user.target is operator.getitem]
    if len(taken) != len(dequantize.users) or sorted(taken, key=str) != [0, 1]:
        raise Mismatch("keys and values are not each taken exactly once from dequantize_kv")
    keys, values = sorted(dequantize.users, key=lambda user: user.args[1])  # type: ignore[arg-type,return-value]
    return keys, values


def _views(first: fx.Node, which: str) -> list[fx.Node]:
    """``first`` and its repetitions over the query heads; the last one has one user, which is something else."""
    views = [first]
    while True:
        user = only_user(views[-1], which)
        if not user.args or user.args[0] is not views[-1] or not repeats_heads(user):
            return views
        views.append(user)


def _attention_over(key: fx.Node, spec: str) -> Attention:
    """The attention that reads ``key``."""
    user = only_user(key, "keys")
    call = read_attention(user)
    attention = Attention(call, user) if call else read_spelled_out(key)
    if attention is None:
        raise _foreign_op(user, "keys", spec)
    return attention


def _check_values(attention: Attention, value: fx.Node, spec: str) -> None:
    user = only_user(value, "values")
    if user is attention.result:
        return
    if read_attention(user) or op_name(user) == op_name(attention.result):
        raise Mismatch("keys and values go to different attentions")
    raise _foreign_op(user, "values", spec)


def _foreign_op(node: fx.Node, which: str, spec: str) -> Mismatch:
    name = op_name(node)
    if name == "index_copy" and len(node.args) > 3:
        longest = InnerQConfig.from_spec(spec).max_fused_q_len
        return Mismatch(f"chunk of more than {longest} query tokens: attends through SDPA", LEFT)
    if name.endswith("flex_attention"):
        return Mismatch('flex_attention takes functions for masks and scores; use attn_implementation="sdpa"')
    return Mismatch(f"{name} stands between dequantize_kv and the attention ({which})")


def _sm_scale(call: AttentionCall) -> float:
    if call.scale is None:
        return 1.0 / math.sqrt(_shape_of(call.query, "query")[-1])
    if not isinstance(call.scale, int | float):
        raise Mismatch("the softmax scale is computed in the graph")
    return float(call.scale)


def _check_call(call: AttentionCall, dead: tuple[fx.Node, ...]) -> None:
    if call.query in dead or call.attn_mask in dead:
        raise Mismatch("the cache is also the query or the mask of its attention")
    if call.dropout_p != 0.0:
        raise Mismatch(f"dropout_p = {call.dropout_p}")
    if call.is_causal is not False:
        raise Mismatch("is_causal: a decode step needs an explicit mask")
    if call.attn_mask is None:
        raise Mismatch("no mask: empty slots of the cache would be attended")


def _check_shapes(site: DecodeSite, call: AttentionCall) -> None:
    query, mask = _shape_of(call.query, "query"), _shape_of(call.attn_mask, "mask")
    keys, key_heads = _shape_of(site.dead[0], "keys"), _shape_of(call.key, "keys")[1]
    if value_of(call.query).requires_grad or value_of(call.attn_mask).requires_grad:
        raise Mismatch("query or mask need a gradient; decode under torch.no_grad() or torch.inference_mode()")
    if value_of(call.query).dtype != value_of(call.key).dtype:
        raise Mismatch(f"query of {value_of(call.query).dtype}, keys of {value_of(call.key).dtype}")
    if len(query) != 4 or not statically_known_true(query[0] == keys[0]) or query[3] != keys[3]:
        raise Mismatch(f"query of shape {tuple(query)} does not fit keys of shape {tuple(keys)}")
    if query[1] % keys[1]:
        raise Mismatch(f"{query[1]} query heads are not a multiple of {keys[1]} key-value heads")
    if key_heads != query[1] and not call.enable_gqa and key_heads != 1:
        raise Mismatch(f"{query[1]} query heads meet {key_heads} key-value heads without enable_gqa")
    longest = InnerQConfig.from_spec(site.spec).max_fused_q_len
    if not statically_known_true(query[2] <= longest):
        raise Mismatch(f"chunk of more than {longest} query tokens: attends through SDPA", LEFT)
    wanted = (*query[:3], keys[2])
    offset = len(wanted) - len(mask)
    if offset < 0 or not all(
        statically_known_true(m == 1) or statically_known_true(m == w)
        for m, w in zip(mask, wanted[offset:], strict=True)
    ):
        raise Mismatch(f"mask of shape {tuple(mask)} does not broadcast to {tuple(wanted)}")


def _check_writes(site: DecodeSite, attention: Attention, memory: Memory) -> None:
    """The fused op reads everything where the attention ends; the attention reads some of it earlier."""
    mutation = memory.conflict(after=site.dequantize, before=site.attention, reads=site.state)
    if mutation is not None:
        raise Mismatch(f"{op_name(mutation)} changes the cache between its read and the attention")
    if attention.steps:
        mutation = memory.conflict(
            after=attention.steps[0],
            before=site.attention,
            reads=(site.query, site.mask),
            ignoring=attention.steps,
        )
        if mutation is not None:
            raise Mismatch(f"{op_name(mutation)} may change the query or the mask while they are attended with")


def _shape_of(node: Any, which: str) -> torch.Size:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        raise Mismatch(f"the shape of the {which} is unknown")
    return value.shape
