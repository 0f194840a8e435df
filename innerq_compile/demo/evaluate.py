"""What a quantized cache costs in quality: the same tokens through the same model, next to its full-precision cache.

A prompt is read once, in full precision (prefill attends to exact keys with every cache), and its keys and values are
handed to each cache. Then the model decodes token by token, as in ``generate()``, with the true tokens as input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from innerq_compile.demo.tasks import Filler, recall_prompt

WARMUP_STEPS = 4
"""Decode steps that are not timed: the first ones compile."""


@dataclass(frozen=True)
class Prefill:
    """A prompt read in full precision: per layer keys and values [1, H, T, D]."""

    num_tokens: int
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]

    def load_into(self, cache: Cache) -> Cache:
        """Hands the prompt to an empty cache."""
        for index, (key, value) in enumerate(self.keys_values):
            cache.update(key, value, index)
        return cache


@dataclass(frozen=True)
class Decoded:
    """Logits float32 [n, vocabulary] of n decode steps, and the seconds each step took."""

    logits: torch.Tensor
    seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Decode speed by the median step."""
        return 1 / float(torch.tensor(self.seconds[WARMUP_STEPS:]).median())


@dataclass(frozen=True)
class RecallTask:
    """A prompt whose answer stands ``distance`` tokens back; ``ids`` [1, T] end with the answer's ``answer_len``."""

    ids: torch.Tensor
    answer_len: int
    distance: int


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> Prefill:
    """Reads ids [1, T] in full precision."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefill(ids.shape[1], [(layer.keys, layer.values) for layer in cache.layers])


@torch.no_grad()
def decode(model: PreTrainedModel, cache: Cache, position: int, ids: torch.Tensor) -> Decoded:
    """Feeds ids [1, n] one by one to a cache that holds ``position`` tokens, with the inputs ``generate()`` hands over.

    Returns:
        For each token of ``ids`` the logits of its successor.
    """
    logits, seconds = [], []
    capacity = cache.layers[0].get_mask_sizes(1)[0] if cache.is_compileable else None
    for offset in range(ids.shape[1]):
        inputs: dict[str, Any] = {"position_ids": torch.tensor([[position + offset]], device=ids.device)}
        if capacity is not None:
            inputs["attention_mask"] = (torch.arange(capacity, device=ids.device) <= position + offset)[
                None, None, None
            ]
        # A slice would carry the strides of the whole text into the compiled graph's guards.
        token = ids[0, offset].reshape(1, 1)
        begin = time.perf_counter()
        out = model(
            input_ids=token, past_key_values=cache, use_cache=True, return_dict=True, logits_to_keep=1, **inputs
        )
        seconds.append(time.perf_counter() - begin)
        logits.append(out.logits[0, -1].float())
    return Decoded(torch.stack(logits), seconds)


def perplexity(decoded: Decoded, targets: torch.Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of targets [n]."""
    return float(torch.nn.functional.cross_entropy(decoded.logits, targets).exp())


def agreement(decoded: Decoded, full: Decoded) -> float:
    """Share of steps whose most likely token is that of full precision."""
    return float((decoded.logits.argmax(-1) == full.logits.argmax(-1)).float().mean())


def kl_divergence(decoded: Decoded, full: Decoded) -> float:
    """Mean KL(full || quantized) of the next-token distributions, in nats."""
    p, q = full.logits.log_softmax(-1), decoded.logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def recall_tasks(tokenizer: Any, filler_text: str, distances: Sequence[int], seed: int = 0) -> list[RecallTask]:
    """One key-value recall task per distance, over text the model was not trained on."""
    rng, filler = Random(seed), Filler(filler_text)
    tasks = []
    for distance in distances:
        prompt = recall_prompt(rng, tokenizer, filler, distance=distance)
        prompt_ids = tokenizer.encode(prompt.text, add_special_tokens=False)
        answer_ids = tokenizer.encode(prompt.answer, add_special_tokens=False)
        tasks.append(RecallTask(torch.tensor([prompt_ids + answer_ids]), len(answer_ids), prompt.distance))
    return tasks


def recall_prefills(model: PreTrainedModel, tasks: Sequence[RecallTask]) -> list[Prefill]:
    """Every prompt read but for its last token, which the first decode step is given."""
    return [prefill(model, task.ids[:, : -task.answer_len - 1]) for task in tasks]


def recall_accuracy(
    model: PreTrainedModel,
    make_cache: Callable[[], Cache],
    tasks: Sequence[RecallTask],
    prefills: Sequence[Prefill],
) -> float:
    """Share of tasks whose whole answer greedy decoding gets right."""
    right = 0
    for task, prompt in zip(tasks, prefills, strict=True):
        cache = prompt.load_into(make_cache())
        inputs, answer = task.ids[:, prompt.num_tokens : -1], task.ids[0, -task.answer_len :]
        decoded = decode(model, cache, prompt.num_tokens, inputs)
        right += bool((decoded.logits.argmax(-1) == answer).all())
    return right / len(tasks)
