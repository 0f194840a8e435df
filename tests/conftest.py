"""Fixtures shared by the tests: the replay oracle, tiny models, and memory that nobody wrote."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

EMULATED = os.environ.get("INNERQ_EMULATE")
"""Compute capability of a GPU to emulate: the Triton kernels then run as the code compiled for it (tests/ptx)."""

if EMULATED:
    sys.path.append(str(Path(__file__).resolve().parent))
    from ptx import plugin

    plugin.install(EMULATED)
elif not torch.cuda.is_available():
    # Triton reads this when it is first imported: the kernels then run on CPU tensors, program by program. A test that
    # compiles them ahead of time does so in a process of its own, without the variable.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel  # noqa: E402

from innerq_compile.numerics.config import InnerQConfig  # noqa: E402
from innerq_compile.numerics.quant import dequantize_groups, key_center_and_norm, quantize_groups  # noqa: E402


class History:
    """What a cache should hold, from the definition: one row, a growing list of tokens, no ring, no packing.

    It shares only the quantizer of single groups with the package.
    """

    def __init__(self, config: InnerQConfig) -> None:
        self.config = config
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.quantized = 0
        self.key_center: torch.Tensor | None = None
        self.key_norm: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self.keys is None else self.keys.shape[1]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values: [H, M, D]; tokens that leave the window are replaced by what their codes decode to."""
        self.keys = keys.clone() if self.keys is None else torch.cat([self.keys, keys], 1)
        self.values = values.clone() if self.values is None else torch.cat([self.values, values], 1)
        config, begin = self.config, self.quantized
        while self.num_tokens - config.sink - self.quantized >= config.recent + config.flush:
            self.quantized += config.flush
        if self.quantized == begin:
            return
        leaving = slice(config.sink + begin, config.sink + self.quantized)
        new_keys, new_values = self.keys[:, leaving], self.values[:, leaving]
        if begin == 0:
            seen = self.keys[None, :, config.sink :]
            valid = torch.ones(1, seen.shape[2], dtype=torch.bool)
            self.key_center, self.key_norm = (x[0] for x in key_center_and_norm(seen, valid, config))
        center, norm = self.key_center[:, None], self.key_norm[:, None]
        g = config.group_size
        normed = ((new_keys.float() - center) / norm).unflatten(2, (-1, g))
        decoded = dequantize_groups(*quantize_groups(normed, config.key_spec), config.key_spec).flatten(2)
        self.keys[:, leaving] = (decoded * norm + center).to(self.keys.dtype)
        by_channel = new_values.float().transpose(1, 2).unflatten(2, (-1, g))
        decoded = dequantize_groups(*quantize_groups(by_channel, config.value_spec), config.value_spec).flatten(2)
        self.values[:, leaving] = decoded.transpose(1, 2).to(self.values.dtype)

    def crop(self, num_tokens: int) -> None:
        """Drops tokens from the end; whole blocks that are cut into count as not quantized from then on."""
        kept = max(0, self.num_tokens - num_tokens)
        self.keys, self.values = self.keys[:, :kept], self.values[:, :kept]
        flush = self.config.flush
        self.quantized = min(self.quantized, max(0, kept - self.config.sink) // flush * flush)


@pytest.fixture(scope="session")
def make_history() -> type[History]:
    return History


@pytest.fixture
def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


@pytest.fixture
def make_model():
    def make(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()

    return make


@pytest.fixture
def tiny_model(tiny_config, make_model) -> PreTrainedModel:
    return make_model(tiny_config)
