"""Which caches the kernels serve, and a cache's settings in the form in which the C++ side reads them."""

from __future__ import annotations

import ctypes
import functools
import logging

import torch

from innerq_compile.numerics.config import MODES, ROPE_PAIRS, InnerQConfig, TensorQuantSpec
from innerq_compile.numerics.quant import KEY_CENTER_MIN_TOKENS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""dtypes of a model, in the order of kernels.h's ``DType``."""

MAX_HEAD_DIM = 512

SLOWER = "hundreds of times slower"
"""What the reference costs: a decode step of 8 heads over 2048 tokens took 250 to 3000 times as long."""

logger = logging.getLogger(__name__)


class TensorSpec(ctypes.Structure):
    """kernels.h's ``TensorSpec``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("bits", "mode", "symmetric_max_code", "asymmetric_max_code")),
        *((name, ctypes.c_float) for name in ("symmetric_center", "symmetric_span")),
    ]


class Settings(ctypes.Structure):
    """kernels.h's ``Settings``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sink", "recent", "flush", "center_min_tokens")),
        *((name, ctypes.c_int32) for name in ("runtime_center", "runtime_norm", "norm_is_root", "rope_pairs")),
        ("key", TensorSpec),
        ("value", TensorSpec),
    ]


@functools.lru_cache(maxsize=1024)
def unsupported(config: InnerQConfig, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why these kernels do not serve a cache, or ``None`` when they do. A cache they refuse runs on the reference."""
    if config.group_size != 32:
        return f"the CPU kernels know group_size 32, not {config.group_size}"
    if head_dim % 32 or not 32 <= head_dim <= MAX_HEAD_DIM:
        return f"the CPU kernels know head_dim in multiples of 32 up to {MAX_HEAD_DIM}, not {head_dim}"
    if dtype not in DTYPES:
        return f"the CPU kernels know float32, bfloat16 and float16 models, not {dtype}"
    return None


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int32, ctypes.POINTER(Settings))
def read_settings(spec: bytes, head_dim: int, dtype: int, settings: ctypes._Pointer[Settings]) -> int:
    """kernels.h's ``ReadSettings``: called once per config string, head_dim and dtype, so a refusal is told once."""
    try:
        config = InnerQConfig.from_spec(spec.decode())
    except ValueError:
        return 0  # and the default implementation raises it again
    reason = f"the CPU kernels know no other dtypes than {DTYPES}"
    if dtype < len(DTYPES):
        reason = unsupported(config, head_dim, DTYPES[dtype]) or ""
    if reason:
        logger.warning("innerq: a cache runs on the reference, which is right but %s: %s", SLOWER, reason)
        return 0
    settings[0] = Settings(
        config.sink, config.recent, config.flush_tokens, KEY_CENTER_MIN_TOKENS, config.key_center == "runtime",
        config.key_norm == "runtime", config.key_norm_exponent == 0.5, ROPE_PAIRS.index(config.rope_pairs),
        _tensor_spec(config.key_spec), _tensor_spec(config.value_spec),
    )  # fmt: skip
    return 1


def _tensor_spec(spec: TensorQuantSpec) -> TensorSpec:
    return TensorSpec(
        spec.bits, MODES.index(spec.mode), spec.symmetric_max_code, spec.asymmetric_max_code,
        spec.symmetric_center, spec.symmetric_span,
    )  # fmt: skip
