"""Captures attention over transformers' ``StaticCache``: ``index_copy_`` into its buffers, then attention over them.

Write and attention become one ``innerq::shadow_attention``, which keeps a packed copy of the buffers and reads that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from innerq_compile.cache import shadow
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import unsupported_head_dim
from innerq_compile.passes.aliasing import Memory
from innerq_compile.passes.graph import AttentionCall, module_path, op_name, read_attention, repeats_heads, value_of
from innerq_compile.passes.report import LEFT, REWRITTEN, Report, SiteReport

CAPTURED = "StaticCache: reads a packed copy; the 16-bit buffers stay, so this saves time and no memory"
ADVICE = (
    "Attention over this StaticCache now reads a packed copy beside the 16-bit buffers: faster, rounded, and no memory "
    "is saved. To save memory call innerq_compile.enable(model) and leave past_key_values out, or pass "
    "past_key_values=InnerQCache(model.config). options={'static_cache': 'off'} leaves the StaticCache alone."
)


@dataclasses.dataclass(frozen=True)
class _Buffer:
    """A buffer of the cache on its way into an attention."""

    node: fx.Node
    write: fx.Node
    views: tuple[fx.Node, ...]


class _Left(Exception):  # noqa: N818  never leaves this file: why a site stays as it is
    pass


def capture_static_cache(
    graph: fx.Graph, config: InnerQConfig, *, exact: bool = False, kept: Mapping[fx.Node, str] | str = ""
) -> tuple[Report, list[tuple[int, int]]]:
    """Rewrites every attention over a ``StaticCache`` that can be, in place.

    Args:
        graph: A graph of torch functions.
        config: Settings of the packed copies.
        exact: Forbids kernels to round queries and probabilities.
        kept: Buffers that stay as they are, each with the reason; or one reason for all.

    Returns:
        A report on all of them, and for each one rewritten the places of its key and its value buffer among the
        graph's inputs, which :func:`innerq_compile.cache.shadow.watched` needs.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    memory = Memory(graph)
    sites, buffers = [], []
    for attention in list(graph.nodes):
        call = read_attention(attention)
        if call is None:
            continue
        keys = _buffer_behind(call.key)
        if keys is None:
            continue
        path = module_path(attention)
        try:
            values = _buffer_behind(call.value)
            if values is None:
                raise _Left("its values come from elsewhere")
            reason = kept if isinstance(kept, str) else kept.get(keys.node) or kept.get(values.node)
            if reason:
                raise _Left(reason)
            _check(attention, call, keys, values, config)
            _check_moves(memory, attention, keys, values)
            _rewrite(graph, attention, call, keys, values, config, exact)
            sites.append(SiteReport(path, REWRITTEN, CAPTURED))
            buffers.append((inputs.index(keys.node), inputs.index(values.node)))
        except _Left as left:
            sites.append(SiteReport(path, LEFT, f"StaticCache: kept in 16 bits, {left}"))
    return Report(tuple(sites), ADVICE if buffers else ""), buffers


def _buffer_behind(key: Any) -> _Buffer | None:
    """The 4-dimensional input that an attention's keys (or values) are, if the graph writes into it once."""
    views = []
    while isinstance(key, fx.Node) and key.args and isinstance(key.args[0], fx.Node) and repeats_heads(key):
        views.append(key)
        key = key.args[0]
    value = value_of(key) if isinstance(key, fx.Node) and key.op == "placeholder" else None
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return None
    writes = [user for user in key.users if op_name(user) == "index_copy_"]
    return _Buffer(key, writes[0], tuple(views)) if len(writes) == 1 else None


def _check(attention: fx.Node, call: AttentionCall, keys: _Buffer, values: _Buffer, config: InnerQConfig) -> None:
    """Raises _Left unless the attention means what the op does."""
    # Another layer may attend to the same buffers later, but not to views that were made of them for this one.
    readers = set(call.key.users) & set(call.value.users)
    for buffer in (keys, values):
        used = {user for user in buffer.node.users if op_name(user) != "size"} - readers
        used |= {user for node in (buffer.write, *buffer.views) for user in node.users}
        others = used - {buffer.write, *buffer.views, attention}
        if others:
            raise _Left(f"its buffers are also used by {', '.join(sorted(map(op_name, others)))}")
        if (
            len(buffer.write.args) != 4
            or buffer.write.args[0] is not buffer.node
            or buffer.write.args[1] not in (2, -2)
        ):
            raise _Left("it is not written token by token")
    if keys.write.args[2] is not values.write.args[2]:
        raise _Left("keys and values are written to different places")
    query, mask = value_of(call.query), value_of(call.attn_mask)
    key, value = value_of(keys.node), value_of(values.node)
    if not isinstance(query, torch.Tensor) or not isinstance(mask, torch.Tensor):
        raise _Left("its attention has no mask")
    if key.device.type != "cpu":
        raise _Left("the length would have to be read back from the device")
    if call.dropout_p != 0.0 or call.is_causal is not False or not isinstance(call.scale, int | float | None):
        raise _Left("its attention has dropout, is_causal or a computed scale")
    if query.requires_grad or key.requires_grad or mask.requires_grad:
        raise _Left("its attention needs a gradient")
    heads, head_dim = key.shape[1], key.shape[3]
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        raise _Left("its heads and head_dim are only known at run time")
    if query.dtype != key.dtype or query.shape[1] % heads or value.shape[1] != heads or value.shape[3] != head_dim:
        raise _Left("keys, values and query do not fit each other")
    # What is only known at run time, the op looks at.
    if statically_known_true(query.shape[2] > config.max_fused_q_len):
        raise _Left(f"chunk of more than {config.max_fused_q_len} query tokens")
    if mask.dim() != 4:
        raise _Left("its mask does not span the cache")
    reason = unsupported_head_dim(config, head_dim)
    if reason:
        raise _Left(reason)


def _check_moves(memory: Memory, attention: fx.Node, keys: _Buffer, values: _Buffer) -> None:
    """Raises _Left unless both writes, and every copy on the way to the attention, may happen where it stands."""
    for buffer in (keys, values):
        _, _, position, new = buffer.write.args
        own = (keys.write, values.write, *keys.views, *values.views)
        between = memory.conflict(
            after=buffer.write,
            before=attention,
            reads=(position, new),  # type: ignore[arg-type]
            writes=(buffer.node,),
            ignoring=own,
        )
        if between is None and buffer.views:
            # repeat_kv copies: what is attended to are the buffers as they were there.
            first = buffer.views[-1]
            between = memory.conflict(after=first, before=attention, reads=(buffer.node,), ignoring=buffer.views)
        if between is not None:
            raise _Left(f"{op_name(between)} stands between the write and the attention and may change what they read")


def _rewrite(
    graph: fx.Graph,
    attention: fx.Node,
    call: AttentionCall,
    keys: _Buffer,
    values: _Buffer,
    config: InnerQConfig,
    exact: bool,
) -> None:
    _, _, position, key = keys.write.args
    sm_scale = 1.0 / math.sqrt(value_of(call.query).shape[-1]) if call.scale is None else float(call.scale)
    with graph.inserting_before(attention):
        fused = graph.call_function(
            shadow.shadow_attention,
            (
                call.query,
                keys.node,
                values.node,
                key,
                values.write.args[3],
                position,
                call.attn_mask,
                sm_scale,
                config.spec,
                exact,
            ),
        )
    fused.meta = dict(attention.meta)
    attention.replace_all_uses_with(fused)
    for node in (attention, *keys.views, *values.views, keys.write, values.write):
        graph.erase_node(node)
