"""The shipped checkpoint: its facts, its tokenizer, and that it uses its context."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import innerq_compile.demo
from innerq_compile.demo import tasks

MODEL_DIR = Path(innerq_compile.demo.__file__).parent / "model"
MAX_CHECKPOINT_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout() -> str:
    return (MODEL_DIR / "heldout.txt").read_text(encoding="utf-8")


def test_checkpoint_is_small() -> None:
    size = (MODEL_DIR / "model.safetensors").stat().st_size
    assert size <= MAX_CHECKPOINT_BYTES, f"{size} bytes"


def test_config_is_a_plain_grouped_query_llama(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.head_dim == 64
    assert config.max_position_embeddings == 4096
    assert config.num_attention_heads >= 2 * config.num_key_value_heads
    assert config.num_attention_heads % config.num_key_value_heads == 0


def test_shipped_weights_are_bfloat16() -> None:
    shipped = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert {parameter.dtype for parameter in shipped.parameters()} == {torch.bfloat16}


def test_tokenizer_round_trip(tokenizer: Any, heldout: str) -> None:
    text = heldout[:5000] + tasks.RECORD.format(key="amber", value="48213")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    assert tokenizer.decode(ids) == text


def test_tokenizer_splits_digits_and_keeps_keys_whole(tokenizer: Any) -> None:
    assert len(tokenizer.encode("48213", add_special_tokens=False)) == 5
    split = [key for key in tasks.KEYS if len(tokenizer.encode(" " + key)) != 1]
    assert split == []


@pytest.mark.parametrize("seed", [0, 1])
def test_generators_depend_on_the_seed_alone(seed: int, tokenizer: Any, heldout: str) -> None:
    def everything() -> list[object]:
        filler = tasks.Filler(heldout)
        rng = Random(seed)
        recall = tasks.recall_spans(rng, filler, keys=8, filler_rate=0.3, filler_chars=80)
        arithmetic = tasks.arithmetic_spans(rng, filler, filler_chars=80)
        return [
            *islice(recall, 40),
            *islice(arithmetic, 20),
            tasks.recall_prompt(rng, tokenizer, filler, distance=300),
            tasks.arithmetic_prompt(rng, tokenizer, filler, distance=300),
        ]

    assert everything() == everything()


@pytest.mark.parametrize("distance", [100, 1000, 3900])
def test_recall_prompt_hides_one_answer_at_the_distance(distance: int, tokenizer: Any, heldout: str) -> None:
    filler = tasks.Filler(heldout)
    prompt = tasks.recall_prompt(Random(distance), tokenizer, filler, distance=distance)
    key = prompt.text.rsplit("recall ", 1)[1].removesuffix("=")
    record = f"remember {key}={prompt.answer}"
    assert prompt.text.count(record) == 1
    behind = tokenizer.encode(prompt.text.split(record)[1], add_special_tokens=False)
    assert len(behind) == prompt.distance
    # Gaps between records end in a newline of their own and may miss their length by a token.
    assert abs(prompt.distance - distance) <= 17
    assert len(tokenizer.encode(prompt.text + prompt.answer, verbose=False)) <= 4096


def test_word_problems_are_worked_correctly() -> None:
    rng = Random(3)
    for _ in range(200):
        _, answer = tasks.word_problem(rng)
        steps, total = answer.split("The answer is ")
        results = []
        for step in steps.strip().removesuffix(".").split(". "):
            left, operator, right, _, result = step.split()
            expected = int(left) + int(right) if operator == "+" else int(left) - int(right)
            assert int(result) == expected, answer
            results.append(int(result))
        assert int(total.strip().removesuffix(".")) == results[-1]


@pytest.mark.slow
def test_recalls_values_far_behind(model: Any, tokenizer: Any, heldout: str) -> None:
    filler = tasks.Filler(heldout)
    rng = Random(17)
    right = 0
    distances = [1000, 1000, 1500, 1500, 2000, 2500, 3000, 3000]
    for distance in distances:
        prompt = tasks.recall_prompt(rng, tokenizer, filler, distance=distance)
        ids = tokenizer.encode(prompt.text, add_special_tokens=False)
        answer = tokenizer.encode(prompt.answer, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer[:-1]]), logits_to_keep=len(answer)).logits
        right += logits[0].argmax(-1).tolist() == answer
    # The model card measures 99 to 100 % at every distance: two misses in eight have a chance of 0.3 %.
    assert right >= len(distances) - 1, f"{right} of {len(distances)} values recalled"
