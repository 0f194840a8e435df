"""What a rival is, and the data that all of them get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

COPIES = 2
"""Caches that a rival prepares: one for the call that warms its code, one for the call that is timed."""


@dataclass(frozen=True)
class Case:
    """One decode step: a query for every query head against ``tokens`` cached keys and values; batch 1."""

    q_heads: int
    heads: int
    head_dim: int
    tokens: int
    threads: int

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """N(0,1) query [1, q_heads, 1, head_dim], keys and values [1, heads, tokens, head_dim], float32."""
        random = np.random.default_rng(0)
        shapes = (self.q_heads, 1), (self.heads, self.tokens), (self.heads, self.tokens)
        query, key, value = (random.standard_normal((1, *s, self.head_dim), dtype=np.float32) for s in shapes)
        return query, key, value

    def attention(self) -> np.ndarray:
        """The right answer, [1, q_heads, 1, head_dim], in float64 over keys and values that nobody has rounded."""
        query, key, value = (x[0].astype(np.float64) for x in self.data())
        scores = query.reshape(self.heads, -1, self.head_dim) @ key.transpose(0, 2, 1) / self.head_dim**0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ value
        return out.reshape(1, self.q_heads, 1, self.head_dim)


Step = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Rival:
    """A way to attend over a cache.

    Attributes:
        name: What its row is called.
        package: What it is called on PyPI.
        bits: Bits of a stored number, scales not counted.
        appends: Whether a step also appends one token, because the library offers no other way.
        prepare: Fills ``COPIES`` caches with a case's keys and values and returns a step: called with the number of a
            cache it attends once and returns the output, [1, q_heads, 1, head_dim] or as many numbers in that order.
            Imports its package, so ImportError says that it is not installed.
    """

    name: str
    package: str
    bits: int
    prepare: Callable[[Case], Step]
    appends: bool = False
