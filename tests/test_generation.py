"""enable(), disable() and explain()."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, T5Config, T5ForConditionalGeneration

from innerq_compile import InnerQCache, disable, enable, explain
from innerq_compile.compiler import backend
from innerq_compile.compiler.enable import MIN_CAPACITY


def prompt(length: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))


def chosen_cache(model, max_cache_length: int = 40, **keywords):
    """The cache that generate() would use, without generating."""
    config = copy.copy(model.generation_config)
    arguments = {"past_key_values": keywords.pop("past_key_values")} if "past_key_values" in keywords else {}
    for name, value in keywords.items():
        setattr(config, name, value)
    model._prepare_cache_for_generation(config, arguments, None, 1, max_cache_length)
    return arguments.get("past_key_values")


class TestEnable:
    def test_compiles_in_place_and_returns_the_model(self, tiny_model):
        assert enable(tiny_model, exact=True) is tiny_model
        assert tiny_model._compiled_call_impl is not None
        config = tiny_model.generation_config.compile_config
        assert (config.backend, config.mode, config.options) == ("innerq", None, {"exact": True, "static_cache": "off"})

    def test_mode_is_spelled_out_as_options(self, tiny_model):
        enable(tiny_model, mode="reduce-overhead")
        options = tiny_model.generation_config.compile_config.options
        assert options == {"exact": False, "static_cache": "off", "triton.cudagraphs": True}

    @pytest.mark.parametrize(
        ("needed", "capacity"), [(1, MIN_CAPACITY), (512, 512), (513, 576), (1024, 1024), (3000, 3072)]
    )
    def test_capacity_is_rounded_up(self, tiny_model, needed, capacity):
        cache = chosen_cache(enable(tiny_model, preset="small", recent=64), needed)
        assert isinstance(cache, InnerQCache) and cache.max_cache_len == capacity
        assert (cache.config.value_bits, cache.config.recent) == (2, 64)

    def test_max_cache_len_is_kept_and_enforced(self, tiny_model):
        enable(tiny_model, max_cache_len=300)
        assert chosen_cache(tiny_model, 300).max_cache_len == 300
        with pytest.raises(ValueError, match="may need 301 tokens of cache, enable.. was given max_cache_len=300"):
            chosen_cache(tiny_model, 301)

    def test_every_call_gets_a_cache_of_its_own(self, tiny_model):
        enable(tiny_model)
        assert chosen_cache(tiny_model) is not chosen_cache(tiny_model)

    def test_choices_of_the_caller_are_kept(self, tiny_model, tiny_config):
        enable(tiny_model)
        mine = DynamicCache(config=tiny_config)
        assert chosen_cache(tiny_model, past_key_values=mine) is mine
        assert chosen_cache(tiny_model, use_cache=False) is None
        assert isinstance(chosen_cache(tiny_model, cache_implementation="dynamic"), DynamicCache)

    def test_second_call_replaces_the_first(self, tiny_model):
        enable(enable(tiny_model, preset="int8"), preset="int4")
        assert chosen_cache(tiny_model).config.key_bits == 4
        disable(tiny_model)
        assert tiny_model._compiled_call_impl is None and "_prepare_cache_for_generation" not in vars(tiny_model)

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"preset": "huge"}, "preset must be one of"),
            ({"key_bitz": 3}, "unknown InnerQ settings"),
            ({"max_cache_len": 0}, "max_cache_len must be a positive integer"),
        ],
    )
    def test_bad_settings_are_refused_and_change_nothing(self, tiny_model, keywords, message):
        with pytest.raises(ValueError, match=message):
            enable(tiny_model, **keywords)
        assert tiny_model._compiled_call_impl is None and tiny_model.generation_config.compile_config is None

    def test_unknown_mode_is_refused(self, tiny_model):
        with pytest.raises(ValueError, match="mode must be one of .*reduce-overhead.*got 'fast'"):
            enable(tiny_model, mode="fast")

    def test_modules_that_cannot_generate_are_refused(self, tiny_model):
        with pytest.raises(TypeError, match="transformers model that can generate.., got Linear"):
            enable(torch.nn.Linear(2, 2))
        with pytest.raises(TypeError, match="can generate.., got LlamaModel"):
            enable(tiny_model.model)
        with pytest.raises(TypeError, match="got OptimizedModule; pass the model that torch.compile.. was given"):
            enable(torch.compile(tiny_model))

    def test_encoder_decoder_is_refused(self):
        config = T5Config(d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, vocab_size=64)
        with pytest.raises(TypeError, match="decoder-only model, got T5ForConditionalGeneration"):
            enable(T5ForConditionalGeneration(config))


class TestDisable:
    def test_puts_everything_back(self, tiny_model):
        before = dict(vars(tiny_model))
        earlier = SimpleNamespace(name="the user's own compile_config")
        tiny_model.generation_config.compile_config = earlier
        assert disable(enable(tiny_model)) is tiny_model
        assert tiny_model.generation_config.compile_config is earlier
        assert vars(tiny_model) == before
        assert isinstance(chosen_cache(tiny_model), DynamicCache)

    def test_untouched_model_stays_untouched(self, tiny_model):
        before = dict(vars(tiny_model))
        assert disable(tiny_model) is tiny_model and vars(tiny_model) == before


@pytest.mark.slow
@pytest.mark.skipif(not backend.cpp_compiler_works(), reason="needs a C++ compiler")
def test_enabled_model_generates_what_the_uncompiled_one_does(tiny_model, tiny_config):
    torch._dynamo.reset()
    expected = [
        tiny_model.generate(
            prompt(n), past_key_values=InnerQCache(tiny_config, max_cache_len=512), max_new_tokens=200, do_sample=False
        )
        for n in (20, 33)
    ]
    enable(tiny_model, exact=True)
    torch._dynamo.utils.counters.clear()
    for n, tokens in zip((20, 33), expected, strict=True):
        out = tiny_model.generate(prompt(n), max_new_tokens=200, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(out.sequences, tokens)
        assert isinstance(out.past_key_values, InnerQCache) and out.past_key_values.max_cache_len == 512
    # One prefill per prompt length (the second one is dynamic), one decode step for both.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


class TestExplain:
    def test_counts_every_layer_and_leaves_the_model_alone(self, tiny_model):
        before = dict(vars(tiny_model))
        report = explain(tiny_model)
        assert (report.found, report.rewritten, report.refused, report.note) == (2, 2, 0, "")
        assert [site.path for site in report.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        assert vars(tiny_model) == before

    def test_works_on_an_enabled_model_and_a_given_prompt(self, tiny_model):
        assert explain(enable(tiny_model), prompt(5), preset="int8").rewritten == 2

    def test_eager_attention_is_rewritten_too(self, tiny_config, make_model):
        tiny_config._attn_implementation = "eager"
        report = explain(make_model(tiny_config))
        assert (report.rewritten, report.refused) == (2, 0)

    @pytest.mark.long
    def test_names_the_line_to_change_for_flex_attention(self, tiny_config, make_model):
        tiny_config._attn_implementation = "flex_attention"
        report = explain(make_model(tiny_config))
        assert (report.rewritten, report.refused) == (0, 2)
        assert all('attn_implementation="sdpa"' in site.reason for site in report.sites)

    def test_names_layers_that_keep_16_bits(self, make_model):
        config = MistralConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=16,
        )
        report = explain(make_model(config))
        assert (report.found, report.left) == (0, 2)
        assert report.sites[0].path == "model.layers.0.self_attn" and "16-bit" in report.sites[0].reason
        assert "No layer of this model can be quantized" in report.note

    def test_names_a_head_dim_that_does_not_fit(self, make_model):
        config = LlamaConfig(
            vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        report = explain(make_model(config))
        assert report.left == 1 and "head_dim must be a multiple of 32" in report.sites[0].reason

    def test_bad_settings_are_refused(self, tiny_model):
        with pytest.raises(ValueError, match="unknown InnerQ settings"):
            explain(tiny_model, key_bitz=3)
