"""The three ops that stand in a graph: schema, shape function and default implementation (the reference).

Torch only. Kernels attach themselves to a device key of the same ops, with the first call on such a device.
``innerq`` ops take a layer's buffers flat, in the order of :class:`~innerq_compile.numerics.layout.LayerState`, and the
settings as the string :attr:`InnerQConfig.spec <innerq_compile.numerics.config.InnerQConfig.spec>`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from innerq_compile.numerics import reference
from innerq_compile.numerics.arguments import check_append_kv, check_counts, check_decode_attention, check_dequantize_kv
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import SLOTS, LayerState

NAMESPACE = "innerq"

_BUFFERS = LayerState._fields
_READ = ", ".join(f"Tensor {name}" for name in _BUFFERS)
_MUTATED = ", ".join(f"Tensor({chr(ord('a') + i)}!) {name}" for i, name in enumerate(_BUFFERS))

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"append_kv(Tensor key, Tensor value, {_MUTATED}, SymInt capacity, str config) -> ()")
_library.define(f"dequantize_kv({_READ}, SymInt capacity, str config) -> (Tensor, Tensor)")
_library.define(
    f"decode_attention(Tensor query, {_READ}, Tensor? attn_mask, float sm_scale, SymInt capacity, str config, "
    "bool exact=False) -> Tensor"
)


def _append_kv(key: torch.Tensor, value: torch.Tensor, *args: object) -> None:
    state, capacity, config = _split(args)
    check_append_kv(key, value, state, capacity, config)
    _check_counts(state, capacity, config)
    check_overflow(state, key.shape[2], capacity)
    reference.append_kv(key, value, state, config, capacity)


def _dequantize_kv(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    state, capacity, config = _split(args)
    check_dequantize_kv(state, capacity, config)
    _check_counts(state, capacity, config)
    return reference.dequantize_kv(state, config, capacity)


def _decode_attention(query: torch.Tensor, *args: object) -> torch.Tensor:
    *buffers, attn_mask, sm_scale, capacity, spec = args[: len(_BUFFERS) + 4]
    state = LayerState(*buffers)  # type: ignore[arg-type]
    config = InnerQConfig.from_spec(spec)
    check_decode_attention(query, state, attn_mask, sm_scale, capacity, config)  # type: ignore[arg-type]
    _check_counts(state, capacity, config)  # type: ignore[arg-type]
    return reference.decode_attention(query, state, attn_mask, sm_scale, config, capacity)  # type: ignore[arg-type]


def _append_kv_fake(key: torch.Tensor, value: torch.Tensor, *args: object) -> None:
    return None


def _dequantize_kv_fake(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    state, capacity, _ = _split(args)
    batch, heads, _, head_dim = state.k_window.shape
    shape = (batch, heads, capacity, head_dim)
    return state.k_window.new_empty(shape), state.v_window.new_empty(shape)


def _decode_attention_fake(query: torch.Tensor, *args: object) -> torch.Tensor:
    return query.new_empty(query.shape)


def _split(args: tuple[object, ...]) -> tuple[LayerState, int, InnerQConfig]:
    *buffers, capacity, spec = args
    return LayerState(*buffers), capacity, InnerQConfig.from_spec(spec)  # type: ignore[arg-type,return-value]


def _check_counts(state: LayerState, capacity: int, config: InnerQConfig) -> None:
    if state.counts.device.type == "cpu":
        check_counts(state, capacity, config)


def check_overflow(state: LayerState, num_new: int, capacity: int) -> None:
    """Refuses an append that does not fit, before anything is written.

    On the CPU the length is there to be read. On an accelerator reading it would stall the decode loop, so there the
    op marks the rows (:func:`innerq_compile.numerics.reference.append_kv`) and the host finds out by
    :mod:`innerq_compile.cache.overflow`.

    Raises:
        RuntimeError: Names the capacity and the option that raises it.
    """
    if state.counts.device.type != "cpu":
        return
    length = int(state.counts[:, SLOTS].max())
    if length + num_new > capacity:
        raise overflow_error(length, num_new, capacity)


def overflow_error(length: int, num_new: int, capacity: int, layer: str = "") -> RuntimeError:
    """What is raised where ``num_new`` tokens do not fit behind ``length`` others, or those others did not fit."""
    where = f"{layer}: " if layer else ""
    if length > capacity:
        return RuntimeError(
            f"{where}InnerQ cache has lost tokens: it was given {length}, more than its capacity of {capacity}, and "
            "all that was computed from it since is NaN; build the cache with a larger max_cache_len, or empty it by "
            "reset()"
        )
    if length == 0:
        return RuntimeError(
            f"{where}InnerQ cache is too small: a prompt of {num_new} tokens does not fit its capacity of {capacity}; "
            f"call cache.reserve({num_new}) before, or build the cache with a larger max_cache_len"
        )
    return RuntimeError(
        f"{where}InnerQ cache is full: it holds {length} tokens, {num_new} more do not fit its capacity of {capacity}; "
        "call cache.reserve(num_tokens) before, or build the cache with a larger max_cache_len. (A cache without one "
        "grows under generate() and in uncompiled calls, but not inside a compiled call of the model.)"
    )


DEFAULTS: dict[str, Callable[..., Any]] = {
    "append_kv": _append_kv,
    "dequantize_kv": _dequantize_kv,
    "decode_attention": _decode_attention,
}
"""Op -> default implementation: what a kernel calls for a cache that it does not serve."""

KERNELS = {"cpu": "innerq_compile.kernels.cpu", "cuda": "innerq_compile.kernels.triton"}
"""Device type -> the module that has kernels for it. Its ``unavailable()`` attaches them, or warns and says why not.

By name, and imported with the first op on such a device: whoever imports the ops, however, gets the kernels, and this
module stays light."""


@functools.cache
def attach_kernels(device_type: str) -> None:
    """Attaches the kernels of a device, if it has any; a second call does nothing."""
    if device_type in KERNELS:
        import_module(KERNELS[device_type]).unavailable()


def _default(name: str) -> Callable[..., Any]:
    """The default implementation, which gives way to kernels that attach themselves on this call."""
    attached: set[str] = set()

    def call(*args: Any) -> Any:
        device_type = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        if device_type in KERNELS and device_type not in attached:
            attached.add(device_type)
            attach_kernels(device_type)
            return getattr(torch.ops.innerq, name).default(*args)
        return DEFAULTS[name](*args)

    return call


_FAKES: dict[str, Callable[..., Any]] = {
    "append_kv": _append_kv_fake,
    "dequantize_kv": _dequantize_kv_fake,
    "decode_attention": _decode_attention_fake,
}

for _name in DEFAULTS:
    _library.impl(_name, _default(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _FAKES[_name], lib=_library)

append_kv = torch.ops.innerq.append_kv.default
"""``append_kv(key, value, *state, capacity, config) -> None``: see
:func:`innerq_compile.numerics.reference.append_kv`."""

dequantize_kv = torch.ops.innerq.dequantize_kv.default
"""``dequantize_kv(*state, capacity, config) -> (keys, values)``: see
:func:`innerq_compile.numerics.reference.dequantize_kv`."""

decode_attention = torch.ops.innerq.decode_attention.default
"""``decode_attention(query, *state, attn_mask, sm_scale, capacity, config, exact=False) -> out``: see
:func:`innerq_compile.numerics.reference.decode_attention`. ``exact`` forbids a kernel to round queries and
probabilities to integers; the reference never does."""
