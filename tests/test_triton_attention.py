"""decode_attention in Triton against the float64 reference, within budgets computed from the data."""

import dataclasses
import os

import pytest
import torch

from innerq_compile.numerics import reference
from innerq_compile.numerics.config import BITS, MODES, InnerQConfig
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS, LayerState, allocate_state

pytest.importorskip("triton.language")

import triton.language as tl  # noqa: E402

from innerq_compile.kernels.triton import decode_attention as launcher  # noqa: E402
from innerq_compile.kernels.triton import operands  # noqa: E402
from innerq_compile.kernels.triton.interpreter import repair  # noqa: E402

repair()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS32, EPS16 = torch.finfo(torch.float32).eps, torch.finfo(torch.float16).eps
LARGEST_OFFSET = 512 + 256
"""No code, with what ``operands`` adds to it, is larger."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Two splits or so: the interpreter runs programs one after the other."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launcher, "_num_processors", lambda device: 1)


def filled_state(config, num_tokens, dtype=torch.float32, head_dim=32, batch=2, heads=1, capacity=None, pads=0, seed=0):
    shape = {"batch_size": batch, "num_kv_heads": heads, "head_dim": head_dim, "capacity": capacity or num_tokens}
    state = allocate_state(config, **shape, dtype=dtype, device=DEVICE)
    state.counts[0, PADS] = pads
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, batch, heads, num_tokens, head_dim, generator=generator)
    reference.append_kv(key.to(DEVICE, dtype), (value + 0.5).to(DEVICE, dtype), state, config)
    return state


def queries(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def steps_of_numbers(state, config, capacity):
    """The scale that multiplies each packed key and value, slot by slot: float64 [B, H, capacity, D], else 0."""
    # In symmetric mode code 0 stands for -c0 * s, so that number over c0 is the step.
    emptied = ("k_window", "v_window", "k_codes", "v_codes", "key_center")
    plain = dataclasses.replace(config, key_mode="symmetric", value_mode="symmetric")
    steps = state._replace(
        **{name: torch.zeros_like(getattr(state, name)) for name in emptied},
        key_norm=torch.ones_like(state.key_norm),
        k_scales=state.k_scales.abs(),
        v_scales=state.v_scales.abs(),
    )
    both = reference.dequantize_kv(steps, plain, capacity, torch.float64)
    specs = (config.key_spec, config.value_spec)
    return [numbers.abs() / spec.symmetric_center for numbers, spec in zip(both, specs, strict=True)]


def error_budget(query, state, mask, sm_scale, config, capacity, *, exact):
    """Largest error that the kernel's roundings can cause, per output number, from the data.

    With weights w = exp(s - max s) and out = sum w v / sum w, an error dw changes out by at most
    ``sum |dw| |v - out| / (sum w - sum |dw|)``. Scores are sums of D + 8 float32 products; of packed tiles, sums over
    32 terms as large as a code and its offset, whose last bits a matrix unit may cut off instead of rounding (2 eps);
    there the query is rounded to float16 too, relative to itself and, where it is subnormal, to its row's largest.
    2^x is wrong by 2 ulp and its argument by one. Packed weights are rounded to float16 and meet values in such sums.
    The windows of a 16-bit model are multiplied in its own dtype: query and weights are rounded to it.
    Exact, the codes of packed tiles have no offset, and query and weights are cut into three pieces of 11 bits, which
    loses 2^-33 of a number or 2^-39 of the largest; weights of a bfloat16 model's windows into three of 8 (2^-24).
    """
    batch, q_heads, q_len, head_dim = query.shape
    keys, values = reference.dequantize_kv(state, config, capacity, torch.float64)
    key_steps, value_steps = steps_of_numbers(state, config, capacity)
    packed = (key_steps.amax(-1) > 0)[:, :, None]
    heads = keys.shape[1]
    q = query.double().reshape(batch, heads, -1, head_dim) * sm_scale
    scores = q @ keys.transpose(2, 3)
    own = torch.finfo(query.dtype).eps / 2 if query.dtype != torch.float32 and not exact else 0.0
    largest = keys.abs() + 2 * state.key_center.double().abs().unsqueeze(2)
    score_error = (head_dim + 8) * 2 * EPS32 * (q.abs() @ largest.transpose(2, 3))
    window_error = torch.full_like(scores, own)
    normed = (q * state.key_norm.double().unsqueeze(2)).abs()
    decoded = (keys - state.key_center.double().unsqueeze(2)) / state.key_norm.double().unsqueeze(2)
    relative, of_largest = (2.0**-33, 2.0**-39) if exact else (EPS16 / 2, 2.0**-25)
    rounding = relative * normed + of_largest * normed.amax(-1, keepdim=True)
    sums = 0.0 if exact else 2 * 34 * EPS32 * LARGEST_OFFSET * normed @ key_steps.transpose(2, 3)
    score_error = score_error + torch.where(packed, rounding @ decoded.abs().transpose(2, 3) + sums, 0.0)
    bias = torch.zeros((), dtype=torch.float64, device=DEVICE) if mask is None else mask
    if bias.dtype == torch.bool:
        bias = torch.where(bias, 0.0, float("-inf")).double()
    bias = bias.double().expand(batch, q_heads, q_len, capacity)
    slot = torch.arange(capacity, device=DEVICE)
    slots, _, pads = state.counts.unbind(1)
    hidden = (slot < pads[:, None]) | (slot >= slots[:, None])
    bias = bias.masked_fill(hidden[:, None, None], float("-inf"))
    if mask is None:
        last = (slots - q_len)[:, None] + torch.arange(q_len, device=DEVICE)
        bias = bias.masked_fill((slot > last[:, :, None])[:, None], float("-inf"))
    scores = scores + bias.reshape(scores.shape)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    score_error = score_error + 2 * EPS32 * scores.abs().nan_to_num(0.0, 0.0, 0.0) + 4 * EPS32
    wrong = weights * (score_error.clamp(max=50).exp() - 1)
    cut = 2.0**-24 * weights + 2.0**-39 if exact else weights * window_error
    wrong = wrong + torch.where(packed, relative * weights + of_largest, cut)
    wrong = wrong.masked_fill(scores.isneginf(), 0.0)
    total = weights.sum(-1, keepdim=True)
    out = weights @ values / total
    spread = (values.unsqueeze(2) - out.unsqueeze(3)).abs()  # [B, H, G * M, T, D]
    change = (wrong.unsqueeze(3) @ spread).squeeze(3) / (total - wrong.sum(-1, keepdim=True))
    summing = (capacity + 8) * 2 * EPS32 * (weights @ values.abs()) / total
    if not exact:
        summing = summing + 2 * 34 * EPS32 * LARGEST_OFFSET * (weights @ value_steps) / total
    budget = (change + summing).nan_to_num(0.0).reshape(query.shape)
    # The reference's result is rounded to the model's dtype as well.
    rounded = torch.finfo(query.dtype).eps * (out.nan_to_num(0.0).abs().reshape(budget.shape) + budget)
    return budget + rounded + torch.finfo(query.dtype).tiny


def check_attention(config, state, query, mask=None, capacity=None, paths=(True, False)):
    capacity = capacity or int(state.counts[:, SLOTS].max())
    sm_scale = query.shape[-1] ** -0.5
    wanted = reference.decode_attention(query, state, mask, sm_scale, config, capacity, torch.float64).double()
    for exact in paths:
        got = launcher.decode_attention(query, *state, mask, sm_scale, capacity, config.spec, exact)
        assert got.dtype == query.dtype
        budget = error_budget(query, state, mask, sm_scale, config, capacity, exact=exact)
        excess = (got.double() - wanted).abs() - budget
        assert excess.max() <= 0, f"exact={exact}: over the budget by {excess.max():.2e}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_attention_stays_within_its_budget(bits, mode):
    config = InnerQConfig(key_bits=bits, value_bits=BITS[-1 - BITS.index(bits)], key_mode=mode, value_mode=mode)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[(bits + MODES.index(mode)) % 3]
    state = filled_state(config, 450, dtype, pads=7, seed=bits)
    check_attention(config, state, queries(2, 4, 1, 32, dtype=dtype))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 159, 160, 161, 192, 193, 288])
def test_every_boundary_of_the_windows(length):
    config = InnerQConfig()
    state = filled_state(config, length, pads=1, capacity=320)
    check_attention(config, state, queries(2, 2, 1, 32), capacity=320, paths=(False,))


@pytest.mark.parametrize("group_size", [16, 64, 128])
def test_other_group_sizes(group_size):
    config = InnerQConfig(group_size=group_size, value_mode="hybrid", key_mode="asymmetric", sink=5, recent=40)
    state = filled_state(config, 400, head_dim=max(32, group_size), batch=1)
    check_attention(config, state, queries(1, 2, 1, max(32, group_size)))


@pytest.mark.parametrize(
    ("q_per_kv", "q_len", "head_dim"), [(1, 1, 64), (3, 5, 32), (16, 1, 32), (4, 32, 32), (2, 2, 96)]
)
def test_query_heads_lengths_and_head_dims(q_per_kv, q_len, head_dim):
    config = InnerQConfig.from_preset("hybrid")
    state = filled_state(config, 300, pads=3, head_dim=head_dim)
    check_attention(config, state, queries(2, q_len, q_per_kv, head_dim).transpose(1, 2), paths=(False,))


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="compiled kernels have their Triton version's order")
@pytest.mark.parametrize("bits", BITS)
def test_the_other_order_of_inner_positions(bits, monkeypatch):
    """Which order it is depends on Triton's version; the result does not."""
    monkeypatch.setattr(operands, "_INNER_FOURS", tl.constexpr(not operands._INNER_FOURS.value))
    config = InnerQConfig(key_bits=bits, value_bits=bits, key_mode="hybrid", group_size=16 if bits == 3 else 32)
    check_attention(config, filled_state(config, 330, pads=3, batch=1), queries(1, 2, 1, 32))


