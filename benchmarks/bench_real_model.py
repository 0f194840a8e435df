"""SmolLM2-135M, or a model of yours: what each preset costs in quality, what it saves in memory and time.

Quality: ``innerq eval`` on two texts, float32. Speed: bfloat16, one prompt, then one decode step of every contender in
turns, so that all see the same machine; medians. transformers' default cache runs uncompiled, as transformers runs it.

    python benchmarks/bench_real_model.py
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from record import RESULTS, machine, slug
from tabulate import tabulate
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from innerq_compile import InnerQCache, enable
from innerq_compile.demo.evaluate import WARMUP_STEPS, decode, prefill
from innerq_compile.demo.run import FULL, cache_bytes
from innerq_compile.evaluation.report import SMOLLM2, evaluate_presets
from innerq_compile.evaluation.smollm2 import smollm2
from innerq_compile.evaluation.texts import read_text

STATIC = "StaticCache + Inductor"


def contenders(model: PreTrainedModel, presets: list[str], capacity: int) -> dict[str, tuple[PreTrainedModel, Cache]]:
    """Name -> a model compiled its way, all with the same weights, and an empty cache."""

    def sharing(prepare: Callable[[PreTrainedModel], Any] | None) -> PreTrainedModel:
        tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
        other = copy.deepcopy(model, memo=tensors)  # deepcopy takes what its memo holds for copied
        if prepare is not None:
            prepare(other)
        return other

    config = model.config
    found: dict[str, tuple[PreTrainedModel, Cache]] = {
        FULL: (sharing(None), DynamicCache(config=config)),
        STATIC: (sharing(PreTrainedModel.compile), StaticCache(config=config, max_cache_len=capacity)),
    }
    for preset in presets:
        enabled = sharing(lambda other, preset=preset: enable(other, preset=preset))
        found[preset] = enabled, InnerQCache(config, preset=preset, max_cache_len=capacity)
    return found


def speed(folder: str, presets: list[str], text: str, tokens: int, steps: int) -> dict[str, dict[str, float]]:
    """Contender -> median milliseconds of a decode step behind ``tokens`` tokens, and bytes of its cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    content, _ = read_text(text)
    total = tokens + steps + WARMUP_STEPS
    ids = torch.tensor([tokenizer.encode(content, add_special_tokens=False, verbose=False)[:total]])
    read = prefill(model, ids[:, :tokens])
    ready = contenders(model, presets, total)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _, cache in ready.values():
        read.load_into(cache)
    for position in tqdm(range(tokens, total), desc="steps", leave=False):
        for name, (network, cache) in ready.items():
            begin = perf_counter()
            decode(network, cache, position, ids[:, position : position + 1])
            seconds[name].append(perf_counter() - begin)
    return {
        name: {"ms": 1e3 * median(taken[WARMUP_STEPS:]), "bytes": float(cache_bytes(ready[name][1]))}
        for name, taken in seconds.items()
    }


def main(
    model: Annotated[str, typer.Option(help="A model directory, or smollm2.")] = SMOLLM2,
    presets: Annotated[list[str], typer.Option("--preset")] = ["int8", "int4", "base", "small"],  # noqa: B006 typer reads it once
    texts: Annotated[list[str], typer.Option("--text")] = ["api", "manual"],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens read.")] = 2560,
    steps: Annotated[int, typer.Option(help="Decode steps timed.")] = 60,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    """Measures and stores the result beside the others."""
    torch.set_num_threads(threads)
    qualities = [evaluate_presets(model, presets, text, tokens, 512) for text in texts]
    folder = str(smollm2()) if model == SMOLLM2 else model
    times = speed(folder, presets, texts[0], tokens, steps)
    name = Path(model).name.lower()
    result = {
        "machine": machine(),
        "threads": threads,
        "model": name,
        "quality": [quality.to_json() for quality in qualities],
        "speed": times,
    }
    path = RESULTS / f"real-model-{name}-{slug()}-{threads}-threads.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for quality in qualities:
        print(quality, end="\n\n")
    rows = [(name, f"{row['ms']:.1f}", f"{row['bytes'] / 1e6:.1f}") for name, row in times.items()]
    print(tabulate(rows, headers=["cache", "ms a step", "MB"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    typer.run(main)
