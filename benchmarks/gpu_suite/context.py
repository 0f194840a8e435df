"""What a section gets: device, time left, and a place for its rows that survives its own crash."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass
class Context:
    """The running section's surroundings.

    Attributes:
        part: The one of its :attr:`~gpu_suite.plan.Section.parts` that this process does.
        rows: File of one JSON object per line; flushed after each, so that a killed section keeps what it had.
        deadline: ``time.monotonic()`` at which the section should have ended by itself.
        gate: Files that a held section waits with, or ``None``.
    """

    device: torch.device
    dry: bool
    part: str
    rows: Path
    deadline: float
    gate: Path | None = None

    def emit(self, table: str, **row: Any) -> None:
        """Adds a row to one of the section's tables."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, **row}) + "\n")

    def without_broken(self, presets: tuple[str, ...]) -> tuple[str, ...]:
        """Those presets whose kernels did not end the process that checked them."""
        broken = os.environ.get(BROKEN, "").split(",")
        return tuple(preset for preset in presets if preset not in broken)

    def seconds_left(self) -> float:
        """Until the section should end."""
        return self.deadline - time.monotonic()

    def wait_for_turn(self) -> bool:
        """Says that this process is prepared and waits until the GPU is its own. False: its turn never came."""
        if self.gate is None:
            return True
        self.gate.with_suffix(".ready").touch()
        go = self.gate.with_suffix(".go")
        while not go.exists():
            if self.seconds_left() < 0:
                return False
            time.sleep(0.05)
        self.deadline = time.monotonic() + float(go.read_text())
        return True


BROKEN = "GPU_SUITE_BROKEN"
"""Environment variable: presets whose checks ended their process, by commas. Their kernels would end others too."""


def use_kernels() -> None:
    """Attaches the Triton kernels to the ops, as the first call of one would.

    Raises:
        RuntimeError: They cannot be used: the suite would check and measure the reference.
    """
    from innerq_compile.kernels import triton

    if reason := triton.unavailable():
        raise RuntimeError(reason)


def use_interpreter() -> None:
    """Has Triton's interpreter, which a dry run uses, do what the device does."""
    from innerq_compile.kernels.triton import interpreter

    interpreter.repair()
