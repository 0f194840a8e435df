"""Global and shared memory as byte arrays: every access lies in a tensor and is aligned, or the emulation ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ptx.races import Clock, Shadow

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = 0xFF
"""What memory holds that nobody wrote: NaN in every float format."""


class MemoryAccessError(Exception):
    """An access that real memory would refuse, or answer with somebody else's bytes."""


class Memory:
    """Bytes, and how the addresses of a group of lanes become places in them."""

    def __init__(self, content: np.ndarray) -> None:
        self.content = content
        self.shadow: Shadow | None = None

    def places(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Index of each access' first byte.

        Raises:
            MemoryAccessError: One is out of bounds.
        """
        raise NotImplementedError

    def dense(self, at: np.ndarray) -> np.ndarray:
        """The same places, numbered without gaps."""
        return at

    def watch(self, threads: int, clock: Clock) -> None:
        """Checks all accesses from now on for races between threads of a program."""
        raise NotImplementedError

    def load(self, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int = 1) -> list[np.ndarray]:
        """``count`` neighbouring unsigned numbers of ``width`` bytes for every lane."""
        at = self._aligned_places(lanes, addresses, width * count)
        if self.shadow:
            self.shadow.read(lanes, self.dense(at), width * count)
        words = self.content.view(UNSIGNED[width])
        return [words[at // width + i] for i in range(count)]

    def store(self, lanes: np.ndarray, addresses: np.ndarray, values: Sequence[np.ndarray]) -> None:
        """Writes ``values``, one array of unsigned numbers for each neighbour; of lanes that collide the last wins."""
        width = values[0].dtype.itemsize
        at = self._aligned_places(lanes, addresses, width * len(values))
        if self.shadow:
            new, places = np.stack(values, 1).view(np.uint8), at[:, None] + np.arange(width * len(values))
            self.shadow.write(lanes, self.dense(at), width * len(values), new != self.content[places])
        words = self.content.view(UNSIGNED[width])
        for i, value in enumerate(values):
            words[at // width + i] = value

    def _aligned_places(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        misaligned = addresses % np.uint64(size) != 0
        if misaligned.any():
            raise MemoryAccessError(
                f"{size} bytes at misaligned {addresses[misaligned][0]:#x} ({misaligned.sum()} lanes)"
            )
        return self.places(lanes, addresses, size)


class SharedMemory(Memory):
    """One piece of ``size`` bytes for each program; addresses begin at :data:`BASE`, as on a GPU since Hopper."""

    BASE = 1024

    def __init__(self, size: int, ctas: int, threads: int) -> None:
        self.size, self.threads, self.stride = size, threads, -(-size // 16) * 16
        super().__init__(np.full(self.stride * ctas, POISON, np.uint8))

    def places(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        offsets = addresses.astype(np.int64) - self.BASE
        outside = (offsets < 0) | (offsets + size > self.size)
        if outside.any():
            raise MemoryAccessError(f"{size} bytes at {offsets[outside][0]} of {self.size} shared bytes")
        return lanes // self.threads * self.stride + offsets

    def watch(self, threads: int, clock: Clock) -> None:
        self.shadow = Shadow(self.content.size, threads, clock)


class GlobalMemory(Memory):
    """Tensors where they are, under addresses far apart, above 2**32 and no more aligned than Triton assumes."""

    GAP = 1 << 33

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(np.asarray(_WholeMemory()))
        self._extents: dict[int, tuple[int, int]] = {}
        for tensor in tensors:
            begin, end = _extent(tensor)
            first, last = self._extents.get(_key(tensor), (begin, end))
            self._extents[_key(tensor)] = min(first, begin), max(last, end)
        begins, ends = np.array(list(self._extents.values()), np.int64).reshape(-1, 2).T
        self._sizes = ends - begins
        room = np.array([0, *self._sizes[:-1]]) // 32 * 32 + self.GAP
        self._bases = (np.cumsum(room) + 16 + begins % 16).astype(np.uint64)
        self._begins = begins

    def address(self, tensor: torch.Tensor) -> int:
        """Where the tensor's first element lies."""
        index = list(self._extents).index(_key(tensor))
        return int(self._bases[index]) + _extent(tensor)[0] - int(self._begins[index])

    def places(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        index = np.searchsorted(self._bases, addresses, side="right") - 1
        offsets = (addresses - self._bases[index]).astype(np.int64)
        outside = (index < 0) | (offsets + size > self._sizes[index])
        if outside.any():
            i = np.flatnonzero(outside)[0]
            raise MemoryAccessError(
                f"{size} bytes at {addresses[i]:#x}, {offsets[i]} bytes into a tensor of {self._sizes[index[i]]} "
                f"(lane {lanes[i]} and {outside.sum() - 1} others)"
            )
        return self._begins[index] + offsets - _WholeMemory.BEGIN

    def dense(self, at: np.ndarray) -> np.ndarray:
        order = np.argsort(self._begins)
        index = order[np.searchsorted(self._begins[order], at + _WholeMemory.BEGIN, side="right") - 1]
        starts = np.cumsum([0, *self._sizes])
        return at + _WholeMemory.BEGIN - self._begins[index] + starts[index]

    def watch(self, threads: int, clock: Clock) -> None:
        self.shadow = Shadow(int(self._sizes.sum()), threads, clock)


class _WholeMemory:
    """All that this process can address, as one array: tensors are read and written where they are."""

    BEGIN, END = 64, 1 << 47
    __array_interface__ = {"version": 3, "typestr": "|u1", "data": (BEGIN, False), "shape": (END - BEGIN,)}


def _key(tensor: torch.Tensor) -> int:
    """Tensors that share memory have one key; an empty one has a place of its own, of no length."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor's elements, and the one past the last."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    span = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (span + 1) * tensor.element_size()
