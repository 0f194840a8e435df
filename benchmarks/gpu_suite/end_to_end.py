"""Section 5: decode tokens per second of whole models, ours against StaticCache + Inductor, both with CUDA graphs.

A process does one model, cache and batch. It compiles early, beside the checks, and runs nothing of what it compiled:
weights share one small buffer, and so do the caches of all layers, so that many of these processes fit one GPU and none
keeps a graph's memory. When its turn comes it gives them memory of their own and measures. Caches are filled with
random numbers instead of a prefill, which changes no decode step.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from gpu_suite import models
from gpu_suite.context import Context
from gpu_suite.states import fill, set_context
from innerq_compile.cache import InnerQCache

WARM_UP, STEPS, ROUNDS = 5, 16, 3
ROOM = 64
"""Free slots behind the longest context."""


class Unit(NamedTuple):
    """What one process measures."""

    model: str
    cache: str
    batch: int
    contexts: tuple[int, ...]

    @staticmethod
    def parse(part: str) -> Unit:
        """Reads ``model/cache/batch/context,context``."""
        model, cache, batch, contexts = part.split("/")
        return Unit(model, cache, int(batch), tuple(int(context) for context in contexts.split(",")))

    @property
    def capacity(self) -> int:
        """Slots of the cache."""
        return max(self.contexts) + ROOM


class Prepared(Exception):  # noqa: N818 nothing is wrong
    """A compiled graph exists and was not run."""


class Held:
    """A backend around another one, whose graphs raise :class:`Prepared` instead of running until ``open`` is set."""

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend, self.open = backend, False

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """Compiles a graph."""
        graph = self.backend(gm, inputs)

        def call(*args: Any) -> Any:
            if not self.open:
                raise Prepared
            return graph(*args)

        return call


def run(context: Context) -> None:
    """Rows ``end_to_end``, one per context."""
    unit, dtype = Unit.parse(context.part), torch.float32 if context.dry else torch.bfloat16
    device = context.device
    config = models.config_of(unit.model)
    needed = cache_bytes(unit, config)
    began = time.monotonic()
    with torch.no_grad():
        model = models.build(unit.model, device, dtype)
        backend = Held(backend_of(unit, context.dry))
        step = torch.compile(model.forward, backend=backend)
        prepare(model, step, unit, device, context.dry)
        backend.open = True
        compile_seconds = time.monotonic() - began
        if not context.wait_for_turn():
            raise TimeoutError("its turn to measure never came")
        row = {"model": unit.model, "cache": unit.cache, "batch": unit.batch, "capacity": unit.capacity}
        row |= {"cache_bytes": needed, "compile_s": round(compile_seconds, 1)}
        too_large = device.type == "cuda" and needed + models.weight_bytes(unit.model) > 0.97 * _free_bytes()
        try:
            if too_large:
                raise torch.cuda.OutOfMemoryError(f"{_free_bytes() / 1e9:.1f} GB are free")
            _measure(context, model, step, unit, row)
        except torch.cuda.OutOfMemoryError as error:
            context.emit("end_to_end", **row, contexts=unit.contexts, skipped=f"does not fit the memory: {error}"[:300])


def prepare(
    model: PreTrainedModel, step: Callable[..., Any], unit: Unit, device: torch.device, dry: bool
) -> None:  # fmt: skip
    """Compiles a decode step; leaves the model without weights."""
    cache = new_cache(model, unit, shared=True)
    hold(cache, unit.contexts[0])
    with contextlib.suppress(Prepared):
        _steps(step, cache, unit, unit.contexts[0], 1, device, dry)
    cache = None
    gc.collect()
    models.drop_weights(model)


def _measure(
    context: Context, model: PreTrainedModel, step: Callable[..., Any], unit: Unit, row: dict[str, Any]
) -> None:  # fmt: skip
    device, graphs = context.device, _counted("stats", "unique_graphs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    models.own_weights(model)
    cache = new_cache(model, unit)
    for length in unit.contexts:
        if context.seconds_left() < 2 and not context.dry:
            context.emit("end_to_end", **row, context=length, skipped="out of time")
            continue
        hold(cache, length)
        times = [_seconds_per_step(step, cache, unit, length, device, context.dry) for _ in range(ROUNDS)]
        seconds = sorted(times)[len(times) // 2]
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        context.emit(
            "end_to_end", **row, context=length, ms_per_step=seconds * 1e3, tokens_per_s=unit.batch / seconds,
            ms_of_rounds=[t * 1e3 for t in times], peak_bytes=peak,
            recompiles=_counted("stats", "unique_graphs") - graphs,
            cudagraph_skips=_counted("inductor", "cudagraph_skips"),
        )  # fmt: skip
    if unit.cache != "static" and unit.batch == 1:
        context.emit("logits", **row, context=unit.contexts[0], error=_logits_error(model, step, cache, unit))


def backend_of(unit: Unit, dry: bool) -> Callable[..., Any]:
    """What a user would compile with; dry, the model only goes through Dynamo and our passes."""
    if dry and unit.cache == "static":
        return lambda gm, inputs: gm.forward
    if dry:
        from innerq_compile.passes import run_passes

        def passes_only(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            report = run_passes(gm, exact=False)
            if report.rewritten != models.SHAPES[unit.model]["num_hidden_layers"]:
                raise AssertionError(f"not every layer was fused: {report}")
            return gm.forward

        return passes_only
    from innerq_compile.backend import innerq, mode_options

    if unit.cache == "static":
        from torch._inductor.compile_fx import compile_fx

        return functools.partial(compile_fx, config_patches=mode_options("reduce-overhead"))
    return functools.partial(innerq, mode="reduce-overhead")


def new_cache(model: PreTrainedModel, unit: Unit, shared: bool = False) -> Cache:
    """A filled cache of the unit's kind; how many tokens it holds is for :func:`hold` to say.

    Args:
        shared: All layers in the memory of the first, each with storages of its own as far as torch can tell.
    """
    parameter, config = next(model.parameters()), model.config
    none = parameter.new_empty(unit.batch, config.num_key_value_heads, 0, config.head_dim)
    if unit.cache == "static":
        cache: Cache = StaticCache(config=config, max_cache_len=unit.capacity)
    else:
        cache = InnerQCache(config, preset=unit.cache, max_cache_len=unit.capacity)
    for layer in cache.layers:
        layer.lazy_initialization(none, none)
        if unit.cache != "static":
            layer.is_empty = False
        if shared and layer is not cache.layers[0]:
            for first, own in zip(_buffers(cache.layers[0]), _buffers(layer), strict=True):
                move_into(own, first)
        elif unit.cache == "static":
            layer.keys.normal_()
            layer.values.normal_()
        else:
            fill(layer.state, layer.config, max(unit.contexts))
    if isinstance(cache, InnerQCache):
        cache.set_padding(None)
    return cache


def hold(cache: Cache, length: int) -> None:
    """Makes every layer hold ``length`` tokens."""
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(length)
        else:
            set_context(layer.state, layer.config, length)


def cache_bytes(unit: Unit, config: Any) -> int:
    """Bytes of the unit's cache in bf16 models, by its buffers' shapes."""
    from innerq_compile.config import InnerQConfig
    from innerq_compile.layout import allocate_state

    numbers = 2 * unit.batch * config.num_key_value_heads * config.head_dim
    if unit.cache == "static":
        return 2 * numbers * unit.capacity * config.num_hidden_layers
    state = allocate_state(
        InnerQConfig.from_preset(unit.cache), batch_size=unit.batch, num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim, capacity=unit.capacity, dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    return config.num_hidden_layers * sum(x.numel() * x.element_size() for x in state)


def _buffers(layer: Any) -> tuple[torch.Tensor, ...]:
    return (layer.keys, layer.values) if isinstance(layer, StaticLayer) else tuple(layer.state)


def move_into(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Frees a tensor's memory and has it use another's, of the same shape, through a storage that is not the other's.

    Inputs of a graph that share a storage and are written would make it another graph; torch does not see this.
    """
    if tensor.numel():
        storage = torch.from_dlpack(other.flatten()).untyped_storage()
        tensor.set_(storage, 0, tensor.shape, tensor.stride())


