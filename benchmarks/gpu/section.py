"""What a unit gets: its device, the time left, and a place for its rows that survives its own crash."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
LOST = ("illegal memory access", "illegal instruction", "illegal address", "misaligned address", "launch failure",
        "device-side assert")  # fmt: skip
"""Words of the errors after which nothing more can be run on the GPU in this process."""


@dataclasses.dataclass
class Section:
    """The running unit: its part, the file of its rows, and the ``time.time()`` at which it should have ended."""

    part: str
    rows: Path
    deadline: float
    dry: bool

    @property
    def device(self) -> torch.device:
        """The first GPU; dry, the CPU."""
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of models and caches: Triton's interpreter and CPUs are at their best in float32."""
        return torch.float32 if self.dry else torch.bfloat16

    def prepare(self) -> None:
        """Attaches the Triton kernels to the ops; dry, has Triton's interpreter do what a device does.

        Raises:
            RuntimeError: The kernels cannot be used: the reference would be checked and measured.
        """
        torch.manual_seed(0)
        if self.dry:
            from innerq_compile.kernels.triton import interpreter

            interpreter.repair()
            return
        from innerq_compile.kernels import triton

        torch.cuda.set_device(0)
        if reason := triton.unavailable():
            raise RuntimeError(reason)
        triton.register()

    def emit(self, table: str, **row: Any) -> None:
        """Adds a row to a table of the result."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"table": table, **row}))  # whatever ended the last unit in a line

    def seconds_left(self) -> float:
        """Until the unit should end; dry, always enough."""
        return 1e9 if self.dry else self.deadline - time.time()

    @contextlib.contextmanager
    def attempt(self, **what: Any) -> Iterator[None]:
        """What fails inside is a row of ``failed``, and the next thing is still worth measuring on a GPU that lives."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 whatever a kernel or a library raises is its row
            self.emit("failed", **what, reason=f"{type(error).__name__}: {error}"[:500])
            if any(words in str(error) for words in LOST):
                raise
        finally:
            gc.collect()
            if not self.dry:
                torch.cuda.empty_cache()

    def free_bytes(self) -> float:
        """Of the GPU's memory."""
        return float("inf") if self.dry else torch.cuda.mem_get_info()[0]
