"""Finds accesses that nothing puts in order: one thread changes a byte that another touches, no barrier in between."""

from __future__ import annotations

import numpy as np

WARP = 32
NOBODY = -1


class RaceError(Exception):
    """Two threads meet at a byte, at least one of them changes it, and the hardware may let either come first."""


class Clock:
    """How many barriers each lane has passed: those of its whole program, and those or its warp's own."""

    def __init__(self, lanes: int) -> None:
        self.program, self.warp = np.zeros((2, lanes), np.int64)

    def pass_program(self, lanes: np.ndarray) -> None:
        """A barrier of all threads puts the threads of a warp in order too."""
        self.program[lanes] += 1
        self.warp[lanes] += 1

    def pass_warp(self, lanes: np.ndarray) -> None:
        """bar.warp.sync."""
        self.warp[lanes] += 1


class Shadow:
    """For every byte who wrote it last, which threads of each warp have read it since, and when.

    Args:
        size: Number of bytes. No byte may belong to two programs.
        threads: Of a program.
        clock: The machine's.
    """

    def __init__(self, size: int, threads: int, clock: Clock) -> None:
        self.clock, self.threads = clock, threads
        self.writer = np.full(size, NOBODY)
        self.written = np.zeros((2, size), np.int64)  # when: program, warp
        self.reader = np.full((threads // WARP, size), NOBODY)
        self.read_at = np.zeros((2, threads // WARP, size), np.int64)
        self.is_shared = np.zeros((threads // WARP, size), bool)  # several threads of the warp have read it

    def read(self, lanes: np.ndarray, at: np.ndarray, size: int) -> None:
        """Lanes read ``size`` bytes each.

        Raises:
            RaceError: Another thread wrote one of them, and no barrier came since.
        """
        lanes, at = _spread(lanes, at, size)
        writer = self.writer[at]
        unordered = (writer != NOBODY) & (writer != lanes) & self._same_time(lanes, writer, *self.written[:, at])
        _refuse(unordered, lanes, at, "reads", f"that thread {writer[unordered][:1]} has just written")
        warp, now = lanes % self.threads // WARP, self.clock.warp[lanes]
        before, fresh = self.reader[warp, at], self.read_at[1, warp, at] != now
        self.is_shared[warp[fresh], at[fresh]] = False
        self.reader[warp, at] = lanes
        others = (self.reader[warp, at] != lanes) | (~fresh & (before != lanes) & (before != NOBODY))
        self.is_shared[warp[others], at[others]] = True
        self.read_at[0, warp, at], self.read_at[1, warp, at] = self.clock.program[lanes], now

    def write(self, lanes: np.ndarray, at: np.ndarray, size: int, changes: np.ndarray) -> None:
        """Lanes write ``size`` bytes each; ``changes`` bool [lanes, size]: to another value than the byte has.

        Raises:
            RaceError: Another thread wrote or read one of them that changes, and no barrier came since.
        """
        lanes, at = _spread(lanes, at, size)
        changes, writer = changes.reshape(-1), self.writer[at]
        unordered = (writer != NOBODY) & (writer != lanes) & self._same_time(lanes, writer, *self.written[:, at])
        _refuse(unordered & changes, lanes, at, "writes", f"that thread {writer[unordered][:1]} has just written")
        for warp in range(self.threads // WARP):
            reader = self.reader[warp, at]
            recent = self._same_time(lanes, reader, *self.read_at[:, warp, at])
            is_own = lanes // WARP == reader // WARP
            unordered = (
                (reader != NOBODY) & recent & np.where(is_own, (reader != lanes) | self.is_shared[warp, at], True)
            )
            _refuse(unordered & changes, lanes, at, "writes", f"that thread {reader[unordered][:1]} has just read")
        self.writer[at], self.written[0, at], self.written[1, at] = (
            lanes,
            self.clock.program[lanes],
            self.clock.warp[lanes],
        )

    def _same_time(self, lanes: np.ndarray, others: np.ndarray, program: np.ndarray, warp: np.ndarray) -> np.ndarray:
        """Whether no barrier has come between now and what ``others`` did at those times."""
        same_warp = lanes // WARP == others // WARP
        return np.where(same_warp, warp == self.clock.warp[lanes], program == self.clock.program[lanes])


def _spread(lanes: np.ndarray, at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Lanes and places, byte by byte."""
    return np.repeat(lanes, size), (at[:, None] + np.arange(size)).reshape(-1)


def _refuse(wrong: np.ndarray, lanes: np.ndarray, at: np.ndarray, does: str, what: str) -> None:
    if wrong.any():
        raise RaceError(f"thread {lanes[wrong][0]} {does} byte {at[wrong][0]} {what} ({wrong.sum()} bytes)")