@pytest.mark.parametrize("kind", ["bool", "shared", "additive", "lowest", "padding"])
def test_masks(kind):
    config, capacity = InnerQConfig.from_preset("small", levels="paper"), 320
    state = filled_state(config, 290, pads=5, heads=2, capacity=capacity)
    draw = torch.rand(2, 4, 3, capacity, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = {
        "bool": draw > 0.3,
        "shared": draw[:, :1, :1] > 0.3,
        "additive": draw[:1, :, :1] * 4 - 2,
        "lowest": torch.where(draw[:, :1] > 0.3, 0.0, torch.finfo().min),
        "padding": torch.ones_like(draw[:, :, :1], dtype=torch.bool).tril(290),
    }[kind]
    check_attention(config, state, queries(2, 4, 3, 32), mask, capacity, paths=(False,))


def test_a_row_that_may_attend_to_nothing_is_zero():
    config = InnerQConfig()
    state = filled_state(config, 300)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    for exact in (True, False):
        out = launcher.decode_attention(queries(2, 2, 1, 32), *state, mask, 0.2, 300, config.spec, exact)
        assert (out[1] == 0).all()
        assert (out[0] != 0).any()


@pytest.mark.parametrize(("masked", "beyond"), [(False, 1), (True, 1000)])
def test_attention_over_a_row_that_has_lost_tokens_is_nan(masked, beyond):
    """Whatever the mask hides, and in no other row."""
    config, capacity = InnerQConfig(), 300
    state = filled_state(config, capacity, pads=2)
    mask = torch.arange(capacity, device=DEVICE).expand(2, 1, 2, -1) < 10 if masked else None
    query = queries(2, 2, 2, 32)
    clean = launcher.decode_attention(query, *state, mask, 0.2, capacity, config.spec, masked)
    state.counts[1, SLOTS] += beyond
    got = launcher.decode_attention(query, *state, mask, 0.2, capacity, config.spec, masked)
    wanted = reference.decode_attention(query, state, mask, 0.2, config, capacity)
    assert got[1].isnan().all() and wanted[1].isnan().all()
    assert torch.equal(got[0], clean[0]) and wanted[0].isfinite().all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("length", [20, 300])
def test_a_query_that_is_not_finite_gives_nan_in_its_own_row(length, exact):
    """Also where its scores could all be -inf, over a few tokens in a window; and 0 where the row sees nothing."""
    config = InnerQConfig()
    state = filled_state(config, length)
    mask = torch.ones(2, 1, 2, length, dtype=torch.bool, device=DEVICE)
    mask[1, :, 1] = False
    query = queries(2, 4, 2, 32)
    clean = launcher.decode_attention(query, *state, mask, 0.2, length, config.spec, exact)
    poisoned = [(0, 1, 1, torch.nan), (0, 2, 0, torch.inf), (0, 3, 0, -torch.inf), (1, 0, 1, torch.nan)]
    for row, head, token, poison in poisoned:
        query[row, head, token, 5] = poison
    out = launcher.decode_attention(query, *state, mask, 0.2, length, config.spec, exact)
    for row, head, token, _ in poisoned[:3]:
        assert out[row, head, token].isnan().all()
        out[row, head, token] = clean[row, head, token]
    assert torch.equal(out, clean)


# (row, head, token, channel) of 300 tokens: 0..31 are the sink, 32..191 are packed, the others the recent window.
SPOILED_VALUES = {
    (0, 0, 3, 4): torch.inf, (0, 0, 60, 5): torch.nan, (0, 0, 290, 6): -torch.inf, (0, 0, 291, 7): torch.nan,
    (0, 0, 190, 8): torch.inf, (0, 0, 299, 9): torch.nan, (0, 0, 292, 10): torch.inf, (0, 0, 293, 10): -torch.inf,
}  # fmt: skip
SPOILED_KEYS = {(1, 0, 100, 2): torch.inf, (1, 0, 250, 3): torch.nan}


def is_spoiled(x):
    return torch.stack([x.isnan(), x.isposinf(), x.isneginf()])


@pytest.mark.parametrize(
    ("kind", "q_len", "settings"),
    [
        ("causal", 1, {"value_mode": "hybrid"}),
        ("causal", 3, {"key_mode": "asymmetric", "value_bits": 8, "group_size": 16}),
        ("shared", 1, {"key_mode": "hybrid", "value_mode": "asymmetric", "group_size": 16}),
        ("hidden", 1, {"value_mode": "hybrid"}),
        ("rows", 3, {"value_mode": "asymmetric", "key_mode": "hybrid"}),
        ("additive", 3, {"value_bits": 4}),
    ],
)
def test_keys_and_values_that_are_not_finite_are_nan_or_infinite_where_they_are_for_the_reference(
    kind, q_len, settings
):
    """And nowhere else: every other number is bit for bit what it is over finite ones."""
    config, length = InnerQConfig(**settings), 300
    shape = {"batch_size": 2, "num_kv_heads": 1, "head_dim": 32, "capacity": length}
    key, value = torch.randn(2, 2, 1, length, 32, generator=torch.Generator().manual_seed(0))
    states = []
    for poisoned in (False, True):
        for tensor, places in ((value, SPOILED_VALUES), (key, SPOILED_KEYS)):
            for place, poison in places.items():
                tensor[place] = poison if poisoned else 0.0
        states.append(allocate_state(config, **shape, dtype=torch.float32, device=DEVICE))
        reference.append_kv(key.to(DEVICE), value.to(DEVICE), states[-1], config)
    assert states[0].counts[:, QUANTIZED].tolist() == [160, 160]
    draw = torch.rand(2, 2, q_len, length, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.4
    if kind == "shared":
        draw = draw[:, :1]
    if kind == "hidden":  # the whole of each block and of each part of the windows that holds such a number
        draw = torch.zeros_like(draw[:, :1])
        draw[..., 64:96] = True
        draw[0, ..., 128:160] = True
    draw[..., 299] &= torch.arange(q_len, device=DEVICE) == q_len - 1
    mask = None if kind == "causal" else draw
    if kind == "additive":
        mask = torch.zeros(draw.shape, device=DEVICE).masked_fill(~draw, float("-inf"))
    query = queries(2, 2, q_len, 32)
    wanted = reference.decode_attention(query, states[1], mask, 0.2, config, length)
    exact = "group_size" in settings
    clean, got = (launcher.decode_attention(query, *state, mask, 0.2, length, config.spec, exact) for state in states)
    assert torch.equal(is_spoiled(got), is_spoiled(wanted))
    assert torch.equal(got.where(wanted.isfinite(), clean), clean)
    assert wanted.isfinite().any() and wanted.isfinite().all() == (kind == "hidden")


@pytest.mark.parametrize("magnitude", [0.0, 2.0**-140, 2.0**-120, 2.0**-60, 2.0**10])
def test_queries_of_every_magnitude(magnitude):
    """Before a query is rounded or cut it is divided by its largest number, which may have no finite inverse."""
    config = InnerQConfig()
    state = filled_state(config, 300, batch=1)
    check_attention(config, state, magnitude * queries(1, 2, 1, 32))


@pytest.mark.parametrize("preset", ["base", "small", "int8"])
def test_accuracy_on_normal_data(preset):
    """The two numbers of the issue: 1.5e-2 by default, 1e-5 exactly, against float64 over the same cache."""
    config = InnerQConfig.from_preset(preset)
    state = filled_state(config, 1500, head_dim=64, batch=1)
    query = queries(1, 4, 1, 64)
    wanted = reference.decode_attention(query, state, None, 0.125, config, 1500, torch.float64).double()
    for exact, limit in ((True, 1e-5), (False, 1.5e-2)):
        got = launcher.decode_attention(query, *state, None, 0.125, 1500, config.spec, exact)
        assert (got - wanted).norm() / wanted.norm() <= limit


def test_rows_of_different_length_and_a_cache_that_is_mostly_empty():
    config, capacity = InnerQConfig(), 4096
    state = filled_state(config, 400, capacity=capacity)
    short = filled_state(config, 170, capacity=capacity, batch=1)
    for name in LayerState._fields:
        getattr(state, name)[1:] = getattr(short, name)
    assert state.counts[:, QUANTIZED].tolist() == [256, 32]
    check_attention(config, state, queries(2, 2, 1, 32), capacity=capacity, paths=(False,))


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 7, 20])
def test_every_split_of_the_blocks_is_the_same_attention(splits, monkeypatch):
    """17 blocks are 5 units of work: equal parts, parts with one unit more, and splits that get none."""
    monkeypatch.setattr(launcher, "num_splits", lambda *args: splits)
    config = InnerQConfig(sink=0, recent=32)
    state = filled_state(config, 600, batch=1)
    assert state.counts[:, QUANTIZED].tolist() == [17 * 32]
    check_attention(config, state, queries(1, 2, 1, 32), paths=(False,))


