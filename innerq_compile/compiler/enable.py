"""``enable(model)``: one call, and ``model.generate()`` decodes from a quantized cache, compiled. And its undoing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import transformers
from transformers import CompileConfig, DynamicCache, PreTrainedModel

from innerq_compile.cache.innerq_cache import InnerQCache
from innerq_compile.cache.live_caches import new_weights, weights_changed
from innerq_compile.cache.mark import check_folded, mark_of
from innerq_compile.cache.room import MIN_CAPACITY
from innerq_compile.compat.hf_transformers import (
    CACHE_HOOK,
    compile_on_every_device,
    compiled_call,
    forget_compiled,
    set_compiled_call,
)
from innerq_compile.compiler.backend import mode_options
from innerq_compile.compiler.self_check import self_check
from innerq_compile.compiler.support import decoder_of, refuse_unsupported
from innerq_compile.passes.key_norm.fold_captured import unfold_captured

CAPACITIES_PER_DOUBLING = 8
"""A cache that ``enable`` sizes is at most an eighth larger than its call needs, and few sizes ever compile."""

_RESUMES = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)
"""Whether this ``generate()`` goes on behind a cache in every mode, at least where it is given only new ids; 5.17 does
not, what lies between is not known."""

_SWITCH = "_innerq_switch"
_FOLD = "_innerq_fold"


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
    ``cache_implementation`` keep their meaning: a ``StaticCache`` stays in 16 bits. A second call replaces the first
    one's settings. Of a PEFT model the model inside is enabled, with its adapters.

    Args:
        preset: Settings of the cache, see :data:`innerq_compile.numerics.config.PRESETS`.
        max_cache_len: Capacity of the cache in tokens. ``None`` sizes each cache for its call, rounded up so that few
            capacities ever compile.
        exact: Forbids kernels to round queries and probabilities (on a CPU to integers, on a GPU to float16).
        mode: One of Inductor's modes, ``"reduce-overhead"`` for instance.
        check: Decodes a few tokens first and refuses a model that computes something else over such a cache, see
            :func:`innerq_compile.compiler.self_check.self_check`. It costs about five short forwards.
        **overrides: Single settings of :class:`~innerq_compile.numerics.config.InnerQConfig`. ``key_norm="folded"``
            folds the key norm into the weights with the first prompt, in place, until :func:`disable` puts them back,
            unless :func:`~innerq_compile.fold_key_norm` did it before.

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
    options = {"exact": exact, "static_cache": "off", **mode_options(mode)}
    if check:
        self_check(model, make_cache)
    _put_back(model)
    if fold_later:
        setattr(model, _FOLD, getattr(model, _FOLD, next(_fold_ids)))
        options |= {"key_norm": "folded", "fold_id": getattr(model, _FOLD)}
    else:
        _unfold(model, "enable()")
    switch = _Switch(compiled_call(model), model.generation_config.compile_config)
    # On every device: generate() would warn, on a CPU, that it will not compile what is compiled already.
    model.generation_config.compile_config = compile_on_every_device(
        CompileConfig(backend="innerq", mode=None, options=options)
    )
    model.compile(backend="innerq", options=options)
    prepare = getattr(model, CACHE_HOOK)
    setattr(model, CACHE_HOOK, functools.partial(_prepare_cache, prepare, make_cache, max_cache_len))
    setattr(model, _SWITCH, switch)
    return given


_fold_ids = itertools.count(1)


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Puts back what :func:`enable` replaced; does nothing to a model that was never enabled. Returns the model.

    Weights that ``key_norm="folded"`` changed with the first prompt are what they were, bit for bit; a cache that was
    filled with the folded ones refuses to be used. What :func:`~innerq_compile.fold_key_norm` did stays: its handle
    has ``restore()``.
    """
    decoder = decoder_of(model)
    _put_back(decoder)
    _unfold(decoder, "disable()")
    return model


def _unfold(model: PreTrainedModel, what: str) -> None:
    model.__dict__.pop(_FOLD, None)
    if unfold_captured(model.parameters()):
        weights_changed(model.config, what, now=new_weights())


