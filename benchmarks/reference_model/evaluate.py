"""Measure a checkpoint in full precision: held-out loss, recall by distance, arithmetic.

Weights are read as shipped (bf16) and computed with in float32. Answers are scored as
greedy decoding would give them: a prompt counts when every token of its answer is the
most likely one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from innerq_compile.demo import tasks

RECALL_DISTANCES = (100, 500, 1000, 2000, 3000, 3900)
ARITHMETIC_DISTANCES = (0, 1000, 3000)
LOSS_WINDOWS = (512, 4096)


@dataclass(frozen=True)
class Scores:
    """What the model card reports; the tables are keyed by distance or window in tokens."""

    parameters: int
    samples: int
    heldout_loss: dict[int, float]
    heldout_perplexity: dict[int, float]
    recall: dict[int, float]
    arithmetic: dict[int, float]


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, ids: list[int], window: int) -> float:
    """Mean loss per token over disjoint windows of the held-out text."""
    rows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    total = 0.0
    for row in rows:
        logits = model(row[None, :-1]).logits[0]
        total += F.cross_entropy(logits, row[1:], reduction="sum").item()
    return total / (rows.shape[0] * (window - 1))


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: Any, prompt: tasks.Prompt) -> bool:
    """Whether greedy decoding would give the whole answer."""
    ids = tokenizer.encode(prompt.text, add_special_tokens=False)
    answer = tokenizer.encode(prompt.answer, add_special_tokens=False)
    logits = model(torch.tensor([ids + answer[:-1]]), logits_to_keep=len(answer)).logits
    return logits[0].argmax(-1).tolist() == answer


def accuracy(
    model: PreTrainedModel, tokenizer: Any, make: Callable[[Random, int], tasks.Prompt], distances: tuple[int, ...],
    samples: int,
) -> dict[int, float]:  # fmt: skip
    """Share of right answers at each distance, every distance with its own seed."""
    scores = {}
    for distance in distances:
        rng = Random(f"evaluate-{distance}")
        prompts = tqdm(range(samples), desc=f"distance {distance}", leave=False)
        right = sum(answers(model, tokenizer, make(rng, distance)) for _ in prompts)
        scores[distance] = right / samples
    return scores


def evaluate(path: Path, samples: int, loss_windows: int) -> Scores:
    """All scores of the checkpoint in `path`, with its own held-out text as filler."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = (path / "heldout.txt").read_text(encoding="utf-8")
    filler = tasks.Filler(text)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    losses = {window: heldout_loss(model, ids[: loss_windows * max(LOSS_WINDOWS)], window) for window in LOSS_WINDOWS}

    def recall(rng: Random, distance: int) -> tasks.Prompt:
        return tasks.recall_prompt(rng, tokenizer, filler, distance=distance)

    def arithmetic(rng: Random, distance: int) -> tasks.Prompt:
        return tasks.arithmetic_prompt(rng, tokenizer, filler, distance=distance)

    return Scores(
        parameters=model.num_parameters(),
        samples=samples,
        heldout_loss=losses,
        heldout_perplexity={window: math.exp(loss) for window, loss in losses.items()},
        recall=accuracy(model, tokenizer, recall, RECALL_DISTANCES, samples),
        arithmetic=accuracy(model, tokenizer, arithmetic, ARITHMETIC_DISTANCES, samples),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("innerq_compile/demo/model"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--loss-windows", type=int, default=1000, help="4096-token windows")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scores = evaluate(args.model, args.samples, args.loss_windows)
    args.out.write_text(json.dumps(asdict(scores), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
