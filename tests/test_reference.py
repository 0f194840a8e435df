"""The oracle against the definition: replay of the history at every flush boundary, attention against float64."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from innerq_compile.numerics import reference
from innerq_compile.numerics.config import PRESETS, InnerQConfig
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS, LayerState, allocate_state

HEADS, DIM = 2, 32
LENGTHS = [0, 1, 31, 32, 33, 127, 128, 129, 159, 160, 161, 191, 192, 193, 1000, 1009]


def empty_state(config, *, batch=1, capacity=1100, head_dim=DIM, dtype=torch.float32):
    return allocate_state(
        config,
        batch_size=batch,
        num_kv_heads=HEADS,
        head_dim=head_dim,
        capacity=capacity,
        dtype=dtype,
        device="cpu",
    )


def random_kv(num_tokens, *, batch=1, head_dim=DIM, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, num_tokens, head_dim)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))


def assert_equals_history(state: LayerState, history, config: InnerQConfig, capacity=1100, row=0):
    keys, values = reference.dequantize_kv(state, config, capacity)
    pads, num_tokens = int(state.counts[row, PADS]), history.num_tokens
    assert int(state.counts[row, SLOTS]) == num_tokens + pads
    assert int(state.counts[row, QUANTIZED]) == history.quantized
    held = slice(pads, pads + num_tokens)
    for got, expected in ((keys, history.keys), (values, history.values)):
        if expected is not None:
            torch.testing.assert_close(got[row, :, held], expected, rtol=0, atol=0)
        assert got[row, :, :pads].eq(0).all() and got[row, :, pads + num_tokens :].eq(0).all()
    if history.key_norm is not None:
        torch.testing.assert_close(state.key_norm[row], history.key_norm, rtol=0, atol=0)
        torch.testing.assert_close(state.key_center[row], history.key_center, rtol=0, atol=0)


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("preset", PRESETS)
def test_prefill_of_every_boundary_length_equals_the_definition(preset, num_tokens, make_history):
    config = InnerQConfig.from_preset(preset)
    keys, values = random_kv(num_tokens)
    state, history = empty_state(config), make_history(config)
    reference.append_kv(keys, values, state, config)
    history.append(keys[0], values[0])
    assert_equals_history(state, history, config)


@pytest.mark.parametrize("num_tokens", LENGTHS[1:])
def test_token_by_token_equals_the_definition_and_keeps_the_recent_window(num_tokens, make_history):
    config = InnerQConfig.from_preset("hybrid")
    keys, values = random_kv(num_tokens)
    state, history = empty_state(config), make_history(config)
    for t in range(num_tokens):
        reference.append_kv(keys[:, :, t : t + 1], values[:, :, t : t + 1], state, config)
        history.append(keys[0, :, t : t + 1], values[0, :, t : t + 1])
        recent = t + 1 - config.sink - int(state.counts[0, QUANTIZED])
        assert recent < config.recent + config.flush
        assert recent >= config.recent or int(state.counts[0, QUANTIZED]) == 0
    assert_equals_history(state, history, config)
    exact = reference.dequantize_kv(state, config, 1100)[0][:, :, max(0, num_tokens - config.recent) : num_tokens]
    assert torch.equal(exact, keys[:, :, max(0, num_tokens - config.recent) :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_windows_and_rounding_in_sixteen_bit_models(dtype, make_history):
    config = InnerQConfig.from_preset("base")
    keys, values = random_kv(500, dtype=dtype)
    state, history = empty_state(config, dtype=dtype), make_history(config)
    for part in (slice(0, 333), slice(333, 334), slice(334, 500)):
        reference.append_kv(keys[:, :, part], values[:, :, part], state, config)
        history.append(keys[0, :, part], values[0, :, part])
    assert_equals_history(state, history, config)


@pytest.mark.parametrize("pads", [(0, 5), (40, 0), (200, 3)])
def test_left_padded_rows_hold_the_same_as_rows_alone(pads, make_history):
    config = InnerQConfig.from_preset("base")
    keys, values = random_kv(300, batch=2)
    state = empty_state(config, batch=2)
    state.counts[:, PADS] = torch.tensor(pads)
    reference.append_kv(keys[:, :, :250], values[:, :, :250], state, config)
    for t in range(250, 300):
        reference.append_kv(keys[:, :, t : t + 1], values[:, :, t : t + 1], state, config)
    for row, pad in enumerate(pads):
        history = make_history(config)
        history.append(keys[row, :, pad:250], values[row, :, pad:250])
        for t in range(250, 300):
            history.append(keys[row, :, t : t + 1], values[row, :, t : t + 1])
        assert_equals_history(state, history, config, row=row)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("preset", ["hybrid", "base"])
def test_a_poisoned_token_spoils_the_groups_it_is_in_and_nothing_else(poison, preset):
    config = InnerQConfig.from_preset(preset, key_center="off")
    keys, values = random_kv(400, batch=2)
    keys[0, 0, 50, 3] = values[0, 0, 50, 3] = 0.0  # so that the norm is the same with and without it
    states = [empty_state(config, batch=2) for _ in range(2)]
    for state in states:
        reference.append_kv(keys, values, state, config)
        keys[0, 0, 50, 3] = values[0, 0, 50, 3] = poison
    clean, spoiled = (reference.dequantize_kv(state, config, 400) for state in states)
    expected_keys, expected_values = (torch.zeros_like(x, dtype=torch.bool) for x in clean)
    expected_keys[0, 0, 50] = True  # DIM is one group of channels
    expected_values[0, 0, 32:64, 3] = True  # and these are one group of tokens
    for before, after, expected in zip(clean, spoiled, (expected_keys, expected_values), strict=True):
        assert torch.equal(after.isnan(), expected)
        assert torch.equal(before[~expected], after[~expected])


@pytest.mark.parametrize("cut", [1, 20, 96, 97, 110, 130, 200, 467, 468, 480, 500])
def test_crop_then_append_equals_the_definition(cut, make_history):
    config = InnerQConfig.from_preset("base")
    keys, values = random_kv(800)
    state, history = empty_state(config), make_history(config)
    for part in (slice(0, 500), slice(500, 700)):
        reference.append_kv(keys[:, :, part], values[:, :, part], state, config)
        history.append(keys[0, :, part], values[0, :, part])
        if part.start == 0:
            reference.crop_kv(state, config, 1100, cut)
            history.crop(cut)
            assert_equals_history(state, history, config)
    assert_equals_history(state, history, config)


@pytest.mark.parametrize("rope_pairs", ["half", "adjacent", "off"])
@pytest.mark.parametrize("key_norm", ["runtime", "folded"])
def test_centred_keys_equal_the_definition_and_a_row_that_starts_again_gets_a_new_center(
    rope_pairs, key_norm, make_history
):
    config = InnerQConfig(key_center="runtime", key_norm=key_norm, key_norm_exponent=1.0, rope_pairs=rope_pairs)
    keys, values = random_kv(1700)
    keys = keys + torch.linspace(-20, 20, DIM)
    keys[:, :, 900:] *= 3
    state, history = empty_state(config), make_history(config)
    for part, cut in ((slice(0, 640), 0), (slice(640, 760), 0), (slice(760, 900), 890), (slice(900, 1700), 0)):
        reference.append_kv(keys[:, :, part], values[:, :, part], state, config)
        history.append(keys[0, :, part], values[0, :, part])
        assert_equals_history(state, history, config)
        if cut:
            reference.crop_kv(state, config, 1100, cut)
            history.crop(cut)
    assert state.key_center.abs().amax() > 30  # three times the former
    assert (state.key_norm != 1).any() == (key_norm == "runtime")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_key_spoils_neither_center_nor_norm_nor_other_tokens(poison):
    config = InnerQConfig(key_center="runtime", key_norm_exponent=1.0, rope_pairs="half")
    keys, values = random_kv(800)
    poisoned = keys.clone()
    poisoned[0, 0, 50, 3] = poison
    states = [empty_state(config) for _ in range(2)]
    for k, state in zip((keys, poisoned), states, strict=True):
        reference.append_kv(k, values, state, config)
    assert torch.equal(states[0].key_center, states[1].key_center)
    assert torch.equal(states[0].key_norm, states[1].key_norm)
    clean, found = (reference.dequantize_kv(state, config, 800)[0] for state in states)
    differs = (clean != found).nonzero()[:, 2].unique()
    assert differs.tolist() == found.isnan().nonzero()[:, 2].unique().tolist() == [50]


class TestNumbersThatAreNotFinite:
    """Against torch's SDPA over the same tokens, in windows alone, where every number is the model's own."""

    config = InnerQConfig.from_preset("base")

    def attend(self, spoil, mask=None):
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(2, 4, 3, DIM, generator=generator)
        keys, values = (torch.randn(2, 2, 60, DIM, generator=generator) for _ in range(2))
        spoil(query, keys, values)
        state = empty_state(self.config, batch=2, capacity=60)
        reference.append_kv(keys, values, state, self.config)
        out = reference.decode_attention(query, state, mask, 0.2, self.config, 60)
        return out, query, keys, values

    @pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("operand", ["query", "key", "value"])
    def test_are_what_sdpa_makes_of_them(self, operand, poison):
        def spoil(query, keys, values):
            {"query": query[0, 1, 1], "key": keys[0, 1, 20], "value": values[0, 1, 20]}[operand][5] = poison

        out, query, keys, values = self.attend(spoil)
        causal = torch.ones(3, 60, dtype=torch.bool).tril(57)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=causal, scale=0.2, enable_gqa=True
        )
        assert not wanted.isfinite().all()
        torch.testing.assert_close(out, wanted, equal_nan=True)

    @pytest.mark.parametrize("kind", ["bool", "additive"])
    def test_do_not_pass_a_mask_that_hides_their_token(self, kind):
        def spoil(query, keys, values):
            keys[0, 1, 20, 5], values[0, 0, 21, 7], values[1, 0, 22, 7] = math.nan, math.inf, math.nan

        mask = torch.ones(1, 1, 1, 60, dtype=torch.bool)
        mask[..., 20:23] = False
        if kind == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        out, query, keys, values = self.attend(spoil, mask)
        torch.testing.assert_close(out, self.attend(lambda *_: None, mask)[0], rtol=0, atol=0)

    def test_stay_behind_the_token_that_sees_them_first(self):
        def spoil(query, keys, values):
            values[0, 0, 59, 7] = math.nan  # the last of three query tokens

        out, *_ = self.attend(spoil)
        assert out.isnan().nonzero().tolist() == [[0, 0, 2, 7], [0, 1, 2, 7]]

    def test_in_a_query_that_may_attend_to_nothing_give_zero(self):
        def spoil(query, keys, values):
            query[:, 0, 0, 0] = math.nan

        mask = torch.ones(2, 1, 1, 60, dtype=torch.bool)
        mask[0] = False
        out, *_ = self.attend(spoil, mask)
        assert out[0].eq(0).all() and out[1, 0, 0].isnan().all() and out[1, 1:].isfinite().all()


CONFIGS = st.builds(
    InnerQConfig,
    key_bits=st.sampled_from([2, 3, 4, 8]),
    value_bits=st.sampled_from([2, 3, 4, 8]),
    key_mode=st.sampled_from(["symmetric", "asymmetric", "hybrid"]),
    value_mode=st.sampled_from(["symmetric", "asymmetric", "hybrid"]),
    levels=st.sampled_from(["full", "paper"]),
    group_size=st.sampled_from([16, 32]),
    sink=st.integers(0, 40),
    recent=st.integers(1, 100),
    flush=st.sampled_from([32, 64]),
    key_norm=st.sampled_from(["runtime", "off", "folded"]),
    key_norm_exponent=st.sampled_from([0.5, 1.0]),
    rope_pairs=st.sampled_from(["half", "adjacent", "off"]),
    key_center=st.sampled_from(["runtime", "off"]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 150)),
        st.tuples(st.just("decode"), st.integers(1, 40)),
        st.tuples(st.just("crop"), st.integers(1, 80)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, steps=STEPS, seed=st.integers(0, 2**16))
def test_any_sequence_of_updates_equals_the_definition(config, steps, seed, make_history):
    state, history = empty_state(config), make_history(config)
    for number, (kind, size) in enumerate(steps):
        if kind == "crop":
            if history.num_tokens:
                reference.crop_kv(state, config, 1100, size)
                history.crop(size)
        elif kind == "reset":
            state.counts.zero_()
            state.key_norm.fill_(1.0)
            state.key_center.zero_()
            history = make_history(config)
        else:
            keys, values = random_kv(size, seed=seed + number)
            for part in [slice(0, size)] if kind == "append" else [slice(t, t + 1) for t in range(size)]:
                reference.append_kv(keys[:, :, part], values[:, :, part], state, config)
                history.append(keys[0, :, part], values[0, :, part])
    assert_equals_history(state, history, config)


def float32_budget(query, keys, values, sm_scale):
    """Bound on |float32 attention - exact attention| for finite inputs, element by element.

    A dot product of n float32 products is within gamma_n = n u / (1 - n u) of exact, relative to the sum of absolute
    products (u = 2^-24). An error of d in every logit changes each probability by a factor within exp(+-2d); the
    weighted sum over n tokens, the exponentials and the quotient add gamma_(n+8).
    """

    def gamma(n):
        return n * 2.0**-24 / (1 - n * 2.0**-24)

    head_dim, num_tokens = keys.shape[-2:][1], keys.shape[-2]
    logit = gamma(head_dim + 3) * sm_scale * (query.abs() @ keys.abs().transpose(-1, -2)).amax()
    relative = torch.expm1(2 * logit) + gamma(num_tokens + 8)
    return relative * values.abs().amax()


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("q_per_kv", [1, 2, 4, 8])
@pytest.mark.parametrize("q_len", [1, 3])
def test_decode_attention_equals_float64_attention_over_the_dequantized_cache(head_dim, q_per_kv, q_len):
    config, capacity, num_tokens = InnerQConfig.from_preset("small"), 512, 389
    state = empty_state(config, capacity=capacity, head_dim=head_dim)
    keys, values = random_kv(num_tokens, head_dim=head_dim)
    reference.append_kv(keys, values, state, config)
    query = torch.randn(1, HEADS * q_per_kv, q_len, head_dim, generator=torch.Generator().manual_seed(1))
    sm_scale = head_dim**-0.5
    slot = torch.arange(capacity)
    mask = (slot <= num_tokens - q_len + torch.arange(q_len)[:, None])[None, None]

    k, v = (x.repeat_interleave(q_per_kv, 1) for x in reference.dequantize_kv(state, config, capacity, torch.float64))
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), k, v, attn_mask=mask, scale=sm_scale)
    budget = float32_budget(query.double(), k, v, sm_scale)
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    for attn_mask in (mask, None, additive):
        out = reference.decode_attention(query, state, attn_mask, sm_scale, config, capacity)
        assert out.shape == query.shape and out.dtype == query.dtype
        error = (out.double() - expected).abs().max()
        assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


def test_a_query_that_may_attend_to_nothing_gets_zero():
    config = InnerQConfig()
    state = empty_state(config, capacity=512)
    keys, values = random_kv(10)
    reference.append_kv(keys, values, state, config)
    mask = torch.zeros(1, 1, 1, 512, dtype=torch.bool)
    assert reference.decode_attention(torch.randn(1, 2, 1, DIM), state, mask, 1.0, config, 512).eq(0).all()


@pytest.mark.parametrize("too_many", [1, 100])
def test_tokens_that_do_not_fit_change_the_count_alone_and_every_read_of_their_row_is_nan(too_many):
    """One row of two is full; appends and crops do not take the mark from it, and the other row goes on."""
    config, capacity = InnerQConfig(), 400
    state, alone = (empty_state(config, capacity=capacity, batch=batch) for batch in (2, 1))
    keys, values = random_kv(250, batch=2)
    reference.append_kv(keys, values, state, config, capacity)
    reference.append_kv(keys[1:], values[1:], alone, config, capacity)
    state.counts[0, SLOTS] = capacity - too_many + 1
    before = [buffer[:1].clone() for buffer in state[:-1]]
    for count in (too_many, 40):
        keys, values = random_kv(count, batch=2, seed=count)
        reference.append_kv(keys, values, state, config, capacity)
        reference.append_kv(keys[1:], values[1:], alone, config, capacity)
    assert all(torch.equal(x, buffer[:1]) for x, buffer in zip(before, state, strict=False))
    for name, buffer, expected in zip(LayerState._fields, state, alone, strict=True):
        assert torch.equal(buffer[1:], expected), name
    reference.crop_kv(state, config, capacity, 300)
    assert state.counts[:, SLOTS].tolist() == [capacity + 41, too_many - 10 if too_many > 10 else 0]
    query, mask = torch.randn(2, 2, 3, DIM), torch.zeros(2, 1, 3, capacity, dtype=torch.bool)
    for attn_mask in (None, mask):
        out = reference.decode_attention(query, state, attn_mask, 1.0, config, capacity)
        assert out[0].isnan().all() and out[1].isfinite().all()
    for x in reference.dequantize_kv(state, config, capacity):
        assert x[0].isnan().all() and x[1].isfinite().all()
