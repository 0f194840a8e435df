"""Decode tokens per second of a whole model, InnerQ against StaticCache + Inductor and llama.cpp, at several contexts.

The model has the shape of Llama-3.2-1B and random weights (``--model DIR`` takes a real one). Its cache is filled with
random keys and values instead of a prefill, which costs hours at 32k tokens on a CPU and does not change a decode step.
All contenders are compiled in one process and take turns, step by step; the table shows medians. llama.cpp takes part
where gguf and llama-cpp-python are installed (rivals.txt), with the same weights.

Before a long context is timed, the program prints what Amdahl's law leads it to expect: the time of a step at a context
too short for attention to matter, plus, per layer, the attention that bench_decode_attention.py measured alone.

Correctness first: on a short context, before anything is quantized, every contender must choose the token that the
uncompiled model chooses; llama.cpp with its 16-bit cache.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import render
import torch
import typer
from llama_cpp_model import LlamaCpp, write_gguf
from record import machine
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from innerq_compile import InnerQCache

LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}  # fmt: skip
CONTEXTS, PRESETS = [4096, 16384, 32768], ["int4", "base", "small"]
SHORT = 128
"""Tokens of the shortest context: its step is all weights and no attention to speak of, and nothing is quantized."""

Step = Callable[..., Any]


def main(
    contexts: Annotated[list[int], typer.Option("--context", help="Tokens in the cache; may be repeated.")] = CONTEXTS,
    presets: Annotated[list[str], typer.Option("--preset")] = PRESETS,
    model_dir: Annotated[str | None, typer.Option("--model", help="A model to use instead of random weights.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the random model.")] = 16,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each contender.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time decode steps of whole models."""
    model = _load(model_dir, layers, getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        gguf = _write_gguf(model, Path(folder))
        _check_tokens(model, presets, gguf)
        baseline = _time_steps(model, SHORT, presets, steps, gguf)
        results: list[dict[str, Any]] = []
        for context in tqdm(contexts, desc="contexts"):
            expected = _expected(model, baseline, context)
            print(f"{context} tokens, expected ms:", {name: round(1e3 * s, 1) for name, s in expected.items()})
            seconds = _time_steps(model, context, presets, steps, gguf)
            for name, taken in seconds.items():
                guess, static = expected.get(name), expected.get(STATIC)
                ratio = static / guess if guess and static else None
                share = max(0.0, 1 - baseline[name] / taken)
                row = {"contender": name, "context": context, "step_seconds": taken, "attention_share": share}
                row |= {"speedup": seconds[STATIC] / taken, "expected_seconds": guess, "expected_speedup": ratio}
                results.append(row)
    record = {"machine": machine(), "dtype": dtype, "steps": steps, "results": results}
    print(render.generate_table(record))
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


STATIC = "StaticCache + Inductor"
LLAMA_CPP = {
    "llama.cpp f16, no flash attention": ("f16", False),
    "llama.cpp q8_0": ("q8_0", True),
    "llama.cpp q4_0": ("q4_0", True),
}
"""Contender -> type of its cache and whether flash attention is on: in 16 bit it is faster without."""


def _write_gguf(model: PreTrainedModel, folder: Path) -> Path | None:
    missing = [name for name in ("gguf", "llama_cpp") if not importlib.util.find_spec(name)]
    if missing:
        print(f"without llama.cpp: {' and '.join(missing)} not installed")
        return None
    path = folder / "model.gguf"
    write_gguf(model, path)
    return path


def _expected(model: PreTrainedModel, baseline: dict[str, float], context: int) -> dict[str, float]:
    """Seconds of a step by Amdahl's law, of those contenders whose attention was measured at this shape and context."""
    config = model.config
    shape = f"{config.num_attention_heads}/{config.num_key_value_heads}/{config.head_dim}"
    alone = render.times(render.load(render.DECODE)).get((shape, context), {})
    alone = {**alone, **({STATIC: alone[render.AS_CALLED]} if render.AS_CALLED in alone else {})}
    layers = config.num_hidden_layers
    return {name: seconds + layers * alone[name] / 1e3 for name, seconds in baseline.items() if name in alone}


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
def _time_steps(
    model: PreTrainedModel, context: int, presets: list[str], steps: int, gguf: Path | None
) -> dict[str, float]:
    torch._dynamo.reset()
    capacity = context + steps + WARM_UP
    token = torch.ones(1, 1, dtype=torch.long)
    turns: dict[str, Callable[[int], object]] = {}
    for name, (step, cache) in _contenders(model, capacity, presets).items():
        _fill(model, cache, context)

        def turn(position: int, step: Step = step, cache: Cache = cache) -> object:
            return step(**_inputs(token, position, capacity), past_key_values=cache, use_cache=True)

        turns[name] = turn
    others = _llama_cpp(gguf, capacity)
    for name, other in others.items():
        other.fill(context)
        turns[name] = lambda position, other=other: other.step([1], position)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(WARM_UP + steps):
        for name, turn in turns.items():
            time.sleep(0.02)  # threads of the last contender that spin after their work fall asleep
            begin = time.perf_counter()
            turn(context + number)
            seconds[name].append(time.perf_counter() - begin)
    for other in others.values():
        other.close()
    return {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}


def _llama_cpp(gguf: Path | None, capacity: int) -> dict[str, LlamaCpp]:
    if gguf is None:
        return {}
    threads = torch.get_num_threads()
    return {name: LlamaCpp(gguf, capacity, kind, flash, threads) for name, (kind, flash) in LLAMA_CPP.items()}


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
def _check_tokens(model: PreTrainedModel, presets: list[str], gguf: Path | None) -> None:
    ids = torch.randint(0, model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    full = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=full)
    expected = model(ids[:, -1:], past_key_values=full).logits.flatten().float()
    # Compiled and uncompiled 16-bit arithmetic round differently, so near ties may fall either way.
    tie = 4 * torch.finfo(model.dtype).eps * float(expected.max())
    chosen = {}
    for name, (step, cache) in _contenders(model, 64, presets).items():
        for index, layer in enumerate(full.layers):
            cache.update(layer.keys[:, :, :-1], layer.values[:, :, :-1], index)
        logits = step(**_inputs(ids[:, -1:], 23, 64), past_key_values=cache, use_cache=True).logits
        chosen[name] = int(logits.argmax())
    for name, other in _llama_cpp(gguf, 64).items():
        other.step(ids[0, :-1].tolist(), 0)
        token = other.step(ids[0, -1:].tolist(), 23)
        if LLAMA_CPP[name][0] == "f16":  # the others have rounded even these few keys and values
            chosen[name] = token
        other.close()
    for name, token in chosen.items():
        if expected[token] < expected.max() - tie:
            raise SystemExit(f"{name} chose token {token}, the uncompiled model {int(expected.argmax())}")


if __name__ == "__main__":
    typer.run(main)
