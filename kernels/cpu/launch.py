"""Launchers: the ops' arguments checked, turned into pointers, and one C call each."""

from __future__ import annotations

import ctypes
import functools
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


class _Request(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "out", "mask")),
        *((name, ctypes.c_int64) for name in ("q_heads", "q_len")),
        *((f"query_stride_{axis}", ctypes.c_int64) for axis in "bhm"),
        ("mask_kind", ctypes.c_int64),
        *((f"mask_stride_{axis}", ctypes.c_int64) for axis in ("b", "h", "m", "slot")),
        *((name, ctypes.c_int64) for name in ("capacity", "exact", "threads")),
        ("sm_scale", ctypes.c_double),
    ]


_Buffers = ctypes.c_void_p * NUM_BUFFERS
_Strides = ctypes.c_int64 * 6

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
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._append = library.innerq_append_kv
        self._append.argtypes = [pointer] * 5 + [integer] * 3
        self._dequantize = library.innerq_dequantize_kv
        self._dequantize.argtypes = [pointer] * 4 + [integer] * 2
        self._attend = library.innerq_decode_attention
        self._attend.argtypes = [pointer] * 3
        self._dequantize.restype = self._attend.restype = None

    def append_kv(self, key: torch.Tensor, value: torch.Tensor, *args: Any) -> None:
        """See :func:`innerq_compile.reference.append_kv`.

        Raises:
            RuntimeError: The cache is full; nothing has been written.
            ValueError: Keys or values do not fit the cache.
        """
        buffers, capacity, spec = args[:NUM_BUFFERS], args[NUM_BUFFERS], args[NUM_BUFFERS + 1]
        geometry = _geometry_of(buffers, spec)
        window = buffers[3]
        if geometry is None or not key.dtype == value.dtype == window.dtype:
            return ops.DEFAULTS["append_kv"](key, value, *args)
        _check_new_tokens(key, value, window)
        key, value = _rows_contiguous(key), _rows_contiguous(value)
        strides = _Strides(*key.stride()[:3], *value.stride()[:3])
        num_new = key.shape[2]
        full = self._append(
            geometry, _pointers(buffers), key.data_ptr(), value.data_ptr(), strides, num_new, capacity,
            torch.get_num_threads(),
        )  # fmt: skip
        if full:
            ops.check_overflow(LayerState(*buffers), num_new, capacity)
        return None

    def dequantize_kv(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See :func:`innerq_compile.reference.dequantize_kv`."""
        buffers, capacity, spec = args[:NUM_BUFFERS], args[NUM_BUFFERS], args[NUM_BUFFERS + 1]
        geometry = _geometry_of(buffers, spec)
        if geometry is None:
            return ops.DEFAULTS["dequantize_kv"](*args)
        window = buffers[3]
        shape = (*window.shape[:2], capacity, window.shape[3])
        keys, values = window.new_empty(shape), window.new_empty(shape)
        self._dequantize(
            geometry, _pointers(buffers), keys.data_ptr(), values.data_ptr(), capacity, torch.get_num_threads()
        )
        return keys, values

    def decode_attention(self, query: torch.Tensor, *args: Any) -> torch.Tensor:
        """See :func:`innerq_compile.reference.decode_attention`.

        Raises:
            ValueError: The query does not fit the cache.
        """
        buffers = args[:NUM_BUFFERS]
        mask, sm_scale, capacity, spec, *rest = args[NUM_BUFFERS:]
        geometry = _geometry_of(buffers, spec)
        window = buffers[3]
        if geometry is None or query.dtype != window.dtype:
            return ops.DEFAULTS["decode_attention"](query, *args)
        _check_query(query, window)
        query = _rows_contiguous(query)
        batch, q_heads, q_len, _ = query.shape
        out = torch.empty(query.shape, dtype=query.dtype)
        kind, mask_pointer, mask_strides = CAUSAL, None, (0, 0, 0, 0)
        if mask is not None:
            kind = BOOLEAN if mask.dtype == torch.bool else ADDITIVE
            mask = mask if kind == BOOLEAN else mask.float()
            mask = mask.expand(batch, q_heads, q_len, capacity)
            mask_pointer, mask_strides = mask.data_ptr(), mask.stride()
        request = _Request(
            query.data_ptr(), out.data_ptr(), mask_pointer, q_heads, q_len, *query.stride()[:3], kind, *mask_strides,
            capacity, bool(rest and rest[0]), torch.get_num_threads(), sm_scale,
        )  # fmt: skip
        self._attend(geometry, _pointers(buffers), ctypes.byref(request))
        return out


def _pointers(buffers: tuple[torch.Tensor, ...]) -> ctypes.Array:
    return _Buffers(*[buffer.data_ptr() for buffer in buffers])


def _geometry_of(buffers: tuple[torch.Tensor, ...], spec: str) -> Any:
    """A pointer to what the C side has to know of a cache, or ``None`` where the reference must serve it."""
    if not all(buffer.is_contiguous() for buffer in buffers):
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


def _check_new_tokens(key: torch.Tensor, value: torch.Tensor, window: torch.Tensor) -> None:
    batch, heads, _, head_dim = window.shape
    if key.shape != value.shape or key.shape[:2] != window.shape[:2] or key.shape[3] != head_dim:
        raise ValueError(
            f"keys and values must both have shape [{batch}, {heads}, tokens, {head_dim}] to fit the cache, "
            f"got {list(key.shape)} and {list(value.shape)}"
        )


def _check_query(query: torch.Tensor, window: torch.Tensor) -> None:
    batch, heads, _, head_dim = window.shape
    if query.dim() != 4 or query.shape[0] != batch or query.shape[3] != head_dim or query.shape[1] % heads:
        raise ValueError(
            f"query must have shape [{batch}, a multiple of {heads}, tokens, {head_dim}] to fit the cache, "
            f"got {list(query.shape)}"
        )
