"""Chats: the cache of one ``generate()`` call goes into the next, past every capacity that a call was sized for."""

import copy

import pytest
import torch

from innerq_compile import InnerQCache, enable
from innerq_compile.compiler import backend
from innerq_compile.compiler.enable import _RESUMES, MIN_CAPACITY

SETTINGS = {"preset": "int8"}
GREEDY = {"do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def model(tiny_config, make_model):
    tiny_config.num_hidden_layers = 1
    return make_model(tiny_config)


@pytest.fixture
def twin(model):
    """The same model, which nobody enables."""
    return copy.deepcopy(model)


@pytest.fixture
def uncompiled(monkeypatch):
    """Whatever ``enable`` compiles runs as it is: here the caches count."""
    monkeypatch.setattr("transformers.PreTrainedModel.compile", lambda self, **options: None)
    return {**GREEDY, "disable_compile": True}


def words(length, batch=1, seed=0):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def big_cache(model, capacity=2048):
    return InnerQCache(model.config, max_cache_len=capacity, **SETTINGS)


def chat(model, cache, turns, **settings):
    """The tokens after each of ``turns``, the ids that the user adds, given with all that was said before."""
    ids, said = torch.empty(turns[0].shape[0], 0, dtype=torch.long), []
    for turn in turns:
        ids = torch.cat([ids, turn], 1)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
        ids, cache = out.sequences, out.past_key_values
        said.append(ids)
    return said, cache


def test_ten_turns_past_every_capacity_compiled(model, twin, monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, example_inputs, config_patches: gm.forward)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    turns = [words(60), *(words(length, seed=length) for length in (500, 37, 120, 200, 64, 31, 90, 150, 2))]
    enable(model, exact=True, **SETTINGS)
    settings = {**GREEDY, "max_new_tokens": 6}
    said, cache = chat(model, None, turns, **settings)
    expected, _ = chat(twin, big_cache(twin), turns, **settings)
    assert all(map(torch.equal, said, expected))
    assert cache.num_tokens() == said[-1].shape[1] - 1 and cache.max_cache_len == 1408
    # Prefill and decode step, both again for a capacity that changes, and a chunk short enough for the fused op.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


MODES = {
    "no max_new_tokens": {},
    "max_length": {"max_length": 700},
    **({"chunked prefill": {"max_new_tokens": 4, "prefill_chunk_size": 50}} if _RESUMES else {}),
    "many new tokens": {"max_new_tokens": 60},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_turns_in_every_mode(model, twin, uncompiled, mode):
    turns = [words(200), words(260, seed=1), words(210, seed=2)]
    turns = turns if "max_length" not in mode else turns[:2]
    enable(model, exact=True, **SETTINGS)
    settings = {**uncompiled, **mode}
    if "max_length" in mode:
        settings["max_length"] = 205  # of the first turn; the second one's follows below
    said, cache = chat(model, None, turns[:1], **settings)
    expected, fixed = chat(twin, big_cache(twin), turns[:1], **settings)
    if "max_length" in mode:
        settings["max_length"] = 520
    for turn in turns[1:]:
        ids = torch.cat([said[-1], turn], 1)
        more, cache = chat(model, cache, [ids], **settings)
        same, fixed = chat(twin, fixed, [ids], **settings)
        assert torch.equal(more[0], same[0])
        said = more
    assert said[-1].shape[1] > MIN_CAPACITY and cache.max_cache_len >= cache.num_tokens()


LOOKUP = {"max_new_tokens": 20, "prompt_lookup_num_tokens": 5}


@pytest.mark.parametrize("mode", [LOOKUP, *([] if _RESUMES else [{"max_new_tokens": 20, "prefill_chunk_size": 50}])])
def test_a_mode_that_would_run_the_whole_history_again_is_refused(model, uncompiled, mode):
    """transformers would, with a DynamicCache too."""
    enable(model, **SETTINGS)
    said, cache = chat(model, None, [words(30)], **{**uncompiled, **mode})
    with pytest.raises(
        ValueError, match="holds 49 tokens, and .* would not go on behind them.* Give it only the new ids"
    ):
        chat(model, cache, [torch.cat([said[0], words(10)], 1)], **{**uncompiled, **mode})
    assert cache.num_tokens() == 49


@pytest.mark.skipif(not _RESUMES, reason="this generate() is wrong there with every cache, so enable() refuses")
def test_assisted_decoding_goes_on_from_new_ids(model, twin, uncompiled):
    enable(model, exact=True, **SETTINGS)
    whole = words(30).repeat(1, 17)
    mask, caches = torch.ones_like(whole), (InnerQCache(model.config, **SETTINGS), big_cache(twin))
    for cache in caches:
        with torch.no_grad():
            twin(whole[:, :500], past_key_values=cache)
    settings = {**uncompiled, "attention_mask": mask, "max_new_tokens": 20}
    out = model.generate(whole[:, 500:], past_key_values=caches[0], **{**settings, **LOOKUP})
    expected = twin.generate(whole, past_key_values=caches[1], **settings)
    assert torch.equal(out.sequences, expected.sequences[:, 500:])


def test_beams_over_a_second_turn(model, twin, uncompiled):
    """Beams leave a row each, so what follows has as many."""
    settings = {**uncompiled, "max_new_tokens": 5, "num_beams": 2}
    enable(model, exact=True, **SETTINGS)
    ids = words(400)
    caches = [model.generate(ids, **settings).past_key_values, big_cache(twin)]
    twin.generate(ids, past_key_values=caches[1], **settings)
    longer = words(600, seed=1)
    outs = [
        m.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **settings).sequences
        for m, cache in zip((model, twin), caches, strict=True)
    ]
    assert torch.equal(*outs) and caches[0].max_cache_len == 640


def test_turns_of_a_padded_batch_given_only_what_is_new(model, twin, uncompiled):
    """The mask tells transformers that the ids are not the whole history; the cache must have room for both."""
    settings = {**uncompiled, "max_new_tokens": 4}
    enable(model, exact=True, **SETTINGS)
    results = []
    for m, cache in ((model, None), (twin, big_cache(twin))):
        mask = (torch.arange(250) >= torch.tensor([[0], [70]])).long()
        ids, tokens = words(250, 2) * mask, []
        for turn in range(3):
            out = m.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
            cache = out.past_key_values
            tokens.append(out.sequences[:, -4:])
            ids = torch.cat([out.sequences[:, -1:], words(200, 2, seed=turn + 1)], 1)
            mask = torch.cat([mask, mask.new_ones(2, 204)], 1)
        results.append((torch.cat(tokens), cache))
    (got, cache), (expected, fixed) = results
    assert torch.equal(got, expected)
    assert cache.num_tokens() == fixed.num_tokens() == 661 and cache.max_cache_len == 704


def test_a_streamer_sees_the_second_turn(model, uncompiled):
    class Streamer:
        seen = 0

        def put(self, tokens):
            self.seen += tokens.numel()

        def end(self):
            pass

    enable(model, **SETTINGS)
    streamer = Streamer()
    settings = {**uncompiled, "max_new_tokens": 3, "streamer": streamer}
    chat(model, None, [words(300), words(300, seed=1)], **settings)
    assert streamer.seen == 303 + 603 + 3


def test_enlarging_keeps_every_number(model):
    cache = InnerQCache(model.config, preset="hybrid", max_cache_len=400)
    with torch.no_grad():
        model(words(390, 2), past_key_values=cache)
    before = [x.clone() for x in cache.layers[0]._dequantize()]
    cache.reserve(1000)
    assert (cache.max_cache_len, cache.layers[0].capacity, cache.get_max_length()) == (1000, 1000, 1000)
    for old, new in zip(before, cache.layers[0]._dequantize(), strict=True):
        assert torch.equal(new[:, :, :400], old) and not new[:, :, 400:].any()
    cache.reserve(10)
    assert cache.max_cache_len == 1000
    with pytest.raises(ValueError, match="num_tokens must be a positive integer, got 0"):
        cache.reserve(0)


class TestACacheOfTheUsersOwn:
    def test_is_refused_before_anything_runs_and_enlarged_by_hand(self, model, uncompiled):
        enable(model, **SETTINGS)
        cache = InnerQCache(model.config, max_cache_len=64)
        ids = words(50)
        settings = {**uncompiled, "max_new_tokens": 10, "past_key_values": cache}
        out = model.generate(ids, **settings).sequences
        longer = torch.cat([out, words(3)], 1)
        message = "may need 72 tokens of cache; the cache in past_key_values holds 59 and was made for max_cache_len=64"
        with pytest.raises(ValueError, match=message):
            model.generate(longer, **settings)
        assert cache.num_tokens() == 59
        cache.reserve(72)
        assert model.generate(longer, **settings).sequences.shape[1] == 73

    def test_that_grows_is_sized_at_once(self, model, uncompiled):
        enable(model, **SETTINGS)
        cache = InnerQCache(model.config)
        chat(model, cache, [words(500), words(200, seed=1)], **{**uncompiled, "max_new_tokens": 4})
        assert cache.max_cache_len is None and cache.layers[0].capacity == 1024

    def test_a_limit_given_to_enable_stays_one(self, model, uncompiled):
        enable(model, max_cache_len=64, **SETTINGS)
        out = model.generate(words(50), **{**uncompiled, "max_new_tokens": 10})
        with pytest.raises(ValueError, match="may need 79 tokens of cache"):
            model.generate(
                torch.cat([out.sequences, words(10)], 1),
                past_key_values=out.past_key_values,
                **{**uncompiled, "max_new_tokens": 10},
            )

    @pytest.mark.parametrize("length", [20, 40])
    def test_without_enable_what_does_not_fit_is_refused_and_changes_nothing(self, model, length):
        cache = InnerQCache(model.config, max_cache_len=64)
        with torch.no_grad():
            model(words(50), past_key_values=cache)
            before = [buffer.clone() for buffer in cache.layers[0].state]
            with pytest.raises(RuntimeError, match=f"holds 50 tokens, {length} more do not fit its capacity of 64"):
                model(words(length), past_key_values=cache)
        assert all(map(torch.equal, before, cache.layers[0].state))


@pytest.mark.skipif(not backend.cpp_compiler_works(), reason="needs a C++ compiler")
@pytest.mark.parametrize("head_dim", [32, 48], ids=["packed", "16 bit"])
def test_a_compiled_call_past_the_end_is_an_error_and_not_the_end_of_the_process(tiny_config, head_dim):
    """Inductor's own check of an index throws in a worker thread."""
    tiny_config.num_hidden_layers, tiny_config.head_dim = 1, head_dim
    cache = InnerQCache(tiny_config, max_cache_len=64)
    assert bool(cache.unquantized) == (head_dim == 48)
    new = torch.randn(1, 2, 40, head_dim)
    cache.update(new, new, 0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda key, value: cache.update(key, value, 0), backend="innerq", fullgraph=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="holds 40 tokens, 40 more do not fit its capacity of 64"):
        compiled(new, new)
    assert cache.num_tokens() == 40
