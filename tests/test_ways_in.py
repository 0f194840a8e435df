"""The ways to reach the backend, with every cache: what each compiles during ``generate()``, and what the user is told.

Inductor is left out: what counts is which graphs arrive and what becomes of their sites.
"""

import copy
import logging

import pytest
import torch
from transformers import CompileConfig, DynamicCache

from innerq_compile import InnerQCache, enable, explain
from innerq_compile.cache import layer as layer_module
from innerq_compile.compiler import backend
from innerq_compile.passes.decode.dynamic_cache import ADVICE, GROWING

NEW = 8


@pytest.fixture
def reports(monkeypatch):
    """What the passes said about each graph that reached the backend."""
    found = []

    def run_passes(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    original = backend.run_passes
    monkeypatch.setattr(backend, "run_passes", run_passes)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, example_inputs, config_patches: gm.forward)
    backend._tell_once.cache_clear()
    monkeypatch.setattr(layer_module, "_told", set())
    torch._dynamo.reset()
    return found


@pytest.fixture
def model(tiny_config, make_model):
    tiny_config.num_hidden_layers = 1
    return make_model(tiny_config)


def prompt(length=80, seed=0):
    phrase = torch.randint(1, 256, (1, 10), generator=torch.Generator().manual_seed(seed))
    return phrase.repeat(1, length // 10)


def generate(model, ids=None, **kwargs):
    ids = prompt() if ids is None else ids
    settings = {"do_sample": False, "max_new_tokens": NEW, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **{**settings, **kwargs})


def small_cache(model):
    return InnerQCache(model.config, preset="small", max_cache_len=256, recent=32, sink=0)


def compile_config(**settings):
    config = CompileConfig(backend="innerq", **settings)
    config._compile_all_devices = True  # transformers compiles nothing on a CPU unless this is set
    return config


EXACT = {"options": {"exact": True}}
"""Without it, compiled kernels round queries to integers and uncompiled ones do not."""


def by_hand(model):
    model.forward = torch.compile(model.forward, backend="innerq", **EXACT)


def in_place(model):
    model.compile(backend="innerq", **EXACT)


def enabled(model):
    enable(model, exact=True)


@pytest.mark.parametrize("way", [in_place, by_hand, enabled])
def test_prefill_and_decode_are_compiled(model, reports, way):
    expected = generate(model, past_key_values=small_cache(model))
    way(model)
    assert torch.equal(generate(model, past_key_values=small_cache(model)), expected)
    assert [(report.left, report.rewritten) for report in reports] == [(1, 0), (0, 1)]


@pytest.mark.parametrize("settings", [{}, {"mode": None, **EXACT}])
def test_compile_config_compiles_decoding(model, reports, settings):
    expected = generate(model, past_key_values=small_cache(model))
    config = compile_config(**settings)
    assert torch.equal(generate(model, past_key_values=small_cache(model), compile_config=config), expected)
    assert [(report.left, report.rewritten) for report in reports] == [(0, 1)]


def test_compile_config_compiles_no_beams(model, reports):
    generate(model, past_key_values=small_cache(model), compile_config=compile_config(), num_beams=2)
    assert reports == []


def test_generate_of_a_compiled_module_compiles_nothing_and_says_so(model, reports, caplog):
    compiled = torch.compile(model, backend="innerq")
    with caplog.at_level(logging.WARNING, logger="innerq_compile"):
        generate(compiled, past_key_values=small_cache(model))
    assert reports == []
    [told] = [record.message for record in caplog.records if record.name.startswith("innerq_compile")]
    assert "without its backend" in told and "innerq_compile.enable(model)" in told


def test_calls_of_a_compiled_module_are_compiled(model, reports):
    compiled = torch.compile(model, backend="innerq", **EXACT)
    cache, expected_cache = small_cache(model), small_cache(model)
    with torch.no_grad():
        for ids in (prompt(), *prompt(10).split(1, 1)):
            expected = model(ids, past_key_values=expected_cache).logits
            torch.testing.assert_close(compiled(ids, past_key_values=cache).logits, expected)
    assert [(report.left, report.rewritten) for report in reports] == [(1, 0), (0, 1)]


def test_a_growing_cache_that_is_full_inside_a_compiled_call_names_the_way_out(model, reports):
    compiled, cache = torch.compile(model, backend="innerq"), InnerQCache(model.config)
    with torch.no_grad():
        model(prompt(250), past_key_values=cache)
        model(prompt(250), past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"larger max_cache_len. \(A cache without one grows under generate"):
            for _ in range(30):
                compiled(prompt(10)[:, :1], past_key_values=cache)
    assert int(cache.get_seq_length()) == 512


@pytest.mark.parametrize(
    "mode",
    [
        {"prompt_lookup_num_tokens": 10},
        {"prompt_lookup_num_tokens": 31, "max_matching_ngram_size": 2, "max_new_tokens": 40},
        {"num_beams": 3},
        {"prefill_chunk_size": 16},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_every_step_of_an_enabled_model_is_served_by_the_fused_op(model, reports, mode):
    expected = generate(model, past_key_values=small_cache(model), **mode)
    enable(model, preset="small", recent=32, sink=0, exact=True)
    assert torch.equal(generate(model, **mode), expected)
    prefill, *others = reports
    assert (prefill.left, prefill.found) == (1, 0)
    assert others and all((report.rewritten, report.refused, report.left) == (1, 0, 0) for report in others)


def test_copies_of_a_prefix_share_the_compiled_graphs(model, reports):
    cache = small_cache(model)
    enable(model)
    with torch.no_grad():
        model.forward(prompt(), past_key_values=cache)
    for seed in range(3):
        ids = torch.cat([prompt(), prompt(50, seed + 1)], 1)
        generate(model, ids, past_key_values=copy.deepcopy(cache))
    assert len(reports) == 2  # a chunk of 50 on a past, a decode step


class TestDynamicCache:
    def test_an_enabled_model_leaves_it_alone_and_names_the_line_to_change_once(self, model, reports, caplog):
        expected = generate(model)
        enable(model)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(generate(model, cache_implementation="dynamic"), expected)
            generate(model, prompt(60), cache_implementation="dynamic")
        assert [record.message for record in caplog.records] == [ADVICE]
        assert reports and all(report.found == 0 for report in reports)

    def test_without_a_cache_nothing_is_said(self, model, reports, caplog):
        enable(model)
        with caplog.at_level(logging.WARNING):
            generate(model, use_cache=False)
        assert caplog.records == []

    def test_explain_names_the_line_to_change(self, model):
        report = explain(model, past_key_values=DynamicCache(config=model.config))
        assert [(site.path, site.reason) for site in report.sites] == [("model.layers.0.self_attn", GROWING)]
        assert report.note == ADVICE
