"""Every model works when it is enabled, or is refused in one line before anything about it changes."""

import copy
import functools
import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GPTNeoConfig,
    MixtralConfig,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from innerq_compile import InnerQCache, disable, enable, explain
from innerq_compile.compiler import self_check as checking
from innerq_compile.compiler.self_check import self_check
from innerq_compile.refused import Refused

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import families  # noqa: E402

sys.path.pop()


def generate(model, **kwargs):
    ids = torch.randint(3, 256, (1, 20), generator=torch.Generator().manual_seed(0))
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **kwargs)


def static_cache(model):
    return functools.partial(StaticCache, config=model.config)


# State instead of keys and values; caches of their own kind; code that measures the buffer; a window that only the
# cache knows; no configuration that a cache can be made from.
@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "takes no past_key_values, it remembers the past in cache_params"),
        ("mamba2", "takes no past_key_values, it remembers the past in cache_params"),
        ("xlnet", "takes no past_key_values, it remembers the past in mems"),
        ("openai-gpt", "takes no past_key_values, it remembers nothing from step to step"),
        ("minimax", "makes a cache of its own kind"),
        ("bloom", r"transformer\.h\.0\.self_attention raises over a cache of fixed length: RuntimeError: The expanded"),
        ("cpmant", r"cpmant\.encoder\.layers\.0\.self_att\.self_attention raises over a cache of fixed length"),
        ("gpt_neo", "local attention layers count their window from the end of the buffer"),
        ("moshi", "cache forgets what is 64 tokens old, .* but its code builds no such mask"),
    ],
)
def test_family_is_refused_in_one_line_and_generates_as_before(model_type, reason):
    if model_type not in families.MODEL_TYPES:
        pytest.skip("this version of transformers does not have it")
    model = families.make_model(families.tiny_config(model_type))
    expected, before = generate(model), dict(vars(model))
    settings = copy.deepcopy(model.generation_config)
    with pytest.raises(Refused, match=reason) as caught:
        enable(model)
    assert "\n" not in str(caught.value)
    assert vars(model) == before and model.generation_config == settings
    assert str(caught.value) in explain(model).note
    assert torch.equal(generate(model), expected)


def test_cache_itself_is_refused_where_the_configuration_tells():
    for model_type in {"gpt_neo", "rwkv", "xlstm", "deepseek_v4"} & {*families.MODEL_TYPES}:
        with pytest.raises(Refused, match=f"^{model_type} cannot decode from InnerQCache: "):
            InnerQCache(families.tiny_config(model_type))


def test_gpt_neo_without_local_layers_works():
    config = GPTNeoConfig(
        vocab_size=256,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        intermediate_size=64,
    )
    model = families.make_model(config)
    expected = generate(model)
    enable(model)
    model.__dict__.pop("_compiled_call_impl")
    assert torch.equal(generate(model, disable_compile=True), expected)


class TestSelfCheck:
    def test_finds_local_layers_by_their_numbers(self):
        model = families.make_model(families.tiny_config("gpt_neo"))
        with pytest.raises(Refused, match=r"off by .* where rounding explains") as caught:
            self_check(model, static_cache(model))
        assert caught.value.layer.startswith("transformer.h.1")

    def test_finds_an_attention_that_reads_the_length_of_the_buffer(self, tiny_config, make_model):
        def attention(module, query, key, value, mask, **kwargs):
            return sdpa_attention_forward(
                module, query * torch.tensor(float(key.shape[2])).log(), key, value, mask, **kwargs
            )

        AttentionInterface.register("scaled_by_length", attention)
        tiny_config._attn_implementation = "scaled_by_length"
        model = make_model(tiny_config)
        with pytest.raises(Refused, match=r"model\.layers\.0\S* computes something else .* off by"):
            enable(model)
        assert "computes something else" in explain(model).note
        assert enable(model, check=False) is model
        disable(model)

    def test_leaves_no_trace(self, tiny_config, make_model, caplog):
        tiny_config.attention_dropout = 0.5
        model = make_model(tiny_config).train()
        model.model.layers[1].eval()
        modes = [module.training for module in model.modules()]
        state = torch.random.get_rng_state()
        self_check(model, functools.partial(InnerQCache, tiny_config))
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not caplog.records and all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_lets_rounding_and_routing_pass(self, dtype):
        config = MixtralConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            initializer_range=0.2,
        )
        for seed in range(4):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            self_check(model, functools.partial(InnerQCache, config))

    def test_one_prompt_that_disagrees_refuses_nothing(self, tiny_model, tiny_config, monkeypatch):
        decode, calls = checking._decode, []

        def decode_wrongly_once(*args):
            calls.append(args)
            return decode(*args) + 100 * (len(calls) == 1)

        monkeypatch.setattr(checking, "_decode", decode_wrongly_once)
        self_check(tiny_model, functools.partial(InnerQCache, tiny_config))
        assert len(calls) == 2

    def test_judges_no_model_that_fails_by_itself(self, tiny_model, tiny_config, caplog):
        caplog.set_level(logging.INFO, logger="innerq_compile")
        tiny_model.model.embed_tokens.forward = lambda ids: 1 / 0
        self_check(tiny_model, functools.partial(InnerQCache, tiny_config))
        assert "could not check LlamaForCausalLM: without our cache it raises ZeroDivisionError" in caplog.text

    def test_does_not_run_what_has_no_weights_here(self, tiny_config, caplog):
        caplog.set_level(logging.INFO, logger="innerq_compile")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config)
        self_check(model, functools.partial(InnerQCache, tiny_config))
        assert "did not check LlamaForCausalLM: model.embed_tokens.weight is on the meta device" in caplog.text


def test_layers_that_differ_in_head_dim_are_judged_one_by_one():
    if "gemma4_text" not in families.MODEL_TYPES:
        pytest.skip("this version of transformers has no such model")
    config = families.tiny_config("gemma4_text")  # a sliding layer, and a full one with heads twice as wide
    cache = InnerQCache(config, group_size=64, flush=64)
    assert list(cache.unquantized) == [0]
    assert cache._model["head_dim"] == [32, 64]


class TestAdapters:
    """PEFT wraps a model; what it holds is enabled. The stand-in has what we read of it."""

    @pytest.fixture
    def adapted(self, tiny_model):
        def wrap(is_prompt_learning=False):
            outer = torch.nn.Module()
            outer.model = tiny_model
            outer.peft_config = {"default": types.SimpleNamespace(is_prompt_learning=is_prompt_learning)}
            outer.get_base_model = lambda: tiny_model
            return outer

        return wrap

    def test_model_inside_is_enabled(self, adapted, tiny_model):
        outer = adapted()
        assert enable(outer) is outer
        assert tiny_model.generation_config.compile_config.backend == "innerq"
        assert explain(outer).rewritten == 2
        assert disable(outer) is outer
        assert tiny_model.generation_config.compile_config is None

    def test_learned_prompts_are_refused(self, adapted):
        with pytest.raises(Refused, match="learned keys and values"):
            enable(adapted(is_prompt_learning=True))

    def test_real_one_generates_as_before(self, tiny_model):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            tiny_model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        expected = generate(model.eval())
        enable(model, exact=True)
        tiny_model.__dict__.pop("_compiled_call_impl")
        assert torch.equal(generate(model, disable_compile=True), expected)
        assert isinstance(tiny_model._prepare_cache_for_generation, functools.partial)
        disable(model)
        assert torch.equal(generate(model), expected)
