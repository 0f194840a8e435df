"""Every tensor that a cache layer keeps, whatever kind of layer it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def replace_tensors(layer: object, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Puts ``change(tensor)`` in the place of every tensor of a layer, also of those in its tuples, lists and dicts."""
    for name, value in vars(layer).items():
        setattr(layer, name, _replaced(value, change))


def tensors_of(layer: object) -> list[torch.Tensor]:
    """Every tensor of a layer."""
    found: list[torch.Tensor] = []
    front = list(vars(layer).values())
    while front:
        value = front.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            front.extend(value)
        elif isinstance(value, dict):
            front.extend(value.values())
    return found


def may_be_changed_anywhere() -> contextlib.AbstractContextManager[object]:
    """A context whose new tensors can be changed in place outside of ``torch.inference_mode()`` as well as inside.

    Where a graph is traced it has no effect: Dynamo knows nothing of the mode.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def leave_inference_mode(layer: object) -> None:
    """Copies what a compiled call allocated under ``torch.inference_mode()`` and is now to be changed outside of it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    if any(tensor.is_inference() for tensor in tensors_of(layer)):
        replace_tensors(layer, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def _replaced(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _replaced(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, change) for item in value)
    return value
