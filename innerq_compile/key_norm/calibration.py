"""Calibration tokens in whatever form they come, cut into windows of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

WINDOW = 512
"""Tokens per window, at most: enough positions for RoPE to turn every pair of channels that it ever turns fast."""


def token_windows(calibration: Any, longest: int = WINDOW) -> list[torch.Tensor]:
    """Cuts calibration tokens into windows int64 [1, T] of one length.

    Args:
        calibration: Token ids as a tensor [T] or [B, T], a list of ids, a tokenizer's output, a list of any of these,
            or a ``DataLoader`` that yields them. Tokens whose ``attention_mask`` is 0 are dropped. The rest is read as
            one stream; the last window overlaps the one before it.
        longest: T, or fewer where there are fewer tokens.

    Raises:
        ValueError: Nothing to calibrate with, or something that holds no token ids.
    """
    rows = list(_rows(calibration))
    stream = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    if not len(stream):
        raise ValueError("calibration holds no tokens")
    length = min(longest, len(stream))
    begins = [*range(0, len(stream) - length, length), len(stream) - length]
    return [stream[begin : begin + length][None] for begin in begins]


def _rows(calibration: Any) -> Iterator[torch.Tensor]:
    if isinstance(calibration, torch.Tensor):
        if calibration.is_floating_point() or calibration.dim() not in (1, 2):
            raise ValueError(
                f"calibration must be token ids [T] or [B, T], got {calibration.dtype} {list(calibration.shape)}"
            )
        yield from torch.atleast_2d(calibration).to("cpu", torch.int64)
    elif isinstance(calibration, Mapping) or hasattr(calibration, "input_ids"):
        yield from _unpadded(calibration)
    elif isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes):
        yield from _from_items(calibration)
    else:
        raise ValueError(
            "calibration must be token ids, a tokenizer's output, a list of them, or a DataLoader, "
            f"got {type(calibration).__name__}"
        )


def _from_items(items: Iterable[Any]) -> Iterator[torch.Tensor]:
    ids: list[int] = []
    for item in items:
        if isinstance(item, int) and not isinstance(item, bool):
            ids.append(item)
        else:
            yield from _rows(item[0] if isinstance(item, tuple) else item)
    if ids:
        yield torch.tensor(ids)


def _unpadded(batch: Any) -> Iterator[torch.Tensor]:
    ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"]))
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
    for row, kept in zip(ids, torch.atleast_2d(torch.as_tensor(mask)).bool(), strict=True):
        yield row[kept].to("cpu", torch.int64)
