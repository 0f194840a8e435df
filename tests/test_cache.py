"""The cache as ``generate()`` and as direct callers use it, in eager mode."""

import copy
import logging

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, MistralConfig

from innerq_compile.cache import layer as layer_module
from innerq_compile.cache.innerq_cache import InnerQCache
from innerq_compile.cache.layer import InnerQLayer
from innerq_compile.numerics.layout import QUANTIZED


def prompt(length, batch=1, seed=0):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, new_tokens=20, **kwargs):
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **kwargs)


@pytest.mark.parametrize("max_cache_len", [2048, None])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (5, 2), (160, 1), (700, 2), (1800, 1)])
def test_eight_bits_generate_what_full_precision_generates(tiny_model, length, batch, max_cache_len):
    ids = prompt(length, batch)
    cache = InnerQCache(tiny_model.config, preset="int8", max_cache_len=max_cache_len)
    assert torch.equal(generate(tiny_model, ids, past_key_values=cache), generate(tiny_model, ids))
    assert int(cache.get_seq_length()) == length + 19


def test_before_anything_is_quantized_logits_are_those_of_full_precision(tiny_model):
    ids = prompt(159)
    cache, full = InnerQCache(tiny_model.config, preset="small"), DynamicCache(config=tiny_model.config)
    with torch.no_grad():
        for part in (slice(0, 1), slice(1, 60), slice(60, 159)):
            got = tiny_model(ids[:, part], past_key_values=cache).logits
            expected = tiny_model(ids[:, part], past_key_values=full).logits
            # Same numbers, another order of summation: masked columns stand between them.
            torch.testing.assert_close(got, expected)


def test_prefill_attends_to_exact_keys(tiny_model):
    ids = prompt(600)
    cache = InnerQCache(tiny_model.config, preset="small")
    with torch.no_grad():
        assert torch.equal(tiny_model(ids, past_key_values=cache).logits, tiny_model(ids).logits)
    assert cache.layers[0].state.counts[0, QUANTIZED] == 448


@pytest.mark.parametrize("chunk", [1, 32, 33, 200])
def test_chunks_on_a_past_attend_to_the_dequantized_past_and_the_exact_chunk(tiny_model, chunk):
    ids = prompt(400 + chunk)
    cache = InnerQCache(tiny_model.config, preset="small", max_cache_len=1024)
    with torch.no_grad():
        tiny_model(ids[:, :400], past_key_values=cache)
        layer = cache.layers[0]
        key, value = torch.randn(1, 2, chunk, 32), torch.randn(1, 2, chunk, 32)
        past_keys, past_values = (x.clone() for x in layer._dequantize())
        keys, values = layer.update(key, value)
    assert torch.equal(keys[:, :, 400 : 400 + chunk], key) and torch.equal(values[:, :, 400 : 400 + chunk], value)
    flushed = slice(0, 32 + 256)  # what was packed before the chunk; a short chunk may flush one more block
    assert torch.equal(keys[:, :, flushed], past_keys[:, :, flushed])
    assert torch.equal(values[:, :, flushed], past_values[:, :, flushed])


def test_a_second_prompt_after_reset_equals_a_fresh_cache(tiny_model):
    first, second = prompt(300), prompt(250, seed=1)
    cache = InnerQCache(tiny_model.config, preset="base", max_cache_len=512)
    generate(tiny_model, first, past_key_values=cache)
    addresses = [buffer.data_ptr() for buffer in cache.layers[0].state]
    cache.reset()
    again = generate(tiny_model, second, past_key_values=cache)
    assert addresses == [buffer.data_ptr() for buffer in cache.layers[0].state]
    fresh = InnerQCache(tiny_model.config, preset="base", max_cache_len=512)
    assert torch.equal(again, generate(tiny_model, second, past_key_values=fresh))


def test_a_growing_cache_holds_what_a_fixed_one_holds(tiny_model):
    ids = prompt(150)
    growing = InnerQCache(tiny_model.config, preset="base")
    fixed = InnerQCache(tiny_model.config, preset="base", max_cache_len=1024)
    outputs = [generate(tiny_model, ids, 500, past_key_values=cache) for cache in (growing, fixed)]
    assert torch.equal(*outputs)
    assert growing.layers[0].capacity == 1024
    for a, b in zip(growing.layers[0]._dequantize(), fixed.layers[0]._dequantize(), strict=True):
        assert torch.equal(a, b)


def test_sampling_is_reproducible(tiny_model):
    ids = prompt(200, 2)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        cache = InnerQCache(tiny_model.config, preset="base", max_cache_len=512)
        runs.append(
            tiny_model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=True, max_new_tokens=15
            )
        )
    assert torch.equal(*runs) and runs[0].shape == (2, 215)


