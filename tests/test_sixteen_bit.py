"""Layers that stay in 16 bit: as small as their tokens, enlarged with the rest, never written past their end."""

import pytest
import torch
from transformers import DynamicCache, FalconH1Config, Gemma3TextConfig, MistralConfig, Qwen3NextConfig

from innerq_compile import InnerQCache, enable
from innerq_compile.cache.room import MIN_CAPACITY
from innerq_compile.cache.sixteen_bit import is_allocated

WINDOW = 600
"""Larger than the first capacity, so that sliding layers grow too before they slide."""


@pytest.fixture
def mixed(make_model):
    """A sliding layer and a quantized one."""
    return make_model(
        Gemma3TextConfig(
            vocab_size=256,
            num_hidden_layers=2,
            head_dim=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            hidden_size=64,
            intermediate_size=64,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            max_position_embeddings=131072,
        )
    )


@pytest.fixture
def unfit(tiny_config, make_model):
    """A head_dim that no layer can pack."""
    tiny_config.head_dim, tiny_config.max_position_embeddings = 48, 131072
    return make_model(tiny_config)


def words(length, batch=1):
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(length))


def logits(model, cache, lengths):
    with torch.no_grad():
        return [model(words(length), past_key_values=cache).logits for length in lengths]


LENGTHS = (300, 212, 1, 60, 28, 1, 200, 1)
"""The second one fills the first capacity to the last slot, the fifth one the window but one."""


@pytest.mark.parametrize("name", ["mixed", "unfit"])
def test_a_growing_cache_gives_what_a_fixed_one_gives(request, name):
    model = request.getfixturevalue(name)
    growing, fixed = InnerQCache(model.config), InnerQCache(model.config, max_cache_len=1024)
    full = DynamicCache(config=model.config)
    got, expected, exact = (logits(model, cache, LENGTHS) for cache in (growing, fixed, full))
    for step in range(len(LENGTHS)):
        torch.testing.assert_close(got[step], expected[step])
        if name == "unfit":
            torch.testing.assert_close(got[step], exact[step])
    assert growing.num_tokens() == sum(LENGTHS) and growing.get_max_length() == -1
    assert growing.layers[0].keys.shape[2] == (WINDOW if name == "mixed" else 1536)


@pytest.mark.parametrize("kind", ["unfit", "sliding"])
def test_four_tokens_take_the_memory_of_the_first_capacity(unfit, make_model, kind):
    model = unfit
    if kind == "sliding":
        model = make_model(
            MistralConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                sliding_window=4096,
                max_position_embeddings=131072,
            )
        )
    cache, full = InnerQCache(model.config), DynamicCache(config=model.config)
    for one in (cache, full):
        logits(model, one, [4])
    one_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers) // 4
    assert cache.memory_bytes == one_token * MIN_CAPACITY


@pytest.mark.parametrize("name", ["mixed", "unfit"])
def test_what_does_not_fit_is_refused_compiled_or_not(request, name):
    model = request.getfixturevalue(name)
    cache = InnerQCache(model.config, max_cache_len=64)
    logits(model, cache, [60])
    before = cache.layers[0].keys.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="holds 60 tokens, 5 more do not fit its capacity of 64"):
        model(words(5), past_key_values=cache)
    torch._dynamo.reset()
    new = before[:, :, :5]
    with pytest.raises(RuntimeError, match="holds 60 tokens, 5 more do not fit its capacity of 64"):
        torch.compile(lambda key: cache.update(key, key, 0), backend="eager")(new)
    assert cache.num_tokens() == 60 and torch.equal(cache.layers[0].keys, before)


def test_a_cache_of_windows_that_fit_takes_any_number_of_tokens(make_model, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.compile", lambda self, **options: None)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = make_model(config)
    cache = InnerQCache(config, max_cache_len=32)
    assert not cache.is_bounded and InnerQCache(config, max_cache_len=8).is_bounded
    settings = {"max_new_tokens": 50, "do_sample": False, "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    expected = model.generate(words(20), **settings)
    enable(model)
    assert torch.equal(model.generate(words(20), past_key_values=cache, disable_compile=True, **settings), expected)


def test_rows_are_selected_and_repeated_in_every_layer(mixed):
    cache = InnerQCache(mixed.config, max_cache_len=128)
    with torch.no_grad():
        mixed(words(40, 3), past_key_values=cache)
        layer = cache.layers[0]
        keys = layer.keys.clone()
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        assert torch.equal(layer.keys, keys[[2, 2, 0, 0]]) and cache.batch_size == 4
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        assert torch.equal(layer.keys, keys[[0, 2, 2, 0]])
        mixed(words(1, 4), past_key_values=cache)


def test_dropping_tokens_is_refused_by_name(mixed):
    cache = InnerQCache(mixed.config, max_cache_len=128)
    logits(mixed, cache, [40])
    with pytest.raises(NotImplementedError, match="a StaticSlidingWindowLayer of transformers cannot drop tokens"):
        cache.crop(-3)
    assert cache.num_tokens() == 40 and not cache.is_croppable


def test_nothing_is_allocated_before_the_first_token(mixed):
    assert not is_allocated(InnerQCache(mixed.config).layers[0])


def test_rows_of_a_recurrent_layer_that_is_empty_may_be_changed():
    layers = ["linear_attention", "full_attention"]
    config = Qwen3NextConfig(num_hidden_layers=2, head_dim=32, num_key_value_heads=1, layer_types=layers)
    InnerQCache(config).batch_repeat_interleave(2)


def test_rows_and_files_of_recurrent_layers_are_refused_by_name(make_model, tmp_path):
    """Their keys could be moved, what they remember beside them could not: the rest of a row would go on as another."""
    config = FalconH1Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        mamba_d_ssm=32,
        mamba_n_heads=2,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    )
    cache = InnerQCache(config, max_cache_len=64)
    cache.batch_repeat_interleave(2)  # nothing is there yet
    with torch.no_grad():
        make_model(config)(words(5, 2) % 64, past_key_values=cache)
    kind = "LinearAttentionAndStaticFullAttentionLayer"
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(NotImplementedError, match=f"a {kind} of transformers cannot change its rows"):
            change()
    with pytest.raises(ValueError, match=f"layer 0 is a {kind}, which cannot be saved"):
        cache.save(tmp_path / "file")
    assert cache.num_tokens() == 5 and cache.layers[0].keys.shape[0] == 2
