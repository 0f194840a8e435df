"""Every way in which ``generate()`` uses a cache: beams, drafts, chunks, turns, copies."""

import copy

import pytest
import torch

from innerq_compile import InnerQCache
from innerq_compile.numerics.layout import QUANTIZED

NEW = 40


def repetitive_prompt(batch=1, length=180, seed=0):
    """A prompt that repeats itself, so that looking drafts up in it finds some."""
    generator = torch.Generator().manual_seed(seed)
    phrase = torch.randint(1, 256, (batch, 30), generator=generator)
    return phrase.repeat(1, length // 30 + 1)[:, :length]


def generate(model, ids, cache, **kwargs):
    torch.manual_seed(3)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **{"max_new_tokens": NEW, **kwargs}
    )


@pytest.fixture
def draft(tiny_config, make_model):
    config = copy.deepcopy(tiny_config)
    config.num_hidden_layers = 1
    return make_model(config)


GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "top_k": 20}
MODES = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "several samples": {**SAMPLED, "num_return_sequences": 3},
    "beams": {**GREEDY, "num_beams": 4},
    "beams, all returned": {**GREEDY, "num_beams": 4, "num_return_sequences": 4},
    "beams, early stopping": {**GREEDY, "num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "sampled beams": {**SAMPLED, "num_beams": 3},
    "prompt lookup": {**GREEDY, "prompt_lookup_num_tokens": 10},
    "long prompt lookup": {**GREEDY, "prompt_lookup_num_tokens": 31, "max_matching_ngram_size": 2},
    "chunked prefill": {**GREEDY, "prefill_chunk_size": 50},
    "one prompt token at a time": {**GREEDY, "prefill_chunk_size": 1},
    "chunked prefill, beams": {**GREEDY, "prefill_chunk_size": 64, "num_beams": 2},
    "penalties": {**GREEDY, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}
WINDOWS_ONLY, EIGHT_BITS = {"recent": 1024}, {"preset": "int8"}
# Beams are chosen by sums of scores that lie closer together than eight bits can tell.
ROUNDED = {name: mode for name, mode in MODES.items() if mode.get("num_beams", 1) == 1}


def check_same_tokens(model, cache, mode):
    ids = repetitive_prompt(1 if "prompt_lookup_num_tokens" in mode or "assistant_model" in mode else 2)
    assert torch.equal(generate(model, ids, cache, **mode), generate(model, ids, None, **mode))


@pytest.mark.parametrize("max_cache_len", [512, None], ids=["fixed", "growing"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_cache_that_rounds_nothing_changes_nothing(tiny_model, mode, max_cache_len):
    cache = InnerQCache(tiny_model.config, max_cache_len=max_cache_len, **WINDOWS_ONLY)
    check_same_tokens(tiny_model, cache, mode)
    assert not cache.layers[0].state.counts[:, QUANTIZED].any()


@pytest.mark.parametrize("mode", ROUNDED.values(), ids=ROUNDED)
def test_eight_bits_change_nothing(tiny_model, mode):
    cache = InnerQCache(tiny_model.config, max_cache_len=512, **EIGHT_BITS)
    check_same_tokens(tiny_model, cache, mode)
    assert cache.layers[0].state.counts[:, QUANTIZED].all()


@pytest.mark.parametrize("settings", [WINDOWS_ONLY, EIGHT_BITS], ids=["windows only", "eight bits"])
def test_a_draft_model(tiny_model, draft, settings):
    cache = InnerQCache(tiny_model.config, max_cache_len=512, **settings)
    check_same_tokens(tiny_model, cache, {**GREEDY, "assistant_model": draft})


class WatchedCache(InnerQCache):
    """Keeps, beside the cache, the tokens that each row has read: reordered with it."""

    tokens = torch.empty(4, 0, dtype=torch.long)
    rows_moved = 0

    def reorder_cache(self, beam_idx):
        self.rows_moved += int((beam_idx != torch.arange(4)).sum())
        self.tokens = self.tokens[beam_idx]
        super().reorder_cache(beam_idx)


@pytest.mark.parametrize("preset", ["small", "hybrid"])
def test_beams_leave_what_their_own_tokens_leave(tiny_model, preset):
    """Reordered at every step, each row's buffers are bit for bit those of its tokens, read one after another."""
    ids = repetitive_prompt()
    settings = {"preset": preset, "max_cache_len": 512, "recent": 16}
    cache, replayed = WatchedCache(tiny_model.config, **settings), InnerQCache(tiny_model.config, **settings)

    def note(module, args, kwargs):
        cache.tokens = torch.cat([cache.tokens, kwargs["input_ids"]], 1)

    with tiny_model.register_forward_pre_hook(note, with_kwargs=True):
        generate(tiny_model, ids, cache, num_beams=4, max_new_tokens=70, **GREEDY)
    assert cache.rows_moved > 20
    with torch.no_grad():
        tiny_model(cache.tokens[:, :180], past_key_values=replayed)
        for token in cache.tokens[:, 180:].unbind(1):
            tiny_model(token[:, None], past_key_values=replayed)
    for layer, expected in zip(cache.layers, replayed.layers, strict=True):
        assert expected.state.counts[:, QUANTIZED].tolist() == [192] * 4
        for name, got, wanted in zip(layer.state._fields, layer.state, expected.state, strict=True):
            assert torch.equal(got, wanted), name


@pytest.mark.parametrize("preset", ["base", "hybrid"])
def test_rows_are_selected_and_repeated_bit_for_bit(tiny_model, preset):
    cache = InnerQCache(tiny_model.config, preset=preset, max_cache_len=512, recent=16)
    generate(tiny_model, repetitive_prompt(), cache, num_beams=4, max_new_tokens=70, **GREEDY)
    before = [buffer.clone() for buffer in cache.layers[1].state]
    assert cache.layers[1].state.counts[0, QUANTIZED] == 192
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    for buffer, old in zip(cache.layers[1].state, before, strict=True):
        assert torch.equal(buffer, old[[2, 2, 0, 0]] if old.numel() else old)


def test_several_turns_on_one_cache(tiny_model):
    cache = InnerQCache(tiny_model.config, **WINDOWS_ONLY)
    text = repetitive_prompt(length=100)
    for turn in range(4):  # prompts whose choices are none of them closer than the rounding of 8 bits
        out = generate(tiny_model, text, cache, **GREEDY)
        assert torch.equal(out, generate(tiny_model, text, None, **GREEDY))
        text = torch.cat([out, repetitive_prompt(length=60, seed=turn + 5)], 1)


def test_a_second_conversation_after_reset(tiny_model):
    cache = InnerQCache(tiny_model.config, preset="small")
    text = generate(tiny_model, repetitive_prompt(length=200), cache, **GREEDY)
    generate(tiny_model, torch.cat([text, repetitive_prompt(length=60, seed=1)], 1), cache, **GREEDY)
    cache.reset()
    again = repetitive_prompt(length=190, seed=9)
    fresh = generate(tiny_model, again, InnerQCache(tiny_model.config, preset="small"), **GREEDY)
    assert torch.equal(generate(tiny_model, again, cache, **GREEDY), fresh)


def prefilled(model, ids, **settings):
    cache = InnerQCache(model.config, preset="small", **settings)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("max_cache_len", [512, None])
def test_copies_of_a_prefix_go_their_own_ways(tiny_model, max_cache_len):
    prefix = repetitive_prompt()
    cache = prefilled(tiny_model, prefix, max_cache_len=max_cache_len)
    before = [buffer.clone() for buffer in cache.layers[0].state]
    for seed in (1, 2):
        ids = torch.cat([prefix, repetitive_prompt(length=20, seed=seed)], 1)
        expected = generate(tiny_model, ids, prefilled(tiny_model, prefix, max_cache_len=max_cache_len), **GREEDY)
        assert torch.equal(generate(tiny_model, ids, copy.deepcopy(cache), **GREEDY), expected)
    assert all(torch.equal(a, b) for a, b in zip(cache.layers[0].state, before, strict=True))


def test_one_prompt_continued_by_several_rows(tiny_model):
    prefix = repetitive_prompt()
    cache = prefilled(tiny_model, prefix, max_cache_len=512)
    tails = torch.cat([repetitive_prompt(length=15, seed=seed) for seed in (4, 5, 6)])
    singles = [
        generate(tiny_model, torch.cat([prefix, tail[None]], 1), copy.deepcopy(cache), **GREEDY) for tail in tails
    ]
    cache.batch_repeat_interleave(3)
    together = generate(tiny_model, torch.cat([prefix.expand(3, -1), tails], 1), cache, **GREEDY)
    assert torch.equal(together, torch.cat(singles))
