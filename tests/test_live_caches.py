"""What an InnerQCache refused nobody quantizes behind its back, and a cache knows which weights it was filled with."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, StaticCache

from innerq_compile import InnerQCache, disable, enable, explain, fold_key_norm
from innerq_compile.compiler.explain import LEFT_ALONE

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
REFUSED = {"preset": "int8", "group_size": 128}
EXACT = {"options": {"exact": True}}


def build(config=None):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES)).eval()


def prompt(length, seed=0):
    return torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Graphs go through the passes and run as they are."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, example_inputs, config_patches: gm.forward)
    torch._dynamo.reset()


def logits(model, **kwargs):
    ids = prompt(200)
    settings = {"do_sample": False, "max_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    out = model.generate(ids, **settings, output_logits=True, return_dict_in_generate=True, **kwargs)
    return torch.stack(out.logits)


def decode(model, cache, seed=1):
    with torch.no_grad():
        return model(prompt(1, seed), past_key_values=cache).logits


def filled(model, cache, length=200):
    with torch.no_grad():
        model.forward(prompt(length), past_key_values=cache)
    return cache


class TestWhatACacheRefused:
    @pytest.mark.parametrize("ours", [True, False], ids=["a cache of ours", "the user's StaticCache"])
    def test_is_not_quantized_behind_enable(self, ours):
        model = build()
        expected = logits(model)
        enable(model, exact=True, **REFUSED)
        found = logits(model, **({} if ours else {"cache_implementation": "static"}))
        torch.testing.assert_close(found, expected)

    def test_is_not_quantized_where_the_model_was_compiled_by_hand_and_captures_other_caches(self):
        model = build()
        expected = logits(model)
        model.compile(backend="innerq", **EXACT)
        captured = logits(model, cache_implementation="static")
        assert not torch.allclose(captured, expected)  # asked for: rounded
        cache = InnerQCache(model.config, max_cache_len=256, **REFUSED)
        assert list(cache.unquantized) == [0]
        torch.testing.assert_close(logits(model, past_key_values=cache), expected)

    def test_nor_are_sliding_layers_and_copies_of_a_prefix(self):
        model = build(MistralConfig(**SIZES, sliding_window=256))
        cache = filled(model, InnerQCache(model.config, max_cache_len=256))
        assert "Sliding" in cache.unquantized[0]
        expected = decode(model, copy.deepcopy(cache))
        model.compile(backend="innerq", **EXACT)
        torch.testing.assert_close(decode(model, copy.deepcopy(cache)), expected)

    def test_explain_says_what_an_enabled_model_does_with_a_static_cache(self):
        model = build()

        def said():
            [site] = explain(model, past_key_values=StaticCache(config=model.config, max_cache_len=64)).sites
            return site

        assert said().status == "rewritten"
        enable(model)
        assert said().status == "left" and LEFT_ALONE in said().reason
        disable(model)
        assert said().status == "rewritten"


def fold(model):
    return fold_key_norm(model, prompt(64), progress=False)


BEFORE = r"filled before {} changed the model's weights.*reset\(\)"


class TestWeightsThatChange:
    """Between the prompt and the next step of a cache."""

    def test_folding_is_refused_by_the_cache_until_it_is_undone(self):
        model = build()
        cache, twin = (filled(model, InnerQCache(model.config, max_cache_len=256)) for _ in range(2))
        expected = decode(model, twin)
        handle = fold(model)
        assert InnerQCache(model.config).config.key_norm == "folded"
        for use in (lambda: decode(model, cache), cache.get_seq_length, lambda: decode(model, copy.deepcopy(cache))):
            with pytest.raises(RuntimeError, match=BEFORE.format(r"fold_key_norm\(\)")):
                use()
        handle.restore()
        assert torch.equal(decode(model, cache), expected)

    def test_so_is_restoring_under_a_cache_of_the_folded_model_and_reset_frees_it(self):
        model = build()
        expected = decode(model, filled(model, InnerQCache(model.config, max_cache_len=256, key_norm="off")))
        handle = fold(model)
        cache = filled(model, InnerQCache(model.config, max_cache_len=256))
        handle.restore()
        with pytest.raises(RuntimeError, match=BEFORE.format(r"restore\(\)")):
            decode(model, cache)
        cache.reset()
        assert torch.equal(decode(model, filled(model, cache)), expected)

    def test_compiled_steps_notice_and_recompile_nothing_otherwise(self):
        model, graphs = build(), []
        cache = filled(model, InnerQCache(model.config, max_cache_len=256))
        model.compile(backend=lambda gm, example_inputs: graphs.append(gm) or gm.forward)
        first = decode(model, copy.deepcopy(cache))
        assert len(graphs) == 1
        handle = fold(model)
        with pytest.raises(RuntimeError, match=BEFORE.format(r"fold_key_norm\(\)")):
            decode(model, cache)
        handle.restore()
        compiled = len(graphs)  # pieces of the step that was refused
        assert torch.equal(decode(model, cache), first)
        assert len(graphs) == compiled

    def test_empty_caches_and_those_of_other_models_go_on(self):
        model, other = build(), build()
        empty = InnerQCache(model.config, max_cache_len=256)
        foreign = filled(other, InnerQCache(other.config, max_cache_len=256))
        expected = decode(other, copy.deepcopy(foreign))
        fold(model)
        assert torch.equal(decode(other, foreign), expected)
        decode(model, filled(model, empty))

    def test_layers_in_sixteen_bits_are_of_their_weights_too(self):
        model = build()
        cache = filled(model, InnerQCache(model.config, max_cache_len=256, **REFUSED))
        fold(model)
        with pytest.raises(RuntimeError, match="filled before"):
            decode(model, cache)


class TestFoldingInTheGraph:
    WEIGHT = "model.layers.0.self_attn.k_proj.weight"

    def test_disable_puts_the_weights_back_and_enabling_again_folds_again(self):
        model = build()
        before, expected = model.get_parameter(self.WEIGHT).clone(), logits(model)
        for _ in range(2):
            enable(model, preset="int8", key_norm="folded", exact=True)
            found = logits(model)
            assert not torch.equal(model.get_parameter(self.WEIGHT), before)
            torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0.02 * float(expected.abs().max()))
            cache = filled(model, InnerQCache(model.config, max_cache_len=256))
            disable(model)
            assert torch.equal(model.get_parameter(self.WEIGHT), before)
            with pytest.raises(RuntimeError, match=BEFORE.format(r"disable\(\)")):
                decode(model, cache)
            del cache
        enable(model, preset="int8", exact=True)
        logits(model)
        assert torch.equal(model.get_parameter(self.WEIGHT), before)

    def test_a_filled_cache_keeps_its_weights(self, caplog):
        model = build()
        before = model.get_parameter(self.WEIGHT).clone()
        cache = filled(model, InnerQCache(model.config, max_cache_len=256))
        expected = decode(model, copy.deepcopy(cache))
        enable(model, key_norm="folded", exact=True)
        logits(model)
        [told] = [record.message for record in caplog.records if record.name.endswith("fold_captured")]
        assert "1 InnerQCache of this shape hold keys of the weights as they are" in told
        assert torch.equal(model.get_parameter(self.WEIGHT), before)
        torch.testing.assert_close(decode(model, cache), expected)


class TestExplain:
    def test_uses_up_nothing_of_what_others_may_compile(self):
        model, graphs = build(), []
        with torch._dynamo.config.patch(recompile_limit=2):
            for _ in range(3):
                assert explain(model).rewritten == 1
            model.compile(backend=lambda gm, example_inputs: graphs.append(gm) or gm.forward)
            with torch.no_grad():
                for _ in range(2):
                    cache = InnerQCache(model.config, max_cache_len=64)
                    model(prompt(40), past_key_values=cache)
                    decode(model, cache)
                    explain(model)
        assert len(graphs) == 2  # the prompt's and the step's, and explaining in between has cost neither
