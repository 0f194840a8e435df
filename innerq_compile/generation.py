"""``enable(model)``: one call, and ``model.generate()`` decodes from a quantized cache, compiled. And its undoing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from transformers import CompileConfig, DynamicCache, PreTrainedModel

from innerq_compile.backend import mode_options
from innerq_compile.cache import InnerQCache
from innerq_compile.folded import check_folded, mark_of
from innerq_compile.self_check import self_check
from innerq_compile.support import decoder_of, refuse_unsupported

MIN_CAPACITY = 512
CAPACITIES_PER_DOUBLING = 8
"""A cache that ``enable`` sizes is at most an eighth larger than its call needs, and few sizes ever compile."""

_SWITCH = "_innerq_switch"
_HOOK = "_prepare_cache_for_generation"


@dataclasses.dataclass(frozen=True)
class _Switch:
    """What ``enable`` replaced, so that ``disable`` can put it back."""

    compiled_call: Callable[..., Any] | None
    compile_config: CompileConfig | None


def enable(
    model: PreTrainedModel,
    *,
    preset: str = "base",
    max_cache_len: int | None = None,
    exact: bool = False,
    mode: str | None = None,
    check: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Makes ``model.generate()`` decode from a quantized KV cache, compiled by the ``innerq`` backend.

    The model is compiled in place, its ``generation_config`` names the backend, and :class:`InnerQCache` becomes the
    cache that ``generate()`` uses when it is given none. ``past_key_values``, ``use_cache=False`` and
    ``cache_implementation`` keep their meaning. A second call replaces the first one's settings. Of a PEFT model the
    model inside is enabled, with its adapters.

    Args:
        preset: Settings of the cache, see :data:`innerq_compile.config.PRESETS`.
        max_cache_len: Capacity of the cache in tokens. ``None`` sizes each cache for its call, rounded up so that few
            capacities ever compile.
        exact: Forbids kernels to round queries and probabilities (on a CPU to integers, on a GPU to float16).
        mode: One of Inductor's modes, ``"reduce-overhead"`` for instance.
        check: Decodes a few tokens first and refuses a model that computes something else over such a cache, see
            :func:`innerq_compile.self_check.self_check`. It costs about five short forwards.
        **overrides: Single settings of :class:`~innerq_compile.config.InnerQConfig`. ``key_norm="folded"`` folds the
            key norm into the weights with the first prompt, in place, unless
            :func:`~innerq_compile.fold_key_norm` did it before.

    Returns:
        The same model.

    Raises:
        TypeError: A module that cannot ``generate()`` from a decoder cache.
        Refused: A model that cannot decode from such a cache, with the reason. A ``ValueError`` too.
        ValueError: An unknown preset or setting, one out of range, or a key norm folded into other weights than these.
    """
    given, model = model, decoder_of(model)
    refuse_unsupported(model)
    check_folded(model)
    fold_later = overrides.get("key_norm") == "folded" and mark_of(model.config) is None
    if fold_later:
        overrides["key_norm"] = "runtime"
    make_cache = functools.partial(InnerQCache, model.config, preset=preset, **overrides)
    make_cache()  # refuses bad settings now; nothing is allocated before the first token
    if max_cache_len is not None:
        make_cache(max_cache_len=max_cache_len)
    # torch.compile takes a mode or options, not both, so the mode is spelled out as options.
    options = {"exact": exact, **({"key_norm": "folded"} if fold_later else {}), **mode_options(mode)}
    if check:
        self_check(model, make_cache)

    disable(model)
    switch = _Switch(model._compiled_call_impl, model.generation_config.compile_config)
    compile_config = CompileConfig(backend="innerq", mode=None, options=options)
    # Otherwise generate() warns, on a CPU, that it will not compile what is compiled already.
    compile_config._compile_all_devices = True
    model.generation_config.compile_config = compile_config
    model.compile(backend="innerq", options=options)
    prepare = getattr(model, _HOOK)
    setattr(model, _HOOK, functools.partial(_prepare_cache, prepare, make_cache, max_cache_len))
    setattr(model, _SWITCH, switch)
    return given


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Puts back what :func:`enable` replaced; does nothing to a model that was never enabled. Returns the model."""
    given, model = model, decoder_of(model)
    switch: _Switch | None = getattr(model, _SWITCH, None)
    if switch is not None:
        model.generation_config.compile_config = switch.compile_config
        # The last two: where generate() keeps the compiled decode step of its last compile_config.
        for name in (_HOOK, _SWITCH, "_compiled_call_impl", "_compiled_call", "_last_compile_config"):
            model.__dict__.pop(name, None)
        if switch.compiled_call is not None:
            model._compiled_call_impl = switch.compiled_call
    return given


def _prepare_cache(
    prepare: Callable[..., Any],
    make_cache: Callable[..., InnerQCache],
    max_cache_len: int | None,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stands in for the method of ``GenerationMixin``: adds our cache where transformers would choose one."""
    choose = (
        model_kwargs.get("past_key_values") is None
        and generation_config.use_cache is not False
        and generation_config.cache_implementation is None
        and not getattr(generation_config, "is_assistant", False)
    )
    if choose:
        model_kwargs["past_key_values"] = make_cache(max_cache_len=_capacity(max_cache_length, max_cache_len))
    prepared = prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs)
    cache, compile_config = model_kwargs.get("past_key_values"), generation_config.compile_config
    in_vain = cache is None or not cache.is_compileable or type(cache) is DynamicCache
    if in_vain and compile_config is not None and compile_config.backend == "innerq":
        # generate() compiles no decode step for these and would warn about a compile_config that enable() has set.
        generation_config.compile_config = None
    return prepared


def _capacity(needed: int, max_cache_len: int | None) -> int:
    if max_cache_len is None:
        step = max(MIN_CAPACITY, 1 << (needed - 1).bit_length()) // (2 * CAPACITIES_PER_DOUBLING)
        return max(MIN_CAPACITY, -(-needed // step) * step)
    if needed > max_cache_len:
        raise ValueError(
            f"this generate() call may need {needed} tokens of cache, enable() was given max_cache_len={max_cache_len}"
            "; lower max_new_tokens or enable the model with more"
        )
    return max_cache_len