def _put_back(model: PreTrainedModel) -> None:
    switch: _Switch | None = getattr(model, _SWITCH, None)
    if switch is not None:
        model.generation_config.compile_config = switch.compile_config
        for name in (CACHE_HOOK, _SWITCH):
            model.__dict__.pop(name, None)
        forget_compiled(model)
        if switch.compiled_call is not None:
            set_compiled_call(model, switch.compiled_call)


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
        new_cache = make_cache(max_cache_len=_capacity(max_cache_length, max_cache_len))
        new_cache.grows_per_call = max_cache_len is None
        model_kwargs["past_key_values"] = new_cache
    elif isinstance(model_kwargs.get("past_key_values"), InnerQCache):
        _make_room(model_kwargs["past_key_values"], generation_config, model_kwargs, generation_mode, max_cache_length)
    prepared = prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs)
    cache, compile_config = model_kwargs.get("past_key_values"), generation_config.compile_config
    in_vain = cache is None or not cache.is_compileable or type(cache) is DynamicCache
    if in_vain and compile_config is not None and compile_config.backend == "innerq":
        # generate() compiles no decode step for these and would warn about a compile_config that enable() has set.
        generation_config.compile_config = None
    return prepared


def _make_room(
    cache: InnerQCache,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    max_cache_length: int,
) -> None:
    """Has a cache that comes from an earlier call, or from the user, hold all that this call may add; or refuses.

    While ``generate()`` runs, capacities stay: nothing reads the length back from the device between two tokens.
    """
    held = cache.num_tokens()
    least, most = _tokens_after(held, generation_config, model_kwargs, max_cache_length)
    _refuse_what_starts_over(held, generation_config, generation_mode, is_whole=least == max_cache_length)
    if cache.grows_per_call:
        cache.reserve(_capacity(most, None))
    elif cache.is_bounded and cache.max_cache_len is not None and least > cache.max_cache_len:
        raise ValueError(
            f"this generate() call may need {least} tokens of cache; the cache in past_key_values holds {held} and was "
            f"made for max_cache_len={cache.max_cache_len}. Lower max_new_tokens, or call cache.reserve({least}) before"
        )


def _refuse_what_starts_over(held: int, generation_config: Any, generation_mode: Any, *, is_whole: bool) -> None:
    """Two ways of ``generate()`` may run ids through the cache that it holds already: wrong tokens, with any cache."""
    is_assisted = getattr(generation_mode, "value", None) == "assisted_generation"
    is_chunked = generation_config.prefill_chunk_size is not None
    if not held or not (is_assisted and (is_whole or not _RESUMES) or is_chunked and is_whole and not _RESUMES):
        return
    way = "assisted decoding" if is_assisted else "prefill_chunk_size"
    advice = (
        "Give it only the new ids, with attention_mask of the whole and max_new_tokens, or do" if is_whole else "Do"
    )
    raise ValueError(
        f"the cache in past_key_values holds {held} tokens, and {way} of transformers {transformers.__version__} would "
        f"not go on behind them: wrong tokens, with any cache. {advice} without it this turn"
    )


def _tokens_after(
    held: int, generation_config: Any, model_kwargs: dict[str, Any], max_cache_length: int
) -> tuple[int, int]:
    """Fewest and most tokens that a cache which holds ``held`` may have to hold when the call is over.

    ``max_cache_length`` counts from the first of the ids that the call was given. These are the whole history, or only
    what is new behind a mask of the whole history, and what transformers hands over does not always tell which.
    """
    with_past = held + max_cache_length
    mask = model_kwargs.get("attention_mask")
    columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    if not held or columns is None or model_kwargs.get("inputs_embeds") is not None:
        return max_cache_length, max_cache_length if not held else with_past
    if generation_config.max_new_tokens is None:
        return (max_cache_length if columns <= max_cache_length else with_past), with_past
    given = max_cache_length + 1 - generation_config.max_new_tokens
    needed = max_cache_length if given == columns else with_past
    return needed, needed


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
