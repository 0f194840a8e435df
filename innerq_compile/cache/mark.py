"""The mark of a model whose key norm is folded into its weights, and the check that the two belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

CONFIG_KEY = "innerq_key_norm"
"""Attribute of a folded model's (text) configuration; ``save_pretrained`` and ``from_pretrained`` carry it along."""

TOLERANCE = 0.01
"""How far the root mean square of a folded parameter may lie from the recorded one. A cast to 16 bit moves it by 1e-4,
another model's weights, or the same ones before folding, lie much further off."""


def mark_of(config: Any) -> Mapping[str, Any] | None:
    """What a configuration says about folding; ``None`` for a model as it was published."""
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text_config, CONFIG_KEY, None)


def set_mark(config: Any, mark: Mapping[str, Any] | None) -> None:
    """Writes a mark, or removes it."""
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if mark is not None:
        setattr(text_config, CONFIG_KEY, dict(mark))
    elif hasattr(text_config, CONFIG_KEY):
        delattr(text_config, CONFIG_KEY)


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Root mean square of each parameter, by name: the same in every dtype, as far as its rounding goes."""
    return {name: float(f"{p.detach().float().square().mean().sqrt():.5g}") for name, p in parameters.items()}


def check_fingerprint(recorded: Mapping[str, float], parameters: Mapping[str, torch.Tensor]) -> None:
    """Compares a recorded fingerprint with the parameters that are there.

    Raises:
        ValueError: Naming the first parameter that is missing or differs.
    """
    missing = sorted(set(recorded) - set(parameters))
    if missing:
        raise ValueError(f"the folded key norm belongs to another model: there is no parameter {missing[0]}")
    found = fingerprint({name: parameters[name] for name in recorded})
    for name, value in recorded.items():
        if not abs(found[name] - value) <= TOLERANCE * abs(value):
            raise ValueError(
                f"the folded key norm belongs to other weights: the root mean square of {name} is {found[name]}, "
                f"recorded was {value}"
            )


def check_folded(model: Any) -> None:
    """Checks that a model marked as folded holds the weights it was folded with. Does nothing for an unmarked model.

    Raises:
        ValueError: Naming the parameter that differs.
    """
    mark = mark_of(model.config)
    if mark is not None:
        check_fingerprint(mark["fingerprint"], dict(model.named_parameters(remove_duplicate=False)))
