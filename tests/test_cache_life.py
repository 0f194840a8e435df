"""What transformers' caches can do, ours can: reset, change rows, modes and dtypes; or it says that it cannot."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from innerq_compile import InnerQCache
from innerq_compile.cache.layer import InnerQLayer
from innerq_compile.compiler import backend
from innerq_compile.numerics.layout import PADS


def words(length, batch=1, seed=0):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def keys_and_values(length, batch=1, seed=0, dtype=torch.float32):
    return torch.randn(2, batch, 2, length, 32, generator=torch.Generator().manual_seed(seed)).to(dtype).unbind(0)


def same_buffers(layer, other):
    return all(map(torch.equal, layer.state, other.state))


class TestAnEmptiedLayerIsAsGoodAsNew:
    @pytest.mark.parametrize("preset", ["base", "hybrid", "paper-small"])
    @pytest.mark.parametrize("length", [5, 150, 200])
    @pytest.mark.parametrize("empty", ["reset", "crop"])
    def test_bit_for_bit(self, tiny_config, preset, length, empty):
        layer, fresh = (InnerQLayer(InnerQCache(tiny_config, preset=preset).config, 512) for _ in range(2))
        layer.set_pads(torch.tensor([3]))
        layer.update(*keys_and_values(300))
        layer.reset() if empty == "reset" else layer.crop(-300)
        assert int(layer.get_seq_length()) == 0
        for one in (layer, fresh):
            one.update(*keys_and_values(length, seed=1))
            one.update(*keys_and_values(40, seed=2))
        assert same_buffers(layer, fresh)

    @pytest.mark.parametrize(("batch", "dtype"), [(3, torch.float32), (1, torch.bfloat16), (1, torch.float64)])
    def test_also_for_another_batch_or_dtype(self, tiny_config, batch, dtype):
        """A wider dtype that is there stays, as a ``StaticCache`` would keep it; a narrower one gives way."""
        layer, fresh = (InnerQLayer(InnerQCache(tiny_config).config, 512) for _ in range(2))
        layer.update(*keys_and_values(300))
        layer.reset()
        layer.set_pads(torch.arange(batch))
        fresh.set_pads(torch.arange(batch))
        new = keys_and_values(200, batch, 1, dtype)
        layer.update(*new)
        fresh.update(*(x.to(layer.dtype) for x in new))
        assert layer.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert same_buffers(layer, fresh)

    def test_the_cache_asks_for_the_padding_again(self, tiny_model):
        cache = InnerQCache(tiny_model.config, max_cache_len=512)
        mask = (torch.arange(20) >= torch.tensor([[0], [7]])).long()
        with torch.no_grad():
            tiny_model(words(20, 2), attention_mask=mask, past_key_values=cache)
            for _ in range(2):
                cache.crop(-int(cache.get_seq_length()))
                tiny_model(words(1, 2), attention_mask=mask[:, :1], past_key_values=cache)
                assert cache.layers[1].state.counts[:, PADS].tolist() == [0, 1]
                tiny_model(words(19, 2), attention_mask=mask, past_key_values=cache)
                assert cache.layers[1].state.counts[:, PADS].tolist() == [0, 7]


class TestRowsOfALayerThatIsNotFilledYet:
    @pytest.mark.parametrize("was_used", [False, True])
    def test_take_their_padding_along(self, tiny_config, was_used):
        cache = InnerQCache(tiny_config, max_cache_len=512)
        if was_used:
            for index in range(2):
                cache.update(*keys_and_values(8, 3), index)
            cache.reset()
        cache.set_padding((torch.arange(9) >= torch.tensor([[0], [3], [7]])).long())
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
        for index in range(2):
            cache.update(*keys_and_values(9, 4), index)
        assert [layer.state.counts[:, PADS].tolist() for layer in cache.layers] == [[0, 7, 7, 0]] * 2

    @pytest.mark.parametrize("head_dim", [32, 48])
    def test_may_be_changed_without_effect(self, tiny_config, head_dim):
        tiny_config.head_dim = head_dim
        cache = InnerQCache(tiny_config)
        for call in (
            lambda: cache.batch_repeat_interleave(3),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.reorder_cache(torch.tensor([0])),
            lambda: cache.reset(),
            lambda: cache.to("cpu"),
        ):
            call()
        cache.update(*torch.randn(2, 2, 2, 5, head_dim), 0)
        assert cache.num_tokens() == 5

    def test_may_be_chosen_by_a_boolean_of_each(self, tiny_config):
        layer = InnerQLayer(InnerQCache(tiny_config).config, 512)
        layer.update(*keys_and_values(200, 3))
        before = layer._dequantize()[0].clone()
        layer.batch_select_indices(torch.tensor([True, False, True]))
        assert layer.batch_size == 2 and torch.equal(layer._dequantize()[0], before[[0, 2]])


class TestInferenceMode:
    """Tensors made under it cannot be changed outside of it; those of a cache can."""

    @pytest.mark.parametrize("head_dim", [32, 48], ids=["packed", "16 bit"])
    @pytest.mark.parametrize("made", [True, False])
    @pytest.mark.parametrize(("filled", "used"), [(True, False), (False, True)])
    def test_a_cache_may_be_made_filled_and_used_in_and_out_of_it(
        self, tiny_config, make_model, head_dim, made, filled, used
    ):
        tiny_config.head_dim = head_dim
        model = make_model(tiny_config)
        results = []
        for modes in ((made, filled, used), (False, False, False)):
            with torch.inference_mode(modes[0]):
                cache = InnerQCache(tiny_config, preset="int8")
            with torch.no_grad(), torch.inference_mode(modes[1]):
                model(words(510, 2), past_key_values=cache)
                cache.batch_select_indices(torch.tensor([1, 0]))
            with torch.no_grad(), torch.inference_mode(modes[2]):
                steps = [model(words(n, 2), past_key_values=cache).logits for n in (1, 40)]  # the second one grows it
                cache.reorder_cache(torch.tensor([1, 1]))
                steps.append(model(words(1, 2), past_key_values=cache).logits)
                cache.reset()
                steps.append(model(words(3, 2), past_key_values=cache).logits)
            results.append(torch.cat([step.flatten() for step in steps]))
        assert torch.equal(*results)

    @pytest.mark.parametrize("head_dim", [32, 48], ids=["packed", "16 bit"])
    def test_a_compiled_prompt_leaves_a_cache_that_may_leave_it(self, tiny_config, head_dim):
        tiny_config.head_dim, tiny_config.num_hidden_layers = head_dim, 1
        cache, expected = (InnerQCache(tiny_config, max_cache_len=128) for _ in range(2))
        key, value = torch.randn(2, 1, 2, 20, head_dim)
        torch._dynamo.reset()
        with torch.inference_mode():
            torch.compile(lambda k, v: cache.update(k, v, 0), backend="eager", fullgraph=True)(key, value)
        expected.update(key, value, 0)
        for one in zip(cache.update(key, value, 0), expected.update(key, value, 0), strict=True):
            assert torch.equal(*one)


class TestAutocast:
    @pytest.mark.parametrize(("prompt", "decode"), [(True, True), (True, False), (False, True)])
    @pytest.mark.parametrize("head_dim", [32, 48], ids=["packed", "16 bit"])
    def test_gives_what_a_dynamic_cache_gives(self, tiny_config, make_model, prompt, decode, head_dim):
        """Both are compared with full precision: another order of summation rounds other numbers to bfloat16."""
        tiny_config.head_dim = head_dim
        model = make_model(tiny_config)

        def run(cache, prompt, decode):
            with torch.no_grad():
                with torch.autocast("cpu", torch.bfloat16, enabled=prompt):
                    model(words(200), past_key_values=cache)
                with torch.autocast("cpu", torch.bfloat16, enabled=decode):
                    return model(words(3), past_key_values=cache).logits

        full, theirs = DynamicCache(config=tiny_config), DynamicCache(config=tiny_config)
        exact, expected = run(full, False, False), run(theirs, prompt, decode)
        got = run(InnerQCache(tiny_config, recent=1024), prompt, decode)
        assert theirs.layers[0].keys.dtype == torch.float32  # turned by RoPE, which autocast leaves alone
        assert got.dtype == expected.dtype
        assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max()

    def test_a_fused_step_has_the_dtype_of_the_attention_that_it_replaces(self, tiny_config, monkeypatch):
        reports, original = [], backend.run_passes
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, config_patches: gm.forward)
        monkeypatch.setattr(backend, "run_passes", lambda *a, **k: reports.append(original(*a, **k)) or reports[-1])
        cache, twin = (InnerQCache(tiny_config, max_cache_len=64) for _ in range(2))
        for one in (cache, twin):
            one.update(*keys_and_values(40), 0)
        mask = torch.arange(64) <= 40

        def step(query, key, value, cache):
            keys, values = cache.update(key, value, 0)
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask[None])

        torch._dynamo.reset()
        compiled = torch.compile(step, backend="innerq", options={"exact": True}, fullgraph=True)
        new = torch.randn(3, 1, 2, 1, 32)
        with torch.no_grad():
            exact = step(*new, copy.deepcopy(twin))
            with torch.autocast("cpu", torch.bfloat16):
                got, expected = compiled(*new, cache), step(*new, twin)
        assert [report.rewritten for report in reports] == [1]
        assert got.dtype == expected.dtype == torch.bfloat16
        assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max()

    def test_what_would_be_rounded_is_refused_and_changes_nothing(self, tiny_config):
        layer = InnerQLayer(InnerQCache(tiny_config).config, 512)
        layer.update(*keys_and_values(10, dtype=torch.bfloat16))
        before = [buffer.clone() for buffer in layer.state]
        for dtype in (torch.float32, torch.float16):
            with pytest.raises(
                ValueError, match="holds torch.bfloat16 on cpu, got keys of .* alike, inside torch.autocast"
            ):
                layer.update(*keys_and_values(1, dtype=dtype))
        assert all(map(torch.equal, before, layer.state))

    def test_keys_and_values_of_two_dtypes_are_held_exactly(self, tiny_config):
        layer = InnerQLayer(InnerQCache(tiny_config).config, 512)
        keys, values = keys_and_values(10)
        got = layer.update(keys.half(), values.bfloat16())
        assert layer.dtype == got[0].dtype == got[1].dtype == torch.float32
        assert torch.equal(layer.state.v_window[:, :, :10], values.bfloat16().float())


def test_offloading_is_refused_by_name(tiny_config):
    with pytest.raises(ValueError, match="not offloaded layer by layer"):
        InnerQCache(tiny_config, offloading=True)
    cache = InnerQCache(tiny_config)
    for call in (
        lambda: cache.offload(0),
        lambda: cache.prefetch(1),
        cache.layers[0].offload,
        cache.layers[0].prefetch,
    ):
        with pytest.raises(NotImplementedError, match=r"cache.to\(device\) move all of it"):
            call()


def test_a_cache_that_waits_for_a_mask_may_die(tiny_config):
    cache = InnerQCache(tiny_config)
    cache.get_mask_sizes(7, 0)  # asked, but never followed by a mask
    alive = weakref.ref(cache)
    del cache
    gc.collect()
    assert alive() is None


def test_a_copy_of_a_cache_learns_its_own_padding(tiny_model):
    cache = InnerQCache(tiny_model.config)
    cache.get_mask_sizes(9, 0)
    twin = copy.deepcopy(cache)
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    with torch.no_grad():
        tiny_model(words(9, 2), attention_mask=mask, past_key_values=twin)
    assert twin.layers[0].state.counts[:, PADS].tolist() == [0, 4] and cache.num_tokens() == 0
