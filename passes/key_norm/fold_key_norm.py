"""Absorbs the key norm into the parameters in front of attention, so that decoding pays nothing for it.

``(q * n) . (k / n) = q . k``: dividing what makes a key channel and multiplying what makes the matching query channels
changes no score, and the keys that reach the cache are normalized already (arXiv 2602.23200, key normalization).
Everything is read off the graph, no model class is known here; nothing is changed here either: the result holds new
tensors, and whoever owns the parameters puts them in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from innerq_compile.passes.graph import value_of
from innerq_compile.passes.key_norm.check_fold import check_equal, check_other_readers, check_parameter_readers
from innerq_compile.passes.key_norm.key_factors import FactorSettings, measure_channels, merge_query_heads
from innerq_compile.passes.key_norm.key_sites import KeySite, key_sites
from innerq_compile.passes.key_norm.probe_channels import probe_channels, region_inputs
from innerq_compile.passes.key_norm.tie_channels import ParameterSlots, TiedChannels, memory_of
from innerq_compile.passes.key_norm.trace_projections import Channels, FoldRefused, trace_projections
from innerq_compile.passes.key_norm.traced_graph import TracedGraph

MIN_TOKENS = 8
"""Positions that the channels are probed at, at least: RoPE mixes nothing at position 0."""


@dataclasses.dataclass(frozen=True)
class FoldedKeyNorm:
    """What folding makes of a model.

    Attributes:
        paths: Module paths of the attentions.
        factors: Per attention the factor of each key channel, float64 [H, D].
        tensors: New parameters, by the graph's input that holds the old one.
        error: Largest change of an output relative to the largest output, on the first calibration batch.
        budget: What ``error`` was allowed to be.
    """

    paths: tuple[str, ...]
    factors: tuple[torch.Tensor, ...]
    tensors: dict[fx.Node, torch.Tensor]
    error: float
    budget: float


def fold_key_norm(
    traced: TracedGraph,
    batches: Sequence[Mapping[fx.Node, Any]],
    settings: FactorSettings | None = None,
    *,
    factors: Mapping[str, torch.Tensor] | None = None,
    progress: bool = False,
) -> FoldedKeyNorm:
    """Computes the parameters that fold the key norm of every attention of a graph.

    Args:
        traced: The graph with its tensors.
        batches: Calibration: values of the graph's inputs, at least 8 tokens, no pads.
        settings: Which factor.
        factors: By module path, [H, D]: used instead of measured ones.
        progress: Shows a bar while keys are measured.

    Raises:
        FoldRefused: One attention at least cannot be folded, or the outputs would change. Naming each and why.
    """
    settings = settings or FactorSettings()
    sites = key_sites(traced.gm.graph)
    if not sites:
        raise FoldRefused(
            "no scaled_dot_product_attention in the graph: the model computes its scores itself (attention sinks, "
            "capped scores), or a graph was captured without attn_implementation='sdpa'"
        )
    channels = _trace_sites(traced, sites)
    tied = _tie(traced, sites, channels, batches[0])
    if factors is None:
        wanted = _measured_factors(traced, sites, batches, settings, progress)
    else:
        wanted = _given_factors(sites, tied, factors)
    tied_factors, factor = tied.solve(wanted, fixed := tied.fixed())
    _refuse_hopeless(sites, tied, fixed)
    factor = settings.rounded(factor) ** tied.exponents()
    tensors, rounded = _fold_tensors(traced, tied, factor)
    flat = [part for pair in channels for part in pair]
    check_parameter_readers(traced, flat, tensors)
    check_other_readers(traced, flat, factor, tied, batches[0])
    error, budget = check_equal(traced, sites, tensors, rounded, batches[0])
    return FoldedKeyNorm(
        tuple(site.path for site in sites), tuple(settings.rounded(f) for f in tied_factors), tensors, error, budget
    )


def _trace_sites(traced: TracedGraph, sites: list[KeySite]) -> list[tuple[Channels, Channels]]:
    kinds, found, reasons = traced.kinds(), [], {}
    for site in sites:
        try:
            reason = site.misuse(sites)
            if reason:
                raise FoldRefused(reason)
            found.append((trace_projections(traced, kinds, site.key), trace_projections(traced, kinds, site.query)))
        except FoldRefused as refusal:
            reasons[site.path] = str(refusal)
    if reasons:
        raise FoldRefused(_listed(reasons))
    return found


def _tie(
    traced: TracedGraph,
    sites: list[KeySite],
    channels: list[tuple[Channels, Channels]],
    batch: Mapping[fx.Node, Any],
) -> TiedChannels:
    tied, reasons, known = TiedChannels(traced), {}, {}
    for site, pair in zip(sites, channels, strict=True):
        reach = []
        try:
            for part in pair:
                shape = _Shape(part).of(part.end)
                if shape not in known:  # the layers of a model look alike
                    free = _free_values(traced, part, batch)
                    known[shape] = probe_channels(traced, part, free)
                reach.append(known[shape])
            tied.add_site(pair[0], reach[0], pair[1], reach[1], int(value_of(site.key).shape[-1]))
        except FoldRefused as refusal:
            reasons[site.path] = str(refusal)
    if reasons:
        raise FoldRefused(_listed(reasons))
    return tied


def _free_values(traced: TracedGraph, channels: Channels, batch: Mapping[fx.Node, Any]) -> dict[fx.Node, torch.Tensor]:
    nodes = [*region_inputs(channels), *(scaling.node for scaling in channels.scalings)]
    *values, end = traced.evaluate([*nodes, channels.end], batch)
    if end.shape[0] * end.shape[2] < MIN_TOKENS:
        found = end.shape[0] * end.shape[2]
        raise FoldRefused(
            f"calibration needs at least {MIN_TOKENS} tokens, got {found}; innerq_compile.fold_key_norm(model, tokens) "
            "takes tokens of your choice"
        )
    return dict(zip(nodes, values, strict=True))


class _Shape:
    """A hashable picture of everything between scalings and end, equal for layers that are built alike."""

    def __init__(self, channels: Channels) -> None:
        self.seen: dict[fx.Node, Any] = {
            scaling.node: (index, tuple(scaling.slots.shape)) for index, scaling in enumerate(channels.scalings)
        }

    def of(self, node: fx.Node) -> Any:
        if node not in self.seen:
            if node.op in {"placeholder", "get_attr"}:
                self.seen[node] = node.name
            else:
                arguments = fx.node.map_arg((node.args, node.kwargs), lambda source: hash(self.of(source)))
                self.seen[node] = (str(node.target), str(arguments))
        return self.seen[node]


def _fold_tensors(
    traced: TracedGraph, tied: TiedChannels, factor: torch.Tensor
) -> tuple[dict[fx.Node, torch.Tensor], dict[fx.Node, torch.Tensor]]:
    """The new parameters, and those that a multiplication and a division make of the old ones."""
    folded, rounded = {}, {}
    for parameter in tied.parameters.values():
        own = factor[parameter.first : parameter.first + parameter.count]
        if bool((own != 1).any()):
            new = scale_parameter(parameter, own)
            back = scale_parameter(dataclasses.replace(parameter, tensor=new), 1 / own)
            for node in traced.names:
                if memory_of(traced.tensors[node]) == memory_of(parameter.tensor):
                    folded[node], rounded[node] = new, back
    return folded, rounded


def scale_parameter(parameter: ParameterSlots, factor: torch.Tensor) -> torch.Tensor:
    """The parameter with slot i multiplied by ``factor[i]``, rounded once to its own dtype."""
    old = parameter.tensor.detach()
    if parameter.axis is None:
        shape = old.shape
    else:
        shape = torch.Size(-1 if axis == parameter.axis else 1 for axis in range(old.dim()))
    factor = factor.to(old.device).view(shape)
    return ((old.double() + parameter.offset) * factor - parameter.offset).to(old.dtype)


def _measured_factors(
    traced: TracedGraph,
    sites: list[KeySite],
    batches: Sequence[Mapping[fx.Node, Any]],
    settings: FactorSettings,
    progress: bool,
) -> list[torch.Tensor]:
    heads = [site.key for site in sites] + [site.query for site in sites]
    measured = measure_channels(traced, heads, batches, settings.statistic, progress=progress)
    keys, queries = measured[: len(sites)], measured[len(sites) :]
    merged = [merge_query_heads(q, len(k), settings.statistic) for k, q in zip(keys, queries, strict=True)]
    return [settings.factors(k, q) for k, q in zip(keys, merged, strict=True)]


def _given_factors(sites: list[KeySite], tied: TiedChannels, factors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    if set(factors) != {site.path for site in sites}:
        raise FoldRefused(f"factors of {len(factors)} other layers, or of another model: this one has {len(sites)}")
    for site, (_, shape) in zip(sites, tied.sites, strict=True):
        if tuple(factors[site.path].shape) != shape:
            raise FoldRefused(f"{site.path}: factors of {list(factors[site.path].shape)}, channels of {list(shape)}")
    return [factors[site.path] for site in sites]


def _refuse_hopeless(sites: list[KeySite], tied: TiedChannels, fixed: dict[int, str]) -> None:
    reasons = {}
    for site, (first, (heads, head_dim)) in zip(sites, tied.sites, strict=True):
        roots = {tied.groups.find(channel) for channel in range(first, first + heads * head_dim)}
        if roots <= set(fixed):
            reasons[site.path] = fixed[min(roots)]
    if reasons:
        raise FoldRefused(_listed(reasons))


def _listed(reasons: dict[str, str]) -> str:
    """One line per layer; layers with the same reason share one."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        by_reason.setdefault(reason, []).append(path)
    return "; ".join(f"{', '.join(paths)}: {reason}" for reason, paths in by_reason.items())
