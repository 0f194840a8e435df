"""The factor of each key channel: what is measured on calibration tokens, and what number is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from innerq_compile.passes.traced_graph import TracedGraph
from innerq_compile.quant import KEY_NORM_EPS

STATISTICS = ("max", "rms")


@dataclasses.dataclass(frozen=True)
class FactorSettings:
    """How a factor follows from the magnitudes of a channel: ``statistic ** strength``.

    The published factor (arXiv 2602.23200, key normalization) is ``max ** 0.5`` over the calibration tokens.

    Args:
        statistic: ``"max"`` of |K| over tokens, or its root mean square ``"rms"``.
        strength: Exponent; 1 makes all channels alike, 0 changes nothing.
        power_of_two: Rounds factors to powers of two. Multiplying by one changes no mantissa, so the folded model
            computes the same bits as the original in any float dtype.
        off_below: A KV head whose largest channel is less than this many times its median channel is left alone.

    Raises:
        ValueError: For a setting out of range.
    """

    statistic: str = "max"
    strength: float = 0.5
    power_of_two: bool = False
    off_below: float = 0.0

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {self.statistic!r}")
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"strength must lie between 0 and 1, got {self.strength!r}")
        if self.off_below < 0.0:
            raise ValueError(f"off_below must not be negative, got {self.off_below!r}")

    def factors(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """Factors [H, D], float64, for the statistic [H, D] of a layer; before channels are tied."""
        magnitudes = magnitudes.double()
        median = magnitudes.median(-1, keepdim=True).values
        balanced = magnitudes.amax(-1, keepdim=True) < self.off_below * median
        factors = (magnitudes**self.strength).clamp(min=KEY_NORM_EPS)
        return torch.where(balanced, 1.0, factors)

    def rounded(self, factors: torch.Tensor) -> torch.Tensor:
        """The tied factors as they are used."""
        return torch.exp2(factors.log2().round()) if self.power_of_two else factors


def measure_keys(
    traced: TracedGraph,
    keys: Sequence[fx.Node],
    batches: Sequence[Mapping[fx.Node, Any]],
    statistic: str,
    *,
    progress: bool = False,
) -> list[torch.Tensor]:
    """The statistic of every channel of every layer over all tokens of all batches.

    Args:
        traced: The graph.
        keys: Nodes of [B, H, T, D].
        batches: Values for the graph's inputs, without pads.
        statistic: ``"max"`` or ``"rms"``. Numbers that are not finite never count.
        progress: Shows a bar.

    Returns:
        Per node float64 [H, D].
    """
    totals: list[torch.Tensor] = []
    num_tokens = 0
    for batch in tqdm(batches, desc="measuring keys", unit="batch", disable=not progress):
        values = traced.evaluate(keys, batch)
        found = [torch.where(torch.isfinite(k), k, 0.0).double().abs().transpose(0, 1).flatten(1, 2) for k in values]
        num_tokens += found[0].shape[1]
        if statistic == "max":
            found = [k.amax(1) for k in found]
            totals = [torch.maximum(a, b) for a, b in zip(totals, found, strict=True)] if totals else found
        else:
            found = [k.square().sum(1) for k in found]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    return totals if statistic == "max" else [(total / num_tokens).sqrt() for total in totals]
