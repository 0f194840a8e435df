"""What transformers keeps to itself and this package needs. Each name says what public name is missing."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import CompileConfig, PreTrainedModel

from innerq_compile.compat import private

TESTED = "5.17 to 5.23"

NAMES = (
    "transformers.cache_utils:CacheLayerMixin",
    "transformers.cache_utils:StaticLayer",
    "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS",
    "transformers.generation:GenerationMixin._prepare_cache_for_generation",
    "transformers.generation:GenerationMixin._supports_default_dynamic_cache",
)
"""Everything that is taken from transformers beside its documented classes."""

CACHE_HOOK = "_prepare_cache_for_generation"
"""Method of a model in which ``generate()`` chooses its cache. Public: none; ``past_key_values`` is one object, for one
call."""

COMPILED = ("_compiled_call_impl", "_compiled_call", "_last_compile_config")
"""Where a model keeps what it compiled: torch's ``Module.compile``, then ``generate()``'s decode step and the settings
of that. Public: none that undoes either."""


def check() -> None:
    """Asks for everything in :data:`NAMES`.

    Raises:
        ImportError: Something is missing; one line names it.
    """
    for path in NAMES:
        private("transformers", transformers.__version__, TESTED, path)


check()


def compile_on_every_device(config: CompileConfig) -> CompileConfig:
    """Lets ``generate()`` use a compile configuration on a CPU as well. Public: none."""
    config._compile_all_devices = True
    return config


def attn_implementation(model: Any) -> str | None:
    """Which attention a model runs, ``None`` where its configuration does not say. Public: a setter only."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def offers_usual_cache(model: PreTrainedModel) -> bool:
    """Whether ``generate()`` would make a ``DynamicCache`` for a model. Public: none."""
    return bool(model._supports_default_dynamic_cache())


def compiled_call(model: Any) -> Any:
    """What ``Module.compile`` left on a module, ``None`` where nothing is compiled. Public: none."""
    return getattr(model, COMPILED[0], None)


def set_compiled_call(model: Any, call: Any) -> None:
    """Puts back what :func:`compiled_call` gave."""
    setattr(model, COMPILED[0], call)


def forget_compiled(model: PreTrainedModel) -> None:
    """Makes a model run uncompiled again, its next ``generate()`` too."""
    for name in COMPILED:
        model.__dict__.pop(name, None)