def test_beam_reorder_crop_and_row_selection_keep_rows_whole(tiny_config):
    layer = InnerQLayer(InnerQCache(tiny_config).config, 512)
    key, value = torch.randn(3, 2, 300, 32), torch.randn(3, 2, 300, 32)
    layer.update(key, value)
    keys = layer._dequantize()[0].clone()
    order = torch.tensor([2, 2, 0])
    layer.reorder_cache(order)
    assert torch.equal(layer._dequantize()[0], keys[order])
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(layer._dequantize()[0], keys[[2, 0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer._dequantize()[0], keys[[2, 2, 0, 0]])
    layer.crop(-100)
    assert int(layer.get_seq_length()) == 200
    assert torch.equal(layer._dequantize()[0][:, :, :200], keys[[2, 2, 0, 0], :, :200])
    layer.crop(-200)
    assert layer.is_empty
    with pytest.raises(ValueError, match="number <= 0, got 3"):
        layer.crop(3)


def test_a_deep_copy_lives_its_own_life(tiny_model):
    cache = InnerQCache(tiny_model.config, preset="base", max_cache_len=512)
    with torch.no_grad():
        tiny_model(prompt(200), past_key_values=cache)
        twin = copy.deepcopy(cache)
        tiny_model(prompt(1), past_key_values=twin)
    assert (int(cache.get_seq_length()), int(twin.get_seq_length())) == (200, 201)


def test_sliding_layers_keep_transformers_own_layer():
    config = Gemma3TextConfig(
        num_hidden_layers=4,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=128,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    cache = InnerQCache(config, max_cache_len=512)
    assert [isinstance(layer, InnerQLayer) for layer in cache.layers] == [False, True] * 2
    assert cache.unquantized == {i: "StaticSlidingWindowLayer keeps its own 16-bit buffers" for i in (0, 2)}
    assert cache.is_compileable


def test_a_head_dim_that_does_not_fit_keeps_its_layer_in_sixteen_bit(tiny_config):
    tiny_config.head_dim = 80
    cache = InnerQCache(tiny_config, max_cache_len=512)
    assert all("head_dim must be a multiple of 32" in reason for reason in cache.unquantized.values())
    assert len(cache.unquantized) == 2


def test_mistral_with_a_window_on_every_layer_is_left_alone():
    config = MistralConfig(num_hidden_layers=2, sliding_window=64, head_dim=32)
    assert set(InnerQCache(config, max_cache_len=128).unquantized) == {0, 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 2}, r"\(batch, heads, head_dim\) = \(1, 2, 32\), got keys of \(2, 2, 32\)"),
        ({"heads": 4}, r"got keys of \(1, 4, 32\)"),
        ({"dim": 64}, r"got keys of \(1, 2, 64\)"),
        ({"dtype": torch.float64}, r"holds torch.float32 on cpu, got keys of torch.float64"),
        ({"device": "meta"}, r"on cpu, got keys of torch.float32 on meta"),
    ],
)
def test_input_that_does_not_fit_is_refused_and_changes_nothing(tiny_config, change, message):
    layer = InnerQLayer(InnerQCache(tiny_config).config, 512)
    layer.update(torch.randn(1, 2, 10, 32), torch.randn(1, 2, 10, 32))
    before = [buffer.clone() for buffer in layer.state]
    shape = (change.get("batch", 1), change.get("heads", 2), 1, change.get("dim", 32))
    bad = torch.zeros(shape, dtype=change.get("dtype"), device=change.get("device"))
    with pytest.raises(ValueError, match=message):
        layer.update(bad, bad)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.state, strict=True))


def test_overflow_and_oversized_prompts_name_the_capacity(tiny_config):
    layer = InnerQLayer(InnerQCache(tiny_config).config, 200)
    long = torch.randn(1, 2, 201, 32)
    with pytest.raises(RuntimeError, match="a prompt of 201 tokens does not fit its capacity of 200"):
        layer.update(long, long)
    layer.update(long[:, :, :200], long[:, :, :200])
    with pytest.raises(RuntimeError, match="holds 200 tokens, 1 more do not fit its capacity of 200"):
        layer.update(long[:, :, :1], long[:, :, :1])


@pytest.mark.parametrize("value", [0, -5, 1.5, "512"])
def test_bad_max_cache_len(tiny_config, value):
    with pytest.raises(ValueError, match="max_cache_len must be a positive integer or None"):
        InnerQCache(tiny_config, max_cache_len=value)


def test_settings_reach_the_cache_and_unknown_ones_are_refused(tiny_config):
    assert InnerQCache(tiny_config, preset="small", recent=64).config.recent == 64
    with pytest.raises(ValueError, match="unknown InnerQ settings \\['bits'\\]"):
        InnerQCache(tiny_config, bits=3)


def test_uncompiled_decoding_is_told_once(tiny_model, caplog, monkeypatch):
    monkeypatch.setattr(layer_module, "_told", set())
    with caplog.at_level(logging.WARNING, logger="innerq_compile.cache.layer"):
        generate(tiny_model, prompt(5), past_key_values=InnerQCache(tiny_model.config))
    told = [record for record in caplog.records if record.name == "innerq_compile.cache.layer"]
    assert len(told) == 1 and "innerq_compile.enable(model)" in told[0].message
