"""What the Triton launchers refuse: every operand that does not fit, before a kernel is launched."""

import pytest
import torch

from innerq_compile import ops
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import LayerState, allocate_state

pytest.importorskip("triton")
from innerq_compile.kernels.triton.append_kv import append_kv  # noqa: E402
from innerq_compile.kernels.triton.decode_attention import decode_attention  # noqa: E402
from innerq_compile.kernels.triton.dequantize_kv import dequantize_kv  # noqa: E402

CONFIG, CAPACITY = InnerQConfig(value_mode="asymmetric"), 256
BATCH, HEADS, DIM = 2, 2, 64


def cache(dtype=torch.bfloat16, **buffers):
    shape = {"batch_size": BATCH, "num_kv_heads": HEADS, "head_dim": DIM, "capacity": CAPACITY}
    return allocate_state(CONFIG, **shape, dtype=dtype, device="cpu")._replace(**buffers)


def never(*args, **options):
    pytest.fail("a kernel was launched")


def append(state, key=None, value=None, capacity=CAPACITY):
    one = torch.zeros(BATCH, HEADS, 3, DIM, dtype=torch.bfloat16)
    append_kv(one if key is None else key, one if value is None else value, *state, capacity, CONFIG.spec, launch=never)


def attend(state, query=None, mask=None, capacity=CAPACITY):
    query = torch.zeros(BATCH, 2 * HEADS, 1, DIM, dtype=torch.bfloat16) if query is None else query
    decode_attention(query, *state, mask, 0.2, capacity, CONFIG.spec, launch=never)


def dequantize(state, capacity=CAPACITY):
    dequantize_kv(*state, capacity, CONFIG.spec, launch=never)


@pytest.mark.parametrize("call", [append, attend, dequantize])
@pytest.mark.parametrize("name", LayerState._fields)
def test_a_buffer_of_another_shape_dtype_device_or_with_gaps_is_refused_by_name(call, name):
    right = getattr(cache(), name)
    said = f"{name}|with the other buffers" if name == "k_window" else name  # all others are measured against that one
    if right.numel() == 0:  # what a mode does not store
        bad = [right.new_zeros(1), right.float()]
    else:
        apart = torch.stack([right, right], -1)[..., 0]
        bad = [right[:1], right.unsqueeze(0), right.to(torch.float64), right.to("meta"), apart]
    for buffer in bad:
        with pytest.raises(ValueError, match="meta" if buffer.is_meta else said):
            call(cache(**{name: buffer}))


@pytest.mark.parametrize("call", [append, attend, dequantize])
def test_a_capacity_that_the_buffers_do_not_hold_is_refused(call):
    for capacity in (0, -1, CAPACITY + 160, 10**9):
        with pytest.raises(ValueError, match=f"capacity must be .* got {capacity}"):
            call(cache(), capacity=capacity)


def test_new_tokens_of_another_shape_dtype_or_device_are_refused():
    right = torch.zeros(BATCH, HEADS, 3, DIM, dtype=torch.bfloat16)
    for bad in (right[:1], right[:, :1], right[..., :32], right[0], right.unsqueeze(0), right[:, :, :2]):
        for operands in ({"key": bad}, {"value": bad}):
            with pytest.raises(ValueError, match=r"must both have shape \[2, 2, tokens, 64\]"):
                append(cache(), **operands)
    for bad in (right.float(), right.to("meta"), right.long()):
        for name, operands in (("keys", {"key": bad}), ("values", {"value": bad})):
            with pytest.raises(ValueError, match=f"{name} must be torch.bfloat16 on cpu"):
                append(cache(), **operands)


def test_a_query_or_mask_that_does_not_fit_is_refused():
    right = torch.zeros(BATCH, 4, 2, DIM, dtype=torch.bfloat16)
    for bad in (right[:1], right[:, :3], right[:, :0], right[..., :32], right[0]):
        with pytest.raises(ValueError, match=r"query must have shape \[2, a multiple of 2, tokens, 64\]"):
            attend(cache(), bad)
    for bad in (right.float(), right.half(), right.to("meta")):
        with pytest.raises(ValueError, match="query must be torch.bfloat16 on cpu"):
            attend(cache(), bad)
    for shape in ((2, 4, 2, CAPACITY - 1), (3, 1, 1, CAPACITY), (1, 1, 3, CAPACITY), (1, 2, 4, 2, CAPACITY)):
        with pytest.raises(ValueError, match="attn_mask must be broadcastable to .* 256"):
            attend(cache(), right, torch.ones(shape, dtype=torch.bool))
    for bad in (torch.ones(1, CAPACITY, dtype=torch.int64), torch.ones(1, CAPACITY, device="meta")):
        with pytest.raises(ValueError, match="attn_mask must"):
            attend(cache(), right, bad)


def test_a_cache_that_the_kernels_do_not_serve_is_checked_all_the_same(monkeypatch):
    """float64 goes to the reference; buffers with gaps, which used to, are no cache of ours."""
    served = []
    monkeypatch.setitem(ops.DEFAULTS, "append_kv", lambda *args: served.append(args[0].dtype))
    state, one = cache(torch.float64), torch.zeros(BATCH, HEADS, 3, DIM, dtype=torch.float64)
    append(state, one, one)
    with pytest.raises(ValueError, match="keys must be torch.float64"):
        append(state)
    assert served == [torch.float64]
