"""Whether new tokens fit: capacities of caches that grow, and the check in front of a write into a fixed buffer."""

from __future__ import annotations

from typing import Any

import torch

from innerq_compile import ops
from innerq_compile.numerics.config import BLOCK

MIN_CAPACITY = 512
"""Tokens a growing cache starts with, at least: below that the windows outweigh the packed part anyway."""

_STEP = 8 * BLOCK


def first_capacity(num_tokens: int) -> int:
    """Tokens that a growing cache allocates for a prompt of ``num_tokens``."""
    return max(MIN_CAPACITY, _round_up(2 * num_tokens))


def grown_capacity(capacity: int, num_tokens: int) -> int:
    """Tokens that a growing cache allocates when ``num_tokens`` do not fit ``capacity``: twice as many, at least."""
    return max(2 * capacity, MIN_CAPACITY, _round_up(num_tokens))


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // _STEP) * _STEP


def check_tokens(name: str, number: Any, expected: str) -> None:
    """Refuses what is no number of tokens.

    Raises:
        ValueError: Names the argument, what was expected and what came.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{name} must be {expected}, got {number!r}")


def _check_room(length: torch.Tensor, num_new: int, capacity: int) -> None:
    held = int(length.reshape(-1)[0])
    if held + num_new > capacity:
        raise ops.overflow_error(held, num_new, capacity)


_library = torch.library.Library(ops.NAMESPACE, "FRAGMENT")
# It changes nothing. Declared as a mutation, it is neither dropped for having no result nor moved behind the write.
_library.define("check_room(Tensor(a!) length, SymInt num_new, SymInt capacity) -> ()")
_library.impl("check_room", _check_room, "CompositeExplicitAutograd")
torch.library.register_fake(f"{ops.NAMESPACE}::check_room", lambda length, num_new, capacity: None, lib=_library)


def check_room(length: torch.Tensor, num_new: int, capacity: int) -> None:
    """Refuses a write of ``num_new`` tokens that would go past the end, before anything is written; compiled too.

    Without it Inductor's own check of an index throws in a worker thread, which ends the process. On an accelerator
    reading the length would stall the decode loop, so there it is left to the device's own check.

    Args:
        length: Tokens held, in the first element of an int64 tensor of any shape.

    Raises:
        RuntimeError: Names length and capacity.
    """
    if length.device.type == "cpu":
        torch.ops.innerq.check_room(length, num_new, capacity)
