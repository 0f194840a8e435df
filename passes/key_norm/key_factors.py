"""The factor of each key channel: what is measured on calibration tokens, and what number is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.quant import KEY_NORM_EPS
from innerq_compile.passes.key_norm.traced_graph import TracedGraph

STATISTICS = ("max", "rms")


@dataclasses.dataclass(frozen=True)
class FactorSettings:
    """How a factor follows from magnitudes: ``|K| ** strength / |Q| ** query_strength``, per channel.

    The published factor (arXiv 2602.23200, key normalization) is ``max |K| ** 0.5``. It halves the exponent of an
    outlier and no more. Factors with ``strength + query_strength == 1`` undo any exchange of scale between keys and
    queries completely: scale a key channel by s and its query by 1/s, and they become s times as large. The defaults
    are the best of those on the reference model, with centred keys (``benchmarks/results/key_norm.json``).

    Args:
        statistic: Of a channel over tokens: ``"max"`` of the magnitude, or its root mean square ``"rms"``.
        strength: Exponent of the keys; 1 alone makes all key channels alike, 0 ignores them.
        query_strength: Exponent of the queries: a channel that queries read loudly gets the finer steps.
        power_of_two: Rounds factors to powers of two. Multiplying by one changes no mantissa, so the folded model
            computes the same bits as the original in float32 and bfloat16 (float16 has too few exponents to promise
            it). Costs quality: 3-bit KL rises by 10 to 70 %.
        off_below: A KV head whose largest channel is less than this many times its median channel is left alone.

    Raises:
        ValueError: For a setting out of range.
    """

    statistic: str = "max"
    strength: float = 0.5
    query_strength: float = 0.5
    power_of_two: bool = False
    off_below: float = 0.0

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {self.statistic!r}")
        for name in ("strength", "query_strength"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        if self.off_below < 0.0:
            raise ValueError(f"off_below must not be negative, got {self.off_below!r}")

    def factors(self, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Factors for the statistics [H, D] of a layer's keys and queries; before channels are tied. float64 [H, D]."""
        balanced = keys.amax(-1, keepdim=True) < self.off_below * keys.median(-1, keepdim=True).values
        factors = _floored(keys) ** self.strength / _floored(queries) ** self.query_strength
        return torch.where(balanced, 1.0, factors)

    def rounded(self, factors: torch.Tensor) -> torch.Tensor:
        """The tied factors as they are used."""
        return torch.exp2(factors.log2().round()) if self.power_of_two else factors


def _floored(magnitudes: torch.Tensor) -> torch.Tensor:
    """A channel that was silent during calibration counts as a thousandth of the loudest one of its head."""
    loudest = magnitudes.amax(-1, keepdim=True)
    return torch.maximum(magnitudes, KEY_NORM_EPS * torch.where(loudest > 0, loudest, 1.0))


def measure_channels(
    traced: TracedGraph,
    heads: Sequence[fx.Node],
    batches: Sequence[Mapping[fx.Node, Any]],
    statistic: str,
    *,
    progress: bool = False,
) -> list[torch.Tensor]:
    """The statistic of every channel over all tokens of all batches, but for the first ones of each row.

    Those are a cache's sink, which is never quantized; many models give their keys magnitudes of their own.

    Args:
        traced: The graph.
        heads: Nodes of [B, H, T, D], keys or queries.
        batches: Values for the graph's inputs, without pads.
        statistic: ``"max"`` or ``"rms"``. Numbers that are not finite never count.
        progress: Shows a bar.

    Returns:
        Per node float64 [H, D].
    """
    totals: list[torch.Tensor] = []
    num_tokens = 0
    for batch in tqdm(batches, desc="measuring keys", unit="batch", disable=not progress):
        found = [_magnitudes(value) for value in traced.evaluate(heads, batch)]
        num_tokens += found[0].shape[1]
        if statistic == "max":
            found = [value.amax(1) for value in found]
            totals = [torch.maximum(a, b) for a, b in zip(totals, found, strict=True)] if totals else found
        else:
            found = [value.square().sum(1) for value in found]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    return totals if statistic == "max" else [(total / num_tokens).sqrt() for total in totals]


def merge_query_heads(queries: torch.Tensor, num_kv_heads: int, statistic: str) -> torch.Tensor:
    """Statistics [Hq, D] of queries as those of the KV heads that they read, [num_kv_heads, D]."""
    grouped = queries.unflatten(0, (num_kv_heads, -1))
    return grouped.amax(1) if statistic == "max" else grouped.square().mean(1).sqrt()


def _magnitudes(heads: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] to float64 [H, tokens, D]."""
    skipped = min(InnerQConfig.sink, heads.shape[2] // 4)
    counted = heads[:, :, skipped:].double().abs()
    return torch.where(torch.isfinite(counted), counted, 0.0).transpose(0, 1).flatten(1, 2)
