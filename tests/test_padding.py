"""Left-padded batches: every row gives what it gives alone, and its pads leave no trace in the cache."""

import logging

import pytest
import torch
from transformers import DynamicCache

from innerq_compile import InnerQCache, disable, enable
from innerq_compile.cache import layer as layer_module
from innerq_compile.cache.layer import InnerQLayer
from innerq_compile.compiler import backend
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS

LENGTHS = (300, 170, 5)
WIDTH = max(LENGTHS)
NEW = 24


def rows(lengths=LENGTHS):
    return [torch.randint(1, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def left_pad(parts):
    """Token rows of different lengths as [B, longest] ids and mask."""
    width = max(map(len, parts))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in parts])
    return ids, torch.stack([torch.arange(width) >= width - len(row) for row in parts]).long()


@pytest.fixture
def model(tiny_config, make_model):
    tiny_config.initializer_range = 0.2  # attention decides the next token, not the last token alone
    return make_model(tiny_config)


def new_cache(model, **settings):
    return InnerQCache(model.config, preset="small", **{"max_cache_len": 512, **settings})


def generate(model, ids, mask, cache, **kwargs):
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **kwargs)
    return out[:, -NEW:]


def alone(model, parts, **kwargs):
    return torch.cat(
        [generate(model, r[None], torch.ones(1, len(r)).long(), new_cache(model), **kwargs) for r in parts]
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_cache_len", [512, None])
def test_each_row_generates_what_it_generates_alone(model, max_cache_len, attention):
    model.set_attn_implementation(attention)
    cache = new_cache(model, max_cache_len=max_cache_len)
    out = generate(model, *left_pad(rows()), cache)
    assert torch.equal(out, alone(model, rows()))
    counts = cache.layers[0].state.counts
    assert counts[:, SLOTS].eq(WIDTH + NEW - 1).all()
    assert counts[:, PADS].tolist() == [WIDTH - n for n in LENGTHS]
    assert counts[:, QUANTIZED].tolist() == [cache.config.num_quantized(n + NEW - 1) for n in LENGTHS]


def test_the_other_tests_can_fail(model, monkeypatch):
    monkeypatch.setattr(InnerQLayer, "set_pads", lambda self, pads: None)
    out = generate(model, *left_pad(rows()), new_cache(model))
    assert not torch.equal(out, alone(model, rows()))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_rows_that_begin_in_a_later_chunk(model, chunk):
    ids, mask = left_pad(rows((70, 33, 2)))
    cache = new_cache(model)
    out = generate(model, ids, mask, cache, prefill_chunk_size=chunk)
    assert cache.layers[1].state.counts[:, PADS].tolist() == [0, 37, 68]
    # Nothing is quantized yet, so chunks attend to the same numbers as a whole prompt.
    assert torch.equal(out, alone(model, rows((70, 33, 2))))


def test_a_second_turn_keeps_the_pads_of_the_first(model):
    turns = [rows(), [row.flip(0)[:50] for row in rows((60, 61, 62))]]
    cache, singles = new_cache(model), [new_cache(model) for _ in LENGTHS]
    ids, mask = left_pad(turns[0])
    first = generate(model, ids, mask, cache)
    ids = torch.cat([ids, first, torch.stack(turns[1])], 1)
    mask = torch.cat([mask, torch.ones(3, NEW + 50, dtype=torch.long)], 1)
    second = generate(model, ids, mask, cache)
    for i, single in enumerate(singles):
        row = turns[0][i]
        row = torch.cat([row, generate(model, row[None], torch.ones(1, len(row)).long(), single)[0], turns[1][i]])
        assert torch.equal(second[i : i + 1], generate(model, row[None], torch.ones(1, len(row)).long(), single))


def test_after_reset_a_batch_without_padding_has_none(model):
    cache = new_cache(model)
    generate(model, *left_pad(rows()), cache)
    cache.reset()
    ids = torch.stack([row[:160] for row in rows((170, 180, 190))])
    out = generate(model, ids, torch.ones_like(ids), cache)
    assert cache.layers[0].state.counts[:, PADS].tolist() == [0, 0, 0]
    assert torch.equal(out, alone(model, list(ids)))


@pytest.mark.parametrize("sampling", [{}, {"num_return_sequences": 2}])
def test_beams_of_padded_rows(model, sampling):
    parts = rows((200, 150))
    out = generate(model, *left_pad(parts), new_cache(model), num_beams=3, **sampling)
    assert torch.equal(out, alone(model, parts, num_beams=3, **sampling))


def test_pads_leave_no_trace(tiny_config):
    """Whatever stands in the padded columns, every buffer holds bit for bit what the row alone would leave there."""
    key, value = torch.randn(2, 3, 2, 300, 32).unbind(0)
    pads = [0, 130, 299]
    layer = InnerQLayer(InnerQCache(tiny_config, preset="hybrid").config, 512)
    layer.set_pads(torch.tensor(pads))
    dirty_key, dirty_value = key.clone(), value.clone()
    for row, count in enumerate(pads):
        dirty_key[row, :, :count], dirty_value[row, :, :count] = 1e4, float("nan")
    layer.update(dirty_key, dirty_value)
    for row, count in enumerate(pads):
        single = InnerQLayer(layer.config, 512)
        single.update(key[row : row + 1, :, count:], value[row : row + 1, :, count:])
        for name, got, expected in zip(layer.state._fields, layer.state, single.state, strict=True):
            if name != "counts":
                assert torch.equal(got[row : row + 1], expected), name


def four_dimensional(mask, capacity):
    """The mask that a caller who knows better might make: [B, 1, T, T] for a prompt."""
    width = mask.shape[1]
    return (mask[:, None, None, :].bool() & torch.ones(width, width).tril().bool()).contiguous()


def test_padding_that_cannot_be_known_is_told_once_and_still_masked(model, caplog, monkeypatch):
    monkeypatch.setattr(layer_module, "_told", set())
    ids, mask = left_pad(rows())
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    full, blind, told = DynamicCache(config=model.config), new_cache(model), new_cache(model)
    told.set_padding(mask)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger=layer_module.__name__):
        expected, *others = [
            model(
                ids,
                attention_mask=four_dimensional(mask, WIDTH),
                position_ids=position_ids,
                past_key_values=cache,
            ).logits[:, -1]
            for cache in (full, told, blind, new_cache(model))
        ]
    for logits in others:
        torch.testing.assert_close(logits, expected)
    assert [record.message for record in caplog.records if "set_padding" in record.message] != []
    assert len(caplog.records) == 1
    assert told.layers[0].state.counts[:, PADS].tolist() == [0, 130, 295]
    assert blind.layers[0].state.counts[:, PADS].tolist() == [0, 0, 0]


