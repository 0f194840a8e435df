"""The demonstration's measures, on a tiny model and on numbers known by hand."""

import math

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, StaticCache

from innerq_compile.cache.innerq_cache import InnerQCache
from innerq_compile.demo import evaluate
from innerq_compile.demo.run import MODEL_DIR, DemoSettings, cache_bytes


def decoded(logits):
    return evaluate.Decoded(torch.tensor(logits), [1.0] * len(logits))


def test_measures_on_hand_made_distributions():
    full = decoded([[0.0, math.log(3.0)], [0.0, 0.0]])  # (1/4, 3/4), (1/2, 1/2)
    other = decoded([[math.log(3.0), 0.0], [0.0, 0.0]])  # (3/4, 1/4), (1/2, 1/2)
    # KL of the first row: 1/4 ln(1/3) + 3/4 ln 3 = 1/2 ln 3; the second row adds 0.
    assert evaluate.kl_divergence(other, full) == pytest.approx(math.log(3.0) / 4)
    assert evaluate.kl_divergence(full, full) == pytest.approx(0.0, abs=1e-7)
    assert evaluate.agreement(other, full) == 0.5
    # Probabilities of the targets are 1/4 and 1/2: the geometric mean of their inverses is sqrt(8).
    assert evaluate.perplexity(full, torch.tensor([0, 0])) == pytest.approx(math.sqrt(8.0))


def test_speed_leaves_the_warm_up_steps_out():
    steps = evaluate.Decoded(torch.zeros(7, 2), [9.0] * evaluate.WARMUP_STEPS + [0.5, 0.25, 0.1])
    assert steps.tokens_per_second == pytest.approx(4.0)


@pytest.mark.parametrize("kind", ["dynamic", "static", "innerq"])
def test_decoding_from_a_loaded_prompt_gives_the_logits_of_one_forward(tiny_model, kind):
    ids = torch.randint(1, 256, (1, 150), generator=torch.Generator().manual_seed(0))
    config = tiny_model.config
    cache = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=256),
        "innerq": lambda: InnerQCache(config, max_cache_len=256),  # 150 tokens: nothing is quantized yet
    }[kind]()
    prompt = evaluate.prefill(tiny_model, ids[:, :140])
    got = evaluate.decode(tiny_model, prompt.load_into(cache), 140, ids[:, 140:])
    with torch.no_grad():
        expected = tiny_model(ids).logits[0, 140:]
    torch.testing.assert_close(got.logits, expected)


def test_cache_bytes_counts_what_is_allocated(tiny_model):
    cache = DynamicCache(config=tiny_model.config)
    with torch.no_grad():
        tiny_model(torch.ones(1, 100, dtype=torch.long), past_key_values=cache)
    assert cache_bytes(cache) == 2 * 2 * 2 * 100 * 32 * 4  # layers x (K, V) x heads x tokens x head_dim x float32


@pytest.mark.parametrize("prompt_tokens", [256, 1000, 3072, 3500])
def test_every_look_up_fits_the_cache_of_its_prompt(prompt_tokens):
    settings = DemoSettings(prompt_tokens=prompt_tokens, measured_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text = (MODEL_DIR / "heldout.txt").read_text(encoding="utf-8")
    tasks = evaluate.recall_tasks(tokenizer, text, settings.recall_distances)
    assert len(tasks) == settings.recall_tasks
    assert max(task.ids.shape[1] for task in tasks) <= settings.max_cache_len
    assert max(task.distance for task in tasks) >= 0.45 * prompt_tokens
