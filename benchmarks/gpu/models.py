"""Decode tokens per second of whole models with random weights: ours against StaticCache + Inductor, CUDA graphs both.

Caches are filled with random numbers instead of a prefill, which changes no decode step. A quantized cache is compiled
once for all contexts, its kernels read the length from the device; a StaticCache attends to its whole capacity, so it
gets one of each capacity, and is compiled for each. Compiling takes most of the time: half a minute for 32 layers.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from gpu.caches import SPARE, fill, set_context
from gpu.section import Section
from gpu.timing import relative
from innerq_compile.cache.innerq_cache import InnerQCache

WARM_UP, STEPS, ROUNDS = 5, 16, 3
CONTEXTS = (32768, 131072, 8192)
_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
           "tie_word_embeddings": False},
    "1b": {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
           "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "tie_word_embeddings": True},
}  # fmt: skip
"""Llama-3.1-8B, Llama-3.2-1B, and one for dry runs."""

Step = Callable[..., Any]


def config_of(name: str) -> LlamaConfig:
    """The configuration; rope parameters are left at their defaults, they change no cost."""
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return LlamaConfig(**SHAPES[name], **special, max_position_embeddings=262144)


def on_meta(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name), dtype=dtype).eval()


def build(name: str, section: Section) -> PreTrainedModel:
    """The model with random weights of the size that initialisation would give them, which takes minutes."""
    model = on_meta(name, section.dtype).to_empty(device=section.device)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.02)
    with section.device:  # the one module with buffers; a fresh one computes them
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


@torch.no_grad()
def run(section: Section) -> None:
    """Rows ``models``, one per context and cache. The part is ``MODEL/BATCH``."""
    name, batch = ("tiny", "1") if section.dry else section.part.split("/")
    case, contexts = {"model": name, "batch": int(batch)}, (192, 128) if section.dry else CONTEXTS
    model = build(name, section)
    ours = Contender(section, model, "base", int(batch), max(contexts))
    for context in contexts:
        if section.seconds_left() < 15:
            section.emit("models", **case, context=context, skipped="not reached")
            continue
        contenders, errors = {}, {}
        for cache in ("base", "static"):
            with section.attempt(**case, context=context, way=cache):
                found = ours if cache == "base" else Contender(section, model, cache, int(batch), context)
                errors[cache], contenders[cache] = found.error(context), found
        graphs = counters["stats"]["unique_graphs"]
        times: dict[str, list[float]] = {cache: [] for cache in contenders}
        for _ in range(ROUNDS):
            for cache, contender in contenders.items():
                times[cache].append(contender.seconds_per_step(context))
        for cache, contender in contenders.items():
            row = {"cache": cache, "context": context, "error": errors[cache], "cache_bytes": contender.bytes}
            row |= {
                "ms_per_step": 1e3 * statistics.median(times[cache]),
                "ms_of_rounds": [1e3 * t for t in times[cache]],
            }
            row |= {"tokens_per_s": int(batch) / statistics.median(times[cache])}
            row |= {"recompiles": counters["stats"]["unique_graphs"] - graphs}
            row |= {"cudagraph_skips": counters["inductor"]["cudagraph_skips"]}
            section.emit("models", **case, **row, peak_bytes=0 if section.dry else torch.cuda.max_memory_allocated())


class Contender:
    """A compiled decode step and its cache, random numbers in all of it."""

    def __init__(self, section: Section, model: PreTrainedModel, cache: str, batch: int, context: int) -> None:
        self.section, self.model, self.batch, self.capacity = section, model, batch, context + SPARE
        self.step: Step = torch.compile(model.forward, backend=backend_of(cache, section.dry), dynamic=False)
        none = next(model.parameters()).new_empty(batch, model.config.num_key_value_heads, 0, model.config.head_dim)
        self.cache: Cache
        if cache == "static":
            self.cache = StaticCache(config=model.config, max_cache_len=self.capacity)
        else:
            self.cache = InnerQCache(model.config, preset=cache, max_cache_len=self.capacity)
        self.bytes = 0
        for layer in self.cache.layers:
            layer.lazy_initialization(none, none)
            if cache == "static":
                buffers = (layer.keys.normal_(), layer.values.normal_())
            else:
                layer.is_empty, buffers = False, layer.state
                fill(layer.state, layer.config, context)
            self.bytes += sum(x.numel() * x.element_size() for x in buffers)
        if isinstance(self.cache, InnerQCache):
            self.cache.set_padding(None)

    def hold(self, length: int) -> None:
        """Makes every layer hold ``length`` tokens."""
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(length)
            else:
                set_context(layer.state, layer.config, length)

    def decode(self, forward: Step, length: int, count: int) -> torch.Tensor:
        """Decodes ``count`` tokens greedily, with what ``generate()`` hands over; the last logits [B, vocabulary]."""
        device, logits = self.section.device, torch.empty(0)
        token = torch.ones(self.batch, 1, dtype=torch.long, device=device)
        slots = torch.arange(self.capacity, device=device)
        for position in range(length, length + count):
            if not self.section.dry:
                torch.compiler.cudagraph_mark_step_begin()
            logits = forward(
                input_ids=token, attention_mask=(slots <= position).expand(self.batch, 1, 1, -1).contiguous(),
                position_ids=torch.full((self.batch, 1), position, device=device), past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]  # fmt: skip
            token = logits.argmax(-1, keepdim=True)
        if not self.section.dry:
            torch.cuda.synchronize()
        return logits

    def error(self, length: int) -> float | None:
        """Relative difference of a step's logits, compiled against uncompiled over the same cache; this compiles.

        ``None``: the uncompiled step, which dequantizes a layer at a time, does not fit the memory.
        """
        self.hold(length)
        compiled = self.decode(self.step, length, 1).double()
        self.hold(length)
        with self.section.attempt(way="uncompiled", batch=self.batch, context=length):
            return relative(compiled, self.decode(self.model.forward, length, 1).double())
        return None

    def seconds_per_step(self, length: int) -> float:
        """Mean of STEPS steps behind WARM_UP others."""
        self.hold(length)
        self.decode(self.step, length, 1 if self.section.dry else WARM_UP)
        count, began = 1 if self.section.dry else STEPS, time.perf_counter()
        self.decode(self.step, length + WARM_UP, count)
        return (time.perf_counter() - began) / count


def backend_of(cache: str, dry: bool) -> Callable[..., Any]:
    """What a user would compile with; dry, the model only goes through Dynamo and our passes."""
    from innerq_compile.compiler.backend import innerq, mode_options

    if not dry and cache == "static":
        from torch._inductor.compile_fx import compile_fx

        return functools.partial(compile_fx, config_patches=mode_options("reduce-overhead"))
    if not dry:
        return functools.partial(innerq, mode="reduce-overhead")

    def passes_only(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        from innerq_compile.passes.decode import run_passes

        if cache != "static":
            report = run_passes(gm, exact=True)  # a CPU's kernels would round to integers
            if report.rewritten != SHAPES["tiny"]["num_hidden_layers"]:
                raise AssertionError(f"not every layer was fused: {report}")
        return gm.forward

    return passes_only
