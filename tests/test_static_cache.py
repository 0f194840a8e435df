"""Unmodified ``StaticCache`` models: attention over a packed copy of the buffers, which is never served stale."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from innerq_compile import explain
from innerq_compile.cache import shadow
from innerq_compile.compiler import backend
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.passes.decode.capture_static_cache import ADVICE, CAPTURED

CAPACITY = 300
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    initializer_range=0.2,
)


def prompt(length=200, batch=2, seed=0):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def compiled():
    """A compiled model (its graphs run uncompiled) and the lengths of the copies that were made anew."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, example_inputs, config_patches: gm.forward)
        torch._dynamo.reset()
        yield torch.compile(model, backend="innerq", options={"exact": True})


@pytest.fixture
def made(monkeypatch):
    """Lengths of the copies that were made from the buffers."""
    lengths = []

    def quantize_buffers(keys, values, length, config):
        lengths.append(length)
        return original(keys, values, length, config)

    original = shadow.quantize_buffers
    monkeypatch.setattr(shadow, "quantize_buffers", quantize_buffers)
    return lengths


def new_cache():
    return StaticCache(config=CONFIG, max_cache_len=CAPACITY)


def read(model, ids, cache):
    """The logits of a call that no backend sees."""
    with torch.no_grad():
        return model.forward(ids, past_key_values=cache).logits


def step(compiled, cache, seed=1, q_len=1):
    """One compiled step. A copy of the cache, whose buffers are new to everyone, must give the same."""
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        logits, expected = (compiled(prompt(q_len, seed=seed), past_key_values=c).logits for c in (cache, twin))
    assert torch.equal(logits, expected)
    return logits


@pytest.fixture
def decoding(compiled):
    cache = new_cache()
    read(compiled._orig_mod, prompt(), cache)
    for seed in range(3):
        step(compiled, cache, seed)
    return compiled, cache


def nothing(model, cache):
    return None


def an_uncompiled_step(model, cache):
    read(model, prompt(1, seed=8), cache)


def reset_and_a_prompt_of_the_same_length(model, cache):
    cache.reset()
    read(model, prompt(203, seed=8), cache)


def reset_and_a_shorter_prompt(model, cache):
    cache.reset()
    read(model, prompt(150, seed=8), cache)


def reset_and_a_longer_prompt(model, cache):
    cache.reset()
    read(model, prompt(250, seed=8), cache)


def crop(model, cache):
    cache.layers[0].cumulative_length.sub_(20)


def crop_and_go_another_way(model, cache):
    cache.layers[0].cumulative_length.sub_(20)
    read(model, prompt(20, seed=8), cache)


