"""The bytes a cache really occupies."""

import pytest
import torch

from innerq_compile.numerics.config import PRESETS, InnerQConfig
from innerq_compile.numerics.layout import allocate_state, expected_bytes, state_bytes


@pytest.mark.parametrize("capacity", [1024, 4096, 16384])
@pytest.mark.parametrize("preset", PRESETS)
def test_allocated_bytes_are_within_five_percent_of_the_arithmetic(preset, capacity):
    config = InnerQConfig.from_preset(preset)
    state = allocate_state(
        config, batch_size=2, num_kv_heads=8, head_dim=128, capacity=capacity, dtype=torch.bfloat16, device="cpu"
    )
    expected = 2 * expected_bytes(config, num_kv_heads=8, head_dim=128, num_tokens=capacity, itemsize=2)
    assert state_bytes(state) <= 1.05 * expected, f"{state_bytes(state) / expected:.3f} x the arithmetic"


@pytest.mark.parametrize(("preset", "per_token"), [("base", 896), ("small", 768), ("hybrid", 832), ("int4", 1152)])
def test_bytes_per_token_of_a_layer_with_8_heads_of_128(preset, per_token):
    config = InnerQConfig.from_preset(preset)
    sizes = [
        state_bytes(
            allocate_state(
                config, batch_size=1, num_kv_heads=8, head_dim=128, capacity=n, dtype=torch.bfloat16, device="cpu"
            )
        )
        for n in (4096, 8192)
    ]
    assert (sizes[1] - sizes[0]) / 4096 == per_token


@pytest.mark.parametrize(("head_dim", "settings"), [(80, {}), (48, {}), (96, {"group_size": 64})])
def test_head_dims_that_do_not_fit_are_named(head_dim, settings):
    config = InnerQConfig(**settings)
    with pytest.raises(ValueError, match=f"head_dim must be a multiple of .* got {head_dim}"):
        allocate_state(
            config, batch_size=1, num_kv_heads=1, head_dim=head_dim, capacity=512, dtype=torch.float32, device="cpu"
        )
