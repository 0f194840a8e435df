"""The Triton kernels as compiled code against the reference: every preset and head_dim, each kernel of a cache's life.

Runs where ``INNERQ_EMULATE`` names a compute capability: then a launch compiles the kernel for such a GPU and emulates
it (``make emulate``). Stored bytes agree bit for bit, attention within the budget of its own tests.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

if not os.environ.get("INNERQ_EMULATE"):
    pytest.skip("runs under INNERQ_EMULATE, in a process of its own", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parent))

from test_triton_attention import check_attention, filled_state, queries  # noqa: E402
from test_triton_kernels import Twins  # noqa: E402

from innerq_compile.kernels.triton import decode_attention as launcher  # noqa: E402
from innerq_compile.numerics.config import PRESETS, InnerQConfig  # noqa: E402
from innerq_compile.numerics.layout import QUANTIZED  # noqa: E402


@pytest.fixture(autouse=True)
def few_processors(monkeypatch):
    """Some splits, so that there is something to combine, and not the hundreds of a whole GPU."""
    monkeypatch.setattr(launcher, "_num_processors", lambda device: 3)


def live(config, **shape):
    """Prefill, a token that flushes nothing, tokens up to a flush and one more, everything compared after each."""
    twins = Twins(config, dtype=torch.bfloat16, capacity=800, **shape)
    for count in (config.sink + config.ring + 500, 1, config.flush_tokens - 2, 1):
        twins.append(count)
        twins.check_state()
    twins.check_dequantized()
    assert (twins.state.counts[:, QUANTIZED] > 500).any()
    return twins


def test_compiled_kernels_keep_the_cache():
    """What the fast tests run: the base preset of a bfloat16 model with heads of 128 channels, two rows, one padded."""
    twins = live(InnerQConfig.from_preset("base"), head_dim=128, heads=2, pads=(0, 37))
    check_attention(
        twins.config, twins.state, queries(2, 8, 1, 128, dtype=torch.bfloat16), capacity=800, paths=(False,)
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset, head_dim):
    config = InnerQConfig.from_preset(preset)
    twins = live(config, head_dim=head_dim, pads=(5,))
    query = queries(1, 4, 1, head_dim, dtype=torch.bfloat16)
    check_attention(config, twins.state, query, capacity=800, paths=(False, True) if head_dim == 128 else (False,))


@pytest.mark.parametrize("mode", ["asymmetric", "hybrid"])
def test_modes_of_keys_and_values(mode):
    config = InnerQConfig(key_mode=mode, value_mode=mode, value_bits=2)
    twins = live(config, head_dim=128)
    check_attention(config, twins.state, queries(1, 4, 1, 128, dtype=torch.bfloat16), capacity=800)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("q_per_kv", "q_len"), [(1, 1), (4, 1), (8, 1), (16, 1), (4, 5), (1, 32)])
def test_query_shapes(q_per_kv, q_len, dtype):
    config = InnerQConfig.from_preset("base")
    state = filled_state(config, 460, dtype, head_dim=128, heads=2, batch=1, pads=9, capacity=480)
    query = queries(1, 2 * q_per_kv, q_len, 128, dtype=dtype)
    check_attention(config, state, query, capacity=480, paths=(False,))


@pytest.mark.parametrize("kind", ["boolean", "shared", "additive", "lowest", "row"])
def test_masks(kind):
    config, capacity = InnerQConfig.from_preset("small"), 480
    state = filled_state(config, 450, torch.bfloat16, head_dim=128, heads=2, batch=2, pads=9, capacity=capacity)
    draw = torch.rand(2, 8, 2, capacity, generator=torch.Generator().manual_seed(0))
    mask = {
        "boolean": draw > 0.3,
        "shared": draw[:, :1, :1] > 0.3,
        "additive": draw[:1] * 4 - 2,
        "lowest": torch.where(draw[:, :1] > 0.3, 0.0, torch.finfo(torch.float32).min),
        "row": draw[:, :1] > 0.3,
    }[kind]
    check_attention(config, state, queries(2, 8, 2, 128, dtype=torch.bfloat16), mask, capacity)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 128, 159, 160, 161, 191, 192, 287, 288, 416, 417, 544, 545])
def test_boundaries_of_windows_blocks_and_splits(length):
    config = InnerQConfig.from_preset("base")
    state = filled_state(config, length, torch.bfloat16, head_dim=64, batch=1, capacity=600)
    check_attention(config, state, queries(1, 4, 1, 64, dtype=torch.bfloat16), capacity=600, paths=(False,))
