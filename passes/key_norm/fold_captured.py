"""The key norm inside ``torch.compile(..., options={"key_norm": "folded"})``: folded with the first compiled prompt.

Dynamo hands the real parameters and the real first prompt to the backend. The graph of that prompt calibrates and folds
in place; every later graph over the same parameters (the decode step, another batch size) only has its cache ops told
that keys arrive normalized. A cache that was filled otherwise stays right: its own ``key_norm`` buffer says what its
codes were divided by.

A prompt of fewer than 8 tokens cannot calibrate. The next longer one that is compiled does, with dynamic shapes too,
but a decode step that was compiled in between keeps its run-time norm: fold such a model ahead of time with
``innerq_compile.fold_key_norm(model, tokens)``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from innerq_compile import ops
from innerq_compile.cache.live_caches import filled_caches
from innerq_compile.compat.pytorch import FakeTensor
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.passes.graph import value_of
from innerq_compile.passes.key_norm.fold_key_norm import fold_key_norm
from innerq_compile.passes.key_norm.trace_projections import FoldRefused, trace_projections
from innerq_compile.passes.key_norm.traced_graph import TracedGraph

logger = logging.getLogger(__name__)

_folded = WeakIdKeyDictionary()
"""Parameters that hold a folded norm -> what they held before."""


def unfold_captured(parameters: Iterable[torch.Tensor]) -> bool:
    """Puts back, bit for bit, what a backend folded into these parameters. Returns whether there was anything."""
    undone = False
    for parameter in parameters:
        if parameter in _folded:
            parameter.data.copy_(_folded.pop(parameter))
            undone = True
    return undone


def fold_captured(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> int:
    """Folds the parameters of a prompt's graph, or recognises folded ones, and marks the cache ops accordingly.

    What cannot be folded keeps its run-time norm, and one warning says why.

    Args:
        gm: A graph as Dynamo hands it to a backend; the settings in its ``innerq`` ops are changed.
        example_inputs: Its inputs: ``nn.Parameter`` where the graph takes one; changed in place when folded.

    Returns:
        How many layers' cache ops now carry ``key_norm=folded``.
    """
    appends = gm.graph.find_nodes(op="call_function", target=ops.append_kv)
    if not appends:
        return 0
    traced = TracedGraph.from_graph(gm, example_inputs)
    reads = gm.graph.find_nodes(op="call_function", target=ops.dequantize_kv)
    try:
        projected = [_parameters(traced, node) for node in appends]
        if not reads and not any(p in _folded for parameters in projected for p in parameters):
            _check_caches(appends)
            _fold(traced, dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)))
    except FoldRefused as refusal:
        # The text, not the exception: whoever keeps log records would keep the caches of the frames behind it alive.
        logger.warning("the key norm stays at run time: %s", str(refusal))
        return 0
    marked = 0
    for append, parameters in zip(appends, projected, strict=True):
        if any(parameter in _folded for parameter in parameters):
            codes = append.args[2]
            for node in (append, *(read for read in reads if read.args[0] is codes)):
                _tell_folded(node)
            marked += 1
    gm.recompile()
    return marked


def _parameters(traced: TracedGraph, append: fx.Node) -> list[torch.Tensor]:
    channels = trace_projections(traced, traced.kinds(), append.args[0])  # type: ignore[arg-type]
    return [traced.tensors[p.node] for scaling in channels.scalings for p in scaling.parameters]


def _check_caches(appends: Sequence[fx.Node]) -> None:
    """A graph does not say whose weights it holds, so keys of this shape that are alive might be theirs."""
    key = value_of(appends[0].args[0])
    others = filled_caches(int(key.shape[1]), int(key.shape[3]))
    if others:
        raise FoldRefused(
            f"{others} InnerQCache of this shape hold keys of the weights as they are; drop or reset() them before the "
            "first prompt is compiled, or fold ahead of time with innerq_compile.fold_key_norm(model, tokens)"
        )


def _fold(traced: TracedGraph, values: dict[fx.Node, Any]) -> None:
    batch = {node: _as_called(values[node]) for node in traced.inputs}
    if any(isinstance(value, FakeTensor) for value in values.values()):
        raise FoldRefused("the graph is compiled without the model's weights")
    for node, new in fold_key_norm(traced, [batch]).tensors.items():
        before = traced.tensors[node].detach().clone()
        traced.tensors[node].data.copy_(new)
        _folded[traced.tensors[node]] = before


def _as_called(value: Any) -> Any:
    """An input as a number or a tensor: in a graph with dynamic shapes a size is the one of the call that compiles."""
    if not isinstance(value, torch.SymInt):
        return value
    if value.node.hint is None:
        raise FoldRefused(f"the graph is compiled without knowing its size {value}")
    return int(value.node.hint)  # int(value) would make the graph serve this size alone


def _tell_folded(node: fx.Node) -> None:
    *arguments, spec = node.args
    config = dataclasses.replace(InnerQConfig.from_spec(str(spec)), key_norm="folded")
    node.args = (*arguments, config.spec)
