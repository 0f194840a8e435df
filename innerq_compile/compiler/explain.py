"""``explain(model)``: which layers of a model will decode from packed codes, and why the others will not."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from transformers import Cache, PreTrainedModel

from innerq_compile.cache.innerq_cache import InnerQCache
from innerq_compile.compat.hf_transformers import attn_implementation
from innerq_compile.compiler.self_check import self_check
from innerq_compile.compiler.support import decoder_of, refuse_unsupported
from innerq_compile.passes.decode import run_passes
from innerq_compile.passes.decode.capture_static_cache import capture_static_cache
from innerq_compile.passes.decode.dynamic_cache import find_dynamic_caches
from innerq_compile.passes.report import LEFT, Report, SiteReport
from innerq_compile.refused import Refused

PROMPT_TOKENS = 8

LEFT_ALONE = "as its owner chose it: enable() quantizes the caches that it makes itself"
"""Of a ``StaticCache`` that an enabled model is given."""


def explain(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    *,
    past_key_values: Cache | None = None,
    preset: str = "base",
    **overrides: Any,
) -> Report:
    """Runs a short prefill and one decode step through the passes, without compiling anything.

    Args:
        model: Left as it is.
        input_ids: A prompt [B, M]; a few zeros unless told.
        past_key_values: An empty cache of yours, to see what becomes of it; it is filled. An :class:`InnerQCache` with
            the settings below unless told.
        preset: Settings of the cache, see :data:`innerq_compile.numerics.config.PRESETS`.
        **overrides: Single settings of :class:`~innerq_compile.numerics.config.InnerQConfig`.

    Returns:
        One entry per attention layer. Layers that keep 16-bit buffers are ``left``. Of a model that
        :func:`~innerq_compile.enable` refuses, only the refusal.

    Raises:
        TypeError: A module that cannot ``generate()`` from a decoder cache.
        ValueError: An unknown preset or setting, or one out of range.
    """
    model = decoder_of(model)
    if past_key_values is None:
        try:
            refuse_unsupported(model)
            make_cache = functools.partial(InnerQCache, model.config, preset=preset, **overrides)
            make_cache()  # bad settings are the caller's fault and not the model's
            self_check(model, make_cache)
        except Refused as refusal:
            return Report(note=f"enable() refuses this model: {refusal}")
    if input_ids is None:
        input_ids = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long, device=model.device)
    ours = InnerQCache(model.config, preset=preset, max_cache_len=input_ids.shape[1] + 1, **overrides)
    cache = ours if past_key_values is None else past_key_values
    settings = getattr(getattr(model.generation_config, "compile_config", None), "options", None) or {}
    kept = LEFT_ALONE if settings.get("static_cache") == "off" else ""
    reports: list[Report] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        reports.append(run_passes(gm))
        if not isinstance(cache, InnerQCache):
            reports.append(capture_static_cache(gm.graph, ours.config, kept=kept)[0] + find_dynamic_caches(gm.graph))
            gm.recompile()
        return gm.forward

    # generate() says where tokens stand, and some models break their graph to find out themselves.
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    positions = {"position_ids": torch.full_like(input_ids[:, -1:], input_ids.shape[1])} if takes_positions else {}
    with torch.no_grad():
        model.forward(input_ids, past_key_values=cache)
        _compiled_once(record)(model, input_ids[:, -1:], past_key_values=cache, **positions)
    report = sum(reports, Report())
    if isinstance(cache, InnerQCache):
        report += Report(_unquantized(model, cache))
    return report if report.found or report.note else report + Report(note=_advice(model, cache))


def _compiled_once(backend: Callable[..., Any]) -> Callable[..., Any]:
    """``call(model, ...)`` compiles ``model.forward(...)`` and leaves no trace in what others compile of that model.

    Dynamo counts compilations by code object and gives up after eight, so this one gets a code object of its own, with
    a name of its own, which is where Dynamo remembers sizes that changed. Where a model breaks its graph, its own code
    objects are compiled after all, into a region of their own if torch has such.
    """

    def forward_of(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    code = forward_of.__code__.replace(co_name=f"explain_{next(_calls)}")
    once = types.FunctionType(code, forward_of.__globals__)
    region = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    return torch.compile(once, backend=backend, **region)  # type: ignore[call-overload]


_calls = itertools.count()


def _unquantized(model: PreTrainedModel, cache: InnerQCache) -> tuple[SiteReport, ...]:
    paths = {
        module.layer_idx: name
        for name, module in model.named_modules()
        if "attn" in name.lower() and hasattr(module, "layer_idx")
    }
    return tuple(
        SiteReport(paths.get(index, f"layer {index}"), LEFT, reason) for index, reason in cache.unquantized.items()
    )


def _advice(model: PreTrainedModel, cache: Cache) -> str:
    if isinstance(cache, InnerQCache) and cache.unquantized:
        return "No layer of this model can be quantized; the reasons are above."
    return (
        f"{type(model).__name__} never read its cache as scaled_dot_product_attention does (attn_implementation="
        f'{attn_implementation(model)!r}); load it with attn_implementation="sdpa".'
    )
