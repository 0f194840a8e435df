"""Makes sure that folding changes what it should and nothing else, before any parameter is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from innerq_compile.passes.graph import base_name
from innerq_compile.passes.key_norm.key_sites import CACHE_WRITES, CHECKS, KeySite
from innerq_compile.passes.key_norm.tie_channels import TiedChannels, memory_of
from innerq_compile.passes.key_norm.trace_projections import Channels, FoldRefused
from innerq_compile.passes.key_norm.traced_graph import ACTIVATION, PARAMETER, TracedGraph

MAX_RELATIVE_ERROR = 1e-4
"""Of float32 logits, whatever the rounding noise of the model."""

NOISE_FACTOR = 4.0
"""How far folding may exceed the noise that rounding the same parameters once causes."""


def check_parameter_readers(
    traced: TracedGraph, channels: Sequence[Channels], tensors: Mapping[fx.Node, torch.Tensor]
) -> None:
    """A parameter that changes must be read by scalings of keys and queries alone.

    Raises:
        FoldRefused: Naming the parameter and its other reader, or another parameter that shares its memory.
    """
    kinds = traced.kinds()
    known = {scaling.node for part in channels for scaling in part.scalings}
    known |= {node for part in channels for node in part.region}
    for parameter in tensors:
        stack = [parameter]
        while stack:
            for user in stack.pop().users:
                if kinds[user] == PARAMETER:
                    stack.append(user)
                elif user not in known and base_name(user) not in CHECKS:
                    raise FoldRefused(f"{traced.names[parameter]} is also read by {base_name(user)}: tied weights")
        span = _span(traced.tensors[parameter])
        for other in traced.names:
            same = memory_of(traced.tensors[other]) == memory_of(traced.tensors[parameter])
            if not same and _overlap(span, _span(traced.tensors[other])):
                raise FoldRefused(f"{traced.names[parameter]} shares its memory with {traced.names[other]}")


def check_other_readers(
    traced: TracedGraph,
    channels: Sequence[Channels],
    factor: torch.Tensor,
    tied: TiedChannels,
    batch: Mapping[fx.Node, Any],
) -> None:
    """Whoever else reads between projections and attention (the values of a fused projection) must see no change.

    Raises:
        FoldRefused: Naming the reader.
    """
    kinds = traced.kinds()
    inside = {node for part in channels for node in part.region}
    scalings = {scaling.node: scaling for part in channels for scaling in part.scalings}
    ends = {part.end for part in channels}
    readers: set[fx.Node] = set()
    for node in [*inside, *scalings]:
        if node in ends or kinds[node] == PARAMETER:
            continue
        for user in node.users:
            if user not in inside and user not in scalings and base_name(user) not in CHECKS:
                visible = all(kinds[s] != ACTIVATION or s in inside or s in scalings for s in user.all_input_nodes)
                readers.add(user if visible and user.op != "output" else node)
    if not readers:
        return
    before = dict(zip(scalings, traced.evaluate(list(scalings), batch), strict=True))
    after = {}
    for node, scaling in scalings.items():
        tensor = traced.tensors[scaling.parameters[0].node]
        first = tied.parameters[memory_of(tensor)].first
        slot_factor = factor[first : first + scaling.num_slots][scaling.slots]
        after[node] = before[node] * slot_factor.to(before[node])
    wanted = list(readers)
    old_values, new_values = (traced.evaluate(wanted, {**batch, **given}) for given in (before, after))
    for reader, old, new in zip(wanted, old_values, new_values, strict=True):
        if not _same(old, new):
            raise FoldRefused(f"{base_name(reader)} also reads the channels that would be scaled")


def check_equal(
    traced: TracedGraph,
    sites: Sequence[KeySite],
    tensors: Mapping[fx.Node, torch.Tensor],
    rounded: Mapping[fx.Node, torch.Tensor],
    batch: Mapping[fx.Node, Any],
) -> tuple[float, float]:
    """Compares the outputs with the old and with the new parameters.

    The yardstick is what rounding alone does to the outputs: those with ``rounded``, which are the old parameters after
    a multiplication and a division by the same factors.

    Returns:
        (relative error, its budget)

    Raises:
        FoldRefused: The error exceeds the budget.
    """
    kinds, keys = traced.kinds(), {site.key for site in sites}
    outputs = [
        node
        for node in traced.outputs
        if kinds[node] == ACTIVATION and node not in keys and base_name(node) not in CACHE_WRITES
    ]
    old, new, noisy = (_floats(traced.evaluate(outputs, {**batch, **given})) for given in ({}, tensors, rounded))
    error, noise = _relative_error(old, new), _relative_error(old, noisy)
    eps = max((torch.finfo(tensor.dtype).eps for tensor in tensors.values()), default=0.0)
    budget = NOISE_FACTOR * max(noise, eps)
    if eps <= torch.finfo(torch.float32).eps:
        budget = min(budget, MAX_RELATIVE_ERROR)
    if not error <= budget:
        raise FoldRefused(f"the outputs would change by {error:.1e} of their largest, more than {budget:.1e}")
    return error, budget


def _floats(values: Sequence[Any]) -> list[torch.Tensor]:
    return [value.double() for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _relative_error(old: list[torch.Tensor], new: list[torch.Tensor]) -> float:
    return max(
        (float((a - b).abs().max() / a.abs().max()) for a, b in zip(old, new, strict=True)), default=float("nan")
    )


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor):
        return torch.equal(old, new)
    return (
        all(_same(a, b) for a, b in zip(old, new, strict=True)) if isinstance(old, tuple | list) else bool(old == new)
    )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]
