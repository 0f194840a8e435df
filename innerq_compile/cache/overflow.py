"""A full cache, told by the host in time and without waiting for the device.

No result is ever computed without tokens that did not fit: an append counts them, and every read of such a row gives
NaN (:func:`innerq_compile.numerics.reference.append_kv`). That much the device does by itself, also in a CUDA graph
that is replayed by hand and in an exported package. Here is the host's part: an error that says which layer, how long
and how large, if it can be before the tokens that do not fit are appended, else in the next call.

On an accelerator the host must not ask for the length in every step: it would wait for all work that is queued. So it
looks at a copy of ``counts`` that is under way since an earlier step, and counts the tokens that it has announced since
then. Together they bound the length from above. The host waits for the length itself only where that bound exceeds the
capacity: when a cache is full, or all but.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from innerq_compile.numerics.layout import SLOTS
from innerq_compile.ops import overflow_error


@dataclasses.dataclass(frozen=True)
class Append:
    """Where a graph appends to a cache.

    Attributes:
        counts: Place of the cache's counts among the graph's inputs.
        num_new: Tokens that a call appends, or the place of that number among the graph's inputs, as ``[place]``.
        capacity: The cache's capacity, or its place in the same way.
        layer: The layer's name.
    """

    counts: int
    num_new: int | list[int]
    capacity: int | list[int]
    layer: str


class Copy:
    """Counts on their way from a CUDA device to the host."""

    def __init__(self, counts: torch.Tensor) -> None:
        with torch.inference_mode(False):  # it is written again in calls that may run in another mode than this one
            self._host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
        self._done = torch.cuda.Event()
        self.start(counts)

    def start(self, counts: torch.Tensor) -> None:
        """Sets out. The host does not wait, and neither do the kernels of another stream."""
        with torch.cuda.device(counts.device):
            self._host.copy_(counts, non_blocking=True)
            self._done.record()

    def length(self) -> int | None:
        """Slots taken when the copy set out; ``None`` while it is under way."""
        return int(self._host[:, SLOTS].max()) if self._done.query() else None


@dataclasses.dataclass
class _Watch:
    """What the host knows about one cache on a device.

    Attributes:
        copy: The copy that is under way.
        known: Slots taken at some time in the past.
        since_known: Tokens announced since then.
        since_copy: Tokens announced since the copy set out.
    """

    copy: Copy
    known: int
    since_known: int = 0
    since_copy: int = 0


_watches: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Counts of a cache -> what is known about them, which dies with them."""


def check_room(counts: torch.Tensor, num_new: int, capacity: int, layer: str) -> None:
    """Refuses tokens that are about to be appended and do not fit, and everything after tokens that did not.

    Announcing tokens twice, or some that never come, does no harm but that a full cache is found out by waiting.

    Args:
        counts: Of the layer, int64 [B, 3].
        num_new: Tokens that are about to be appended; 0 where nobody knows.
        capacity: Slots of a row.
        layer: Its name.

    Raises:
        RuntimeError: Names layer, length and capacity.
    """
    if counts.is_meta:
        return  # a cache without numbers, whose ops check shapes
    if runs_behind(counts):
        if torch.cuda.is_current_stream_capturing():
            return  # what is captured runs later, and says by NaN what it has to say
        if _longest(counts, num_new) <= capacity:
            return
    length = read_length(counts)
    if runs_behind(counts):
        watch = _watches[counts]
        watch.known, watch.since_known = length, num_new
    if length + num_new > capacity:
        raise overflow_error(length, num_new, capacity, layer)


def check_nothing_lost(counts: torch.Tensor, capacity: int, layer: str) -> int:
    """The slots taken, for callers that need them and may wait for the device.

    Raises:
        RuntimeError: Tokens were lost.
    """
    length = read_length(counts)
    if length > capacity:
        raise overflow_error(length, 0, capacity, layer)
    return length


def runs_behind(counts: torch.Tensor) -> bool:
    """Whether the device is one that the host queues work for, and kernels of ours run on it: CUDA and ROCm.

    Beside what the reference takes on other devices, reading a number is nothing.
    """
    return counts.is_cuda


def read_length(counts: torch.Tensor) -> int:
    """Slots taken, those of lost tokens included. Waits for the device."""
    return int(counts[:, SLOTS].max())


def checked(run: Callable[..., Any], appends: Sequence[Append]) -> Callable[..., Any]:
    """A compiled graph that checks the room for what it appends when it is entered.

    Outside of the graph, so it is not in the CUDA graph that Inductor may make of it; the kernels inside mark the rows.
    """

    def call(*args: Any) -> Any:
        for append in appends:
            num_new, capacity = (args[x[0]] if isinstance(x, list) else x for x in (append.num_new, append.capacity))
            check_room(args[append.counts], num_new, capacity, append.layer)
        return run(*args)

    return call


def _longest(counts: torch.Tensor, num_new: int) -> int:
    """The most slots that may be taken once the new tokens are in. The first look at a cache waits for the device."""
    watch = _watches.get(counts)
    if watch is None:
        _watches[counts] = watch = _Watch(Copy(counts), read_length(counts))
    else:
        length = watch.copy.length()
        if length is not None:
            watch.known, watch.since_known = length, watch.since_copy
            watch.copy.start(counts)
            watch.since_copy = 0
    watch.since_known += num_new
    watch.since_copy += num_new
    return watch.known + watch.since_known
