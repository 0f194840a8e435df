"""Decode tokens per second of a whole model, InnerQ against StaticCache + Inductor, at several context lengths.

The model has the shape of Llama-3.2-1B and random weights (``--model DIR`` takes a real one). Its cache is filled with
random keys and values instead of a prefill, which costs hours at 32k tokens on a CPU and does not change a decode step.
All contenders are compiled in one process and take turns, step by step; the table shows medians.

Correctness first: on a short context, before anything is quantized, every contender must choose the token that the
uncompiled model chooses.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from innerq_compile import InnerQCache
from innerq_compile.cli import environment

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
SHORT = 128
"""Tokens of the shortest context: its step is all weights and no attention to speak of, and nothing is quantized."""

Step = Callable[..., Any]


@dataclass(frozen=True)
class Result:
    """Median seconds of a decode step of one contender at one context length."""

    contender: str
    context: int
    step_seconds: float
    attention_share: float
    speedup: float


def main(
    contexts: Annotated[list[int], typer.Option("--context", help="Tokens in the cache; may be repeated.")] = [  # noqa: B006 typer reads it once
        4096,
        16384,
        32768,
    ],
    presets: Annotated[list[str], typer.Option("--preset")] = ["int4", "base", "small"],  # noqa: B006
    model_dir: Annotated[str | None, typer.Option("--model", help="A model to use instead of random weights.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the random model.")] = 16,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each contender.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time decode steps of whole models."""
    model = _load(model_dir, layers, getattr(torch, dtype))
    _check_tokens(model, presets)
    results: list[Result] = []
    baseline: dict[str, float] = {}
    for context in tqdm([SHORT, *contexts], desc="contexts"):
        seconds = _time_steps(model, context, presets, steps)
        if context == SHORT:
            baseline = seconds
            continue
        static = seconds[STATIC]
        results += [
            Result(name, context, t, max(0.0, 1 - baseline[name] / t), static / t) for name, t in seconds.items()
        ]
    rows = [
        (r.context, r.contender, f"{1 / r.step_seconds:.2f}", f"{100 * r.attention_share:.0f} %", f"{r.speedup:.2f}x")
        for r in results
    ]
    headers = ("context", "cache", "tokens/s", "attention", "vs StaticCache")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    if out:
        record = {"machine": environment(), "dtype": dtype, "steps": steps, "results": [asdict(r) for r in results]}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


STATIC = "StaticCache + Inductor"


def _load(model_dir: str | None, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    if model_dir:
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA_1B, "num_hidden_layers": layers})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _contenders(model: PreTrainedModel, capacity: int, presets: list[str]) -> dict[str, tuple[Step, Cache]]:
    """Name -> compiled forward and an empty cache of this capacity."""
    static = torch.compile(model.forward, backend="inductor")
    innerq = torch.compile(model.forward, backend="innerq")
    return {
        STATIC: (static, StaticCache(config=model.config, max_cache_len=capacity)),
        **{p: (innerq, InnerQCache(model.config, preset=p, max_cache_len=capacity)) for p in presets},
    }


@torch.no_grad()
def _time_steps(model: PreTrainedModel, context: int, presets: list[str], steps: int) -> dict[str, float]:
    torch._dynamo.reset()
    capacity = context + steps + WARM_UP
    contenders = _contenders(model, capacity, presets)
    for _, cache in contenders.values():
        _fill(model, cache, context)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    token = torch.ones(1, 1, dtype=torch.long)
    for number in range(WARM_UP + steps):
        for name, (step, cache) in contenders.items():
            inputs = _inputs(token, context + number, capacity)
            begin = time.perf_counter()
            step(**inputs, past_key_values=cache, use_cache=True)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}


WARM_UP = 3
"""Steps that compile or touch memory for the first time."""


def _inputs(token: torch.Tensor, position: int, capacity: int) -> dict[str, torch.Tensor]:
    """What generate() hands over at a decode step."""
    mask = (torch.arange(capacity) <= position)[None, None, None]
    return {"input_ids": token, "attention_mask": mask, "position_ids": torch.tensor([[position]])}


def _fill(model: PreTrainedModel, cache: Cache, context: int) -> None:
    config = model.config
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    generator = torch.Generator().manual_seed(0)
    for index in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
        cache.update(key, value, index)


@torch.no_grad()
def _check_tokens(model: PreTrainedModel, presets: list[str]) -> None:
    ids = torch.randint(0, model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    full = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=full)
    expected = model(ids[:, -1:], past_key_values=full).logits.flatten().float()
    # Compiled and uncompiled 16-bit arithmetic round differently, so near ties may fall either way.
    tie = 4 * torch.finfo(model.dtype).eps * float(expected.max())
    for name, (step, cache) in _contenders(model, 64, presets).items():
        for index, layer in enumerate(full.layers):
            cache.update(layer.keys[:, :, :-1], layer.values[:, :, :-1], index)
        got = int(step(**_inputs(ids[:, -1:], 23, 64), past_key_values=cache, use_cache=True).logits.argmax())
        if expected[got] < expected.max() - tie:
            raise SystemExit(f"{name} chose token {got}, the uncompiled model {int(expected.argmax())}")


if __name__ == "__main__":
    typer.run(main)