def reorder_beams(model, cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def reorder_in_place(model, cache):
    for buffer in (cache.layers[0].keys, cache.layers[0].values):
        buffer.copy_(buffer.flip(0))


def write_values_only(model, cache):
    cache.layers[0].values[:, :, 70] = 3.0


def write_under_inference_mode(model, cache):
    with torch.inference_mode():
        cache.layers[0].keys[:, :, 70].mul_(-1.0)


def write_through_a_view(model, cache):
    cache.layers[0].keys.view(-1)[5000].add_(1.0)


def move_to_other_memory(model, cache):
    cache.layers[0].keys.data = cache.layers[0].keys.flip(0).clone()


EVENTS = [
    an_uncompiled_step,
    reset_and_a_prompt_of_the_same_length,
    reset_and_a_shorter_prompt,
    reset_and_a_longer_prompt,
    crop,
    crop_and_go_another_way,
    reorder_beams,
    reorder_in_place,
    write_values_only,
    write_under_inference_mode,
    write_through_a_view,
    move_to_other_memory,
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_whatever_happens_in_between_the_copy_is_that_of_the_buffers(decoding, made, event):
    compiled, cache = decoding
    event(compiled._orig_mod, cache)
    step(compiled, cache, seed=5)
    assert len(made) == 2  # the cache's own and its twin's
    step(compiled, cache, seed=6)
    assert len(made) == 3  # only the twin's: the copy has been kept


def test_without_an_event_the_copy_is_kept_and_is_what_a_fresh_one_would_be(decoding, made):
    compiled, cache = decoding
    for seed in range(40):
        with torch.no_grad():
            compiled(prompt(1, seed=seed), past_key_values=cache)
    assert made == []
    layer = cache.layers[0]
    state = shadow._shadows[layer.keys].state
    fresh = shadow.quantize_buffers(layer.keys, layer.values, 243, InnerQConfig.from_preset("base"))
    for name, kept, expected in zip(state._fields, state, fresh, strict=True):
        assert torch.equal(kept, expected), name


def test_two_caches_do_not_mix(decoding):
    compiled, first = decoding
    second = new_cache()
    read(compiled._orig_mod, prompt(203, seed=9), second)
    for seed in range(3):
        step(compiled, first, seed)
        step(compiled, second, seed)


def test_several_tokens_a_step(decoding, made):
    compiled, cache = decoding
    for seed in range(3):
        step(compiled, cache, seed, q_len=7)
    assert len(made) == 3
    step(compiled, cache, q_len=40)  # too long for the fused op: attends to the buffers themselves
    assert len(made) == 3
    step(compiled, cache)
    assert len(made) == 5


def test_a_long_chunk_behind_a_crop_is_not_forgotten(decoding):
    compiled, cache = decoding
    crop(compiled, cache)
    with torch.no_grad():
        compiled(prompt(40, seed=4), past_key_values=cache)
    crop(compiled, cache)  # the copy would end just here, 20 tokens of it overwritten
    step(compiled, cache)


def test_graphs_of_other_settings_do_not_share_a_copy(decoding, made):
    compiled, cache = decoding
    other = torch.compile(compiled._orig_mod, backend="innerq", options={"static_cache": "int8", "exact": True})
    for graph in (other, compiled, other):
        step(graph, cache)
    assert len(made) == 6


def test_attention_reads_the_rounded_copy_and_the_buffers_stay_exact(decoding):
    compiled, cache = decoding
    full = copy.deepcopy(cache)
    exact, rounded = read(compiled._orig_mod, prompt(1), full), step(compiled, cache, seed=0)
    assert torch.equal(full.layers[0].keys, cache.layers[0].keys)
    assert not torch.equal(exact, rounded)
    relative = (exact - rounded).norm() / exact.norm()
    assert relative < 0.5, relative


def test_buffers_that_nobody_can_watch_are_attended_in_sixteen_bits(compiled, caplog):
    shadow._tell_once_that_it_is_left_alone.cache_clear()
    model = compiled._orig_mod
    cache, full = new_cache(), new_cache()
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        for seed, length in enumerate((200, 1, 1)):
            expected = model.forward(prompt(length, seed=seed), past_key_values=full).logits
            run = compiled if length == 1 else model.forward
            torch.testing.assert_close(run(prompt(length, seed=seed), past_key_values=cache).logits, expected)
    assert len([record for record in caplog.records if "cannot be watched" in record.message]) == 1


def test_a_copy_dies_with_its_cache(decoding):
    compiled, cache = decoding
    held = len(shadow._shadows)
    del cache.layers[0].keys
    assert len(shadow._shadows) == held - 1


class TestReport:
    def test_explain_says_what_is_captured_and_that_no_memory_is_saved(self, compiled):
        report = explain(compiled._orig_mod, past_key_values=new_cache())
        assert [(site.status, site.reason) for site in report.sites] == [("rewritten", CAPTURED)]
        assert "no memory" in CAPTURED and report.note == ADVICE

    @pytest.mark.parametrize(
        ("change", "reason"),
        [({"head_dim": 16}, "head_dim must be a multiple of 32"), ({"attention_dropout": 0.5}, "dropout")],
    )
    def test_what_cannot_be_captured_is_left_with_a_reason(self, change, reason):
        torch._dynamo.reset()  # otherwise the head_dim of an earlier model makes this one a symbol
        config = copy.deepcopy(CONFIG)
        for name, value in change.items():
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_config(config).train("attention_dropout" in change)
        report = explain(model, past_key_values=StaticCache(config=config, max_cache_len=64))
        assert [site.status for site in report.sites] == ["left"]
        assert "StaticCache: kept in 16 bits" in report.sites[0].reason and reason in report.sites[0].reason

    def test_the_option_turns_it_off_and_unknown_presets_are_refused(self):
        assert backend.split_options({"static_cache": "off"})[0]["static_cache"] == "off"
        with pytest.raises(ValueError, match="'static_cache' must be base or small or"):
            backend.split_options({"static_cache": "huge"})


@pytest.mark.slow
@pytest.mark.skipif(not backend.cpp_compiler_works(), reason="needs a C++ compiler")
def test_generate_compiled_by_inductor_makes_one_copy(made):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    ids = prompt()
    model.compile(backend="innerq", options={"exact": True})
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache_implementation="static",
        max_new_tokens=40,
        do_sample=False,
    )
    assert made == [201]
    cache = new_cache()
    read(model, ids, cache)
    for seed in range(3):
        step(model, cache, seed)
    an_uncompiled_step(model, cache)
    step(model, cache)
    assert made[1:] == [201, 201, 202, 203, 205, 205]  # the twins' always, the cache's own twice