def test_other_caches_and_other_models_are_not_disturbed(model):
    ids, mask = left_pad(rows())
    cache = new_cache(model)
    cache.get_mask_sizes(7, 0)  # asked, but never followed by a mask
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        model(ids[:1, :10], past_key_values=cache)
    assert int(cache.layers[0].state.counts[0, PADS]) == 0
    assert torch.equal(generate(model, ids, mask, new_cache(model, recent=400))[:, :4], expected[:, -4:])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not backend.cpp_compiler_works(), reason="needs a C++ compiler")
def test_compiled_generation_of_padded_rows(model):
    torch._dynamo.reset()
    ids, mask = left_pad(rows())
    expected = alone(model, rows())
    enable(model, preset="small", exact=True)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[:, -NEW:], expected
    )
    disable(model)

    compiled, cache, tokens = torch.compile(model, backend="innerq", options={"exact": True}), new_cache(model), []
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for _ in range(NEW):
            logits = compiled(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits
            ids = logits[:, -1:].argmax(-1)
            tokens.append(ids)
            mask, position_ids = torch.cat([mask, mask.new_ones(3, 1)], 1), position_ids[:, -1:] + 1
    assert torch.equal(torch.cat(tokens, 1), expected)
    assert cache.layers[0].state.counts[:, PADS].tolist() == [0, 130, 295]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
