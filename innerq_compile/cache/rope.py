"""Which channels of a head a model's rotary embedding turns into each other, from its configuration and its code."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from innerq_compile.refused import Refused


def rope_pairs_of(text_config: Any) -> str:
    """The ``rope_pairs`` setting of a model: ``"half"``, ``"adjacent"``, or ``"off"`` where no pair spans the head.

    ``"off"`` stands for models without RoPE and for partial RoPE, whose pairs lie closer than half a head. The two
    dialects differ in one function of the model's code, which is asked. A model that has none is taken for ``"half"``;
    a wrong answer costs precision where channels differ much, nothing else.
    """
    if not _turns_whole_heads(text_config):
        return "off"
    name = type(text_config).__module__.replace("configuration_", "modeling_")
    try:
        code = importlib.import_module(name)
    except ImportError:
        return "half"
    if hasattr(code, "rotate_every_two"):
        return "adjacent"
    rotate = getattr(code, "rotate_half", None)
    # [-b, a] of a pair (a, b): the first channel of [0, 1, 2, 3] turns into its partner.
    return "adjacent" if rotate is not None and abs(int(rotate(torch.arange(4))[0])) == 1 else "half"


def head_dim_of(text_config: Any) -> int:
    """Channels of a head; many configurations leave it to be derived.

    Raises:
        Refused: A model without heads.
    """
    given = getattr(text_config, "head_dim", None)
    if not given and not getattr(text_config, "num_attention_heads", None):
        raise Refused(text_config.model_type, "its configuration names no attention heads")
    return int(given or text_config.hidden_size // text_config.num_attention_heads)


def _turns_whole_heads(text_config: Any) -> bool:
    parameters = getattr(text_config, "rope_parameters", None)
    if not parameters:
        rotary_dim = getattr(text_config, "rotary_dim", None)
        return rotary_dim is not None and rotary_dim == head_dim_of(text_config)
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return all(kind.get("partial_rotary_factor", 1.0) == 1.0 for kind in by_layer_type or [parameters])