def _seconds_per_step(
    step: Callable[..., Any], cache: Cache, unit: Unit, length: int, device: torch.device, dry: bool
) -> float:
    hold(cache, length)
    _steps(step, cache, unit, length, 1 if dry else WARM_UP, device, dry)
    count = 1 if dry else STEPS
    began = time.perf_counter()
    _steps(step, cache, unit, length + WARM_UP, count, device, dry)
    return (time.perf_counter() - began) / count


def _steps(
    step: Callable[..., Any], cache: Cache, unit: Unit, length: int, count: int, device: torch.device, dry: bool
) -> None:
    """Decodes ``count`` tokens greedily, with the mask and positions that ``generate()`` hands over."""
    token = torch.ones(unit.batch, 1, dtype=torch.long, device=device)
    position = torch.full((unit.batch, 1), length, dtype=torch.long, device=device)
    slots = torch.arange(unit.capacity, device=device)
    mask = (slots <= length).expand(unit.batch, 1, 1, -1).contiguous()
    for _ in range(count):
        if not dry:
            torch.compiler.cudagraph_mark_step_begin()
        out = step(
            input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )  # fmt: skip
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        position = position + 1
        mask = mask | (slots == position[0])
    if device.type == "cuda":
        torch.cuda.synchronize()


def _logits_error(model: PreTrainedModel, step: Callable[..., Any], cache: Cache, unit: Unit) -> float:
    """Relative difference of one step's logits, compiled and fused against uncompiled and dequantized."""
    device, length = cache.layers[0].device, unit.contexts[0]
    mask = (torch.arange(unit.capacity, device=device) <= length).expand(1, 1, 1, -1).contiguous()
    inputs = {
        "input_ids": torch.ones(1, 1, dtype=torch.long, device=device), "attention_mask": mask,
        "position_ids": torch.full((1, 1), length, dtype=torch.long, device=device),
        "past_key_values": cache, "use_cache": True,
    }  # fmt: skip
    logits = []
    for forward in (step, model.forward):
        hold(cache, length)
        torch.compiler.cudagraph_mark_step_begin()
        logits.append(forward(**inputs).logits.double())
    return float((logits[0] - logits[1]).norm() / logits[1].norm())


def _counted(group: str, name: str) -> int:
    return int(torch._dynamo.utils.counters[group][name])


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]
