"""Schemas, fakes and mutation of the ops."""

import pytest
import torch

from innerq_compile import ops
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import SLOTS, LayerState, allocate_state

CAPACITY = 512


def filled_state(config, num_tokens=200, batch=2):
    state = allocate_state(
        config,
        batch_size=batch,
        num_kv_heads=2,
        head_dim=32,
        capacity=CAPACITY,
        dtype=torch.float32,
        device="cpu",
    )
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(batch, 2, num_tokens, 32, generator=generator) for _ in range(2))
    reference.append_kv(keys, values, state, config)
    return state


@pytest.mark.parametrize("preset", ["base", "hybrid"])
class TestOpcheck:
    def test_append_kv(self, preset):
        config = InnerQConfig.from_preset(preset)
        state = filled_state(config)
        key, value = torch.randn(2, 2, 1, 32), torch.randn(2, 2, 1, 32)
        torch.library.opcheck(ops.append_kv, (key, value, *state, CAPACITY, config.spec))

    def test_dequantize_kv(self, preset):
        config = InnerQConfig.from_preset(preset)
        torch.library.opcheck(ops.dequantize_kv, (*filled_state(config), CAPACITY, config.spec))

    @pytest.mark.parametrize("masked", [True, False])
    def test_decode_attention(self, preset, masked):
        config = InnerQConfig.from_preset(preset)
        mask = torch.ones(2, 1, 1, CAPACITY, dtype=torch.bool) if masked else None
        query = torch.randn(2, 4, 1, 32)
        args = (query, *filled_state(config), mask, 0.2, CAPACITY, config.spec)
        torch.library.opcheck(ops.decode_attention, args)
        torch.library.opcheck(ops.decode_attention, (*args, True))


def test_schema_declares_every_buffer_as_mutated_by_append_and_by_nothing_else():
    def mutated(op):
        return [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    assert mutated(ops.append_kv) == list(LayerState._fields)
    assert mutated(ops.dequantize_kv) == mutated(ops.decode_attention) == []


def test_overflow_names_the_capacity_and_writes_nothing():
    config = InnerQConfig.from_preset("base")
    state = filled_state(config, num_tokens=CAPACITY)
    before = [buffer.clone() for buffer in state]
    token = torch.randn(2, 2, 1, 32)
    with pytest.raises(RuntimeError, match="holds 512 tokens, 1 more do not fit its capacity of 512.*max_cache_len"):
        ops.append_kv(token, token, *state, CAPACITY, config.spec)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_appending_to_one_row_set_leaves_a_copy_alone():
    config = InnerQConfig.from_preset("base")
    state = filled_state(config)
    copy = LayerState(*(buffer.clone() for buffer in state))
    token = torch.randn(2, 2, 1, 32)
    ops.append_kv(token, token, *state, CAPACITY, config.spec)
    assert copy.counts[:, SLOTS].tolist() == [200, 200] and state.counts[:, SLOTS].tolist() == [201, 201]
