"""Launchers: the ops' arguments checked, turned into pointers, and one C call each."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch

from innerq_compile import ops
from innerq_compile.config import MODES, InnerQConfig, TensorQuantSpec
from innerq_compile.layout import LayerState

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtype of the model -> number of cache.h's ``DType``."""

MAX_HEAD_DIM = 512
NUM_BUFFERS = len(LayerState._fields)


class _TensorSpec(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("bits", "mode", "symmetric_max_code", "asymmetric_max_code")),
        *((name, ctypes.c_float) for name in ("symmetric_center", "symmetric_span")),
    ]


class _Geometry(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "head_dim", "blocks", "sink", "recent", "flush")),
        *((name, ctypes.c_int32) for name in ("dtype", "runtime_norm")),
        ("key", _TensorSpec),
        ("value", _TensorSpec),
    ]


# Requests are packed into bytes: a third of the time that a ctypes structure of so many fields takes.
_APPEND = struct.Struct(f"{NUM_BUFFERS}P 2P 6q 3q")
"""``AppendRequest`` of append_kv.cpp."""
_DEQUANTIZE = struct.Struct(f"{NUM_BUFFERS}P 2P 2q")
"""``DequantizeRequest`` of append_kv.cpp."""
_ATTEND = struct.Struct(f"{NUM_BUFFERS}P 3P 2q 3q 5q 3q d")
"""``Request`` of decode_attention.cpp."""

CAUSAL, BOOLEAN, ADDITIVE = range(3)
"""``MaskKind`` of decode_attention.cpp."""


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


class Kernels:
    """The three ops over one built library. Arguments as in :mod:`innerq_compile.ops`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._append = library.innerq_append_kv
        self._dequantize = library.innerq_dequantize_kv
        self._attend = library.innerq_decode_attention
        for function in (self._append, self._dequantize, self._attend):
            function.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._dequantize.restype = self._attend.restype = None

    def append_kv(self, key: torch.Tensor, value: torch.Tensor, *args: Any) -> None:
        """See :func:`innerq_compile.reference.append_kv`.

        Raises:
            RuntimeError: The cache is full; nothing has been written.
            ValueError: Keys or values do not fit the cache.
        """
        *buffers, capacity, spec = args
        window = buffers[3]
        geometry = _geometry_of(buffers, spec)
        if geometry is None or not key.dtype == value.dtype == window.dtype:
            return ops.DEFAULTS["append_kv"](key, value, *args)
        _check_new_tokens(key.shape, value.shape, window.shape)
        key, value = _rows_contiguous(key), _rows_contiguous(value)
        num_new = key.shape[2]
        request = _APPEND.pack(
            *[buffer.data_ptr() for buffer in buffers], key.data_ptr(), value.data_ptr(),
            *key.stride()[:3], *value.stride()[:3], num_new, capacity, torch.get_num_threads(),
        )  # fmt: skip
        if self._append(geometry, request):
            ops.check_overflow(LayerState(*buffers), num_new, capacity)
        return None

    def dequantize_kv(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See :func:`innerq_compile.reference.dequantize_kv`."""
        *buffers, capacity, spec = args
        geometry = _geometry_of(buffers, spec)
        if geometry is None:
            return ops.DEFAULTS["dequantize_kv"](*args)
        window = buffers[3]
        shape = (*window.shape[:2], capacity, window.shape[3])
        keys, values = window.new_empty(shape), window.new_empty(shape)
        request = _DEQUANTIZE.pack(
            *[buffer.data_ptr() for buffer in buffers], keys.data_ptr(), values.data_ptr(),
            capacity, torch.get_num_threads(),
        )  # fmt: skip
        self._dequantize(geometry, request)
        return keys, values

    def decode_attention(self, query: torch.Tensor, *args: Any) -> torch.Tensor:
        """See :func:`innerq_compile.reference.decode_attention`.

        Raises:
            ValueError: The query does not fit the cache.
        """
        buffers = args[:NUM_BUFFERS]
        mask, sm_scale, capacity, spec, *rest = args[NUM_BUFFERS:]
        window = buffers[3]
        geometry = _geometry_of(buffers, spec)
        if geometry is None or query.dtype != window.dtype:
            return ops.DEFAULTS["decode_attention"](query, *args)
        _check_query(query.shape, window.shape)
        query = _rows_contiguous(query)
        batch, q_heads, q_len, _ = query.shape
        out = torch.empty(query.shape, dtype=query.dtype)
        kind, mask_pointer, mask_strides = CAUSAL, 0, (0, 0, 0, 0)
        if mask is not None:
            kind = BOOLEAN if mask.dtype == torch.bool else ADDITIVE
            mask = mask if kind == BOOLEAN else mask.float()
            mask = mask.expand(batch, q_heads, q_len, capacity)
            mask_pointer, mask_strides = mask.data_ptr(), mask.stride()
        request = _ATTEND.pack(
            *[buffer.data_ptr() for buffer in buffers], query.data_ptr(), out.data_ptr(), mask_pointer,
            q_heads, q_len, *query.stride()[:3], kind, *mask_strides,
            capacity, bool(rest and rest[0]), torch.get_num_threads(), sm_scale,
        )  # fmt: skip
        self._attend(geometry, request)
        return out


def _geometry_of(buffers: Sequence[torch.Tensor], spec: str) -> Any:
    """A pointer to what the C side has to know of a cache, or ``None`` where the reference must serve it."""
    for buffer in buffers:
        if not buffer.is_contiguous():
            return None
    window = buffers[3]
    return _geometry(spec, window.shape, buffers[0].shape[2], window.dtype)


@functools.lru_cache(maxsize=1024)
def _geometry(spec: str, window: torch.Size, blocks: int, dtype: torch.dtype) -> Any:
    config = InnerQConfig.from_spec(spec)
    batch, heads, _, head_dim = window
    if unsupported(config, head_dim, dtype):
        return None
    geometry = _Geometry(
        batch, heads, head_dim, blocks, config.sink, config.recent, config.flush_tokens, DTYPES[dtype],
        config.key_norm == "runtime", _tensor_spec(config.key_spec), _tensor_spec(config.value_spec),
    )  # fmt: skip
    return ctypes.byref(geometry)


def _tensor_spec(spec: TensorQuantSpec) -> _TensorSpec:
    return _TensorSpec(
        spec.bits, MODES.index(spec.mode), spec.symmetric_max_code, spec.asymmetric_max_code,
        spec.symmetric_center, spec.symmetric_span,
    )  # fmt: skip


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.lru_cache(maxsize=1024)
def _check_new_tokens(key: torch.Size, value: torch.Size, window: torch.Size) -> None:
    """Cached, because a refusal is not: the same good shapes come at every step."""
    batch, heads, _, head_dim = window
    if key != value or len(key) != 4 or (*key[:2], key[3]) != (batch, heads, head_dim):
        raise ValueError(
            f"keys and values must both have shape [{batch}, {heads}, tokens, {head_dim}] to fit the cache, "
            f"got {list(key)} and {list(value)}"
        )


@functools.lru_cache(maxsize=1024)
def _check_query(query: torch.Size, window: torch.Size) -> None:
    batch, heads, _, head_dim = window
    if len(query) != 4 or query[0] != batch or query[3] != head_dim or query[1] % heads:
        raise ValueError(
            f"query must have shape [{batch}, a multiple of {heads}, tokens, {head_dim}] to fit the cache, "
            f"got {list(query)}"
        )