@pytest.mark.skipif("races" in os.environ.get("INNERQ_EMULATE", ""), reason="a record of every byte does not fit")
def test_no_32_bit_offset_stands_in_the_way():
    """The second head's codes lie past byte 2**32. The buffers are never touched: on a CPU they take no memory."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("takes 20 GB, and the GPU may be needed by others")
    config, capacity = InnerQConfig(), 400
    small = filled_state(config, capacity, heads=2, batch=1)
    blocks, blocks_used = 2**32 // 384 + 8, small.k_codes.shape[2]
    huge = {}
    for name in ("k_codes", "k_scales", "v_codes", "v_scales"):
        buffer = getattr(small, name)
        per_block = buffer.shape[2] // blocks_used
        huge[name] = buffer.new_empty((1, 2, blocks * per_block, *buffer.shape[3:]))
        huge[name][:, :, : buffer.shape[2]] = buffer
    state = small._replace(**huge)
    assert state.k_codes.stride(1) > 2**32
    query = queries(1, 4, 1, 32)
    out = launcher.decode_attention(query, *state, None, 0.2, capacity, config.spec)
    assert torch.equal(out, launcher.decode_attention(query, *small, None, 0.2, capacity, config.spec))


def test_a_query_that_does_not_fit_is_refused():
    config = InnerQConfig()
    state = filled_state(config, 200)
    with pytest.raises(ValueError, match="query must have shape"):
        launcher.decode_attention(queries(2, 3, 1, 64), *state, None, 1.0, 200, config.spec)
