"""One layer of the cache: its packed buffers and their life.

Prefill (attends to itself, then is quantized), append, flush, crop, reorder, reset. What is computed is defined by the
ops; this file only decides which op a call needs and keeps the buffers.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from innerq_compile import ops
from innerq_compile.cache.held_tensors import may_be_changed_anywhere
from innerq_compile.cache.room import first_capacity
from innerq_compile.compat import pytorch
from innerq_compile.numerics import reference
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import PADS, SLOTS, LayerState, allocate_state, state_bytes

logger = logging.getLogger(__name__)

NO_OFFLOADING = (
    "an InnerQ cache is not offloaded layer by layer: its packed buffers keep their addresses for compiled graphs. "
    'Between calls cache.to("cpu") and cache.to(device) move all of it; '
    'generate(cache_implementation="offloaded") uses transformers\' own 16-bit cache'
)


class InnerQLayer(CacheLayerMixin):
    """Keys and values of one attention layer, quantized behind 16-bit windows.

    Args:
        config: Settings.
        max_cache_len: Capacity in tokens, or ``None`` for a layer that grows.
    """

    is_compileable = True
    is_packed = True
    is_sliding = False
    is_croppable = True

    def __init__(self, config: InnerQConfig, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.spec = config.spec
        self.max_cache_len = max_cache_len
        self.capacity = max_cache_len or 0
        self.is_empty = True
        self.state: LayerState | None = None
        self.padding_is_known = False
        self._first_pads: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the buffers for keys and values [B, H, M, D] like these; M may be 0."""
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"InnerQ needs keys and values of one shape, got {tuple(key_states.shape)} and "
                f"{tuple(value_states.shape)}"
            )
        self.dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        self.device = key_states.device
        self.batch_size, self.num_heads, num_new, self.head_dim = key_states.shape
        if self.max_cache_len is None:
            self.capacity = max(first_capacity(num_new), self.capacity)
        self.state = self._allocate()
        self.is_initialized = True

    def set_pads(self, pads: torch.Tensor | None) -> None:
        """Says how many columns of each row hold no token, counted from the first column of the cache.

        Rows that hold a token already keep what they have: a pad can only stand in front of the first token.

        Args:
            pads: int64 [B]; ``None`` for no padding.
        """
        self.padding_is_known = True
        if self.is_empty:
            self._first_pads = pads
        elif pads is not None:
            assert self.state is not None
            slots, known = self.state.counts[:, SLOTS], self.state.counts[:, PADS]
            self.state.counts[:, PADS] = torch.where(slots <= known, pads.to(known.device), known)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values [B, H, M, D] and returns those to attend to.

        The layer takes its dtype from the first keys and values: the one that holds both exactly, which under
        ``torch.autocast`` differ. What comes later in a dtype that this one holds exactly is cast to it.

        Returns:
            On an empty layer the exact chunk itself, [B, H, M, D]. Otherwise [B, H, capacity, D]: the dequantized
            past and the exact chunk, each in its slot. In the layer's dtype.

        Raises:
            ValueError: Batch, heads, head_dim or device differ from what the layer holds, or it would round the dtype;
                nothing was changed. An empty layer holds nothing: it is allocated anew.
            RuntimeError: The chunk does not fit the capacity; nothing was changed.
        """
        if not self.is_initialized or (self.is_empty and not self._fits(key_states, value_states)):
            self.lazy_initialization(key_states, value_states)
        assert self.state is not None
        self._check_input(key_states, value_states)
        key_states, value_states = cast_exactly(key_states, self.dtype), cast_exactly(value_states, self.dtype)
        num_new = key_states.shape[2]
        if self.is_empty:
            if num_new > self.capacity:
                raise ops.overflow_error(0, num_new, self.capacity)
            if self.batch_size > 1 and not self.padding_is_known:
                _tell_once_that_padding_is_unknown()
            if self._first_pads is not None:
                self.state.counts[:, PADS] = self._first_pads.to(self.device)
                self._first_pads = None
            self._append(key_states, value_states)
            self.is_empty = False
            return key_states, value_states
        if num_new == 1 and not torch.compiler.is_compiling():
            _tell_once_that_decoding_is_uncompiled()
        if num_new <= self.config.max_fused_q_len:
            self._append(key_states, value_states)
            return self._dequantize()
        # Some of a long chunk's own tokens may be quantized by its append, so the chunk is laid over the past first.
        keys, values = self._dequantize()
        slot = torch.arange(num_new, device=self.device) + self.state.counts[0, SLOTS]
        # Of a chunk that does not fit, not one token may be looked at without the others: all are NaN.
        shown, slot = key_states.masked_fill(slot[-1] >= self.capacity, math.nan), slot.clamp(max=self.capacity - 1)
        keys, values = keys.index_copy(2, slot, shown), values.index_copy(2, slot, value_states)
        self._append(key_states, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length of the keys that :meth:`update` will return, offset of the first)."""
        return (query_length if self.is_empty else self.capacity), 0

    def get_seq_length(self) -> int | torch.Tensor:
        """Slots taken, as a 0-dim int64 tensor on the device (0 before the first call)."""
        return 0 if self.state is None else self.state.counts[0, SLOTS].clone()

    def get_max_length(self) -> int:
        """Capacity in tokens; -1 for a layer that grows."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_max_cache_shape(self) -> int:
        """Name of :meth:`get_max_length` up to transformers 5.17."""
        return self.get_max_length()

    def reset(self) -> None:
        """Empties the layer without reallocating: it is as good as new, bit for bit."""
        self.is_empty = True
        self.padding_is_known, self._first_pads = False, None
        if self.state is not None:
            for buffer in self.state:
                buffer.zero_()
            self.state.key_norm.fill_(1)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last ``-tokens_to_remove`` tokens (transformers hands over a number <= 0).

        A layer that is left without any is as good as new.

        Raises:
            ValueError: A positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a number <= 0, got {tokens_to_remove}")
        if self.state is not None and tokens_to_remove and not self.is_empty:
            reference.crop_kv(self.state, self.config, self.capacity, -int(tokens_to_remove))
            if int(self.state.counts[0, SLOTS]) == 0:
                self.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes the former row ``beam_idx[i]``; the buffers keep their addresses."""
        if self._first_pads is not None:
            self._first_pads = self._first_pads[beam_idx.to(self._first_pads.device)]
        if self.state is not None:
            index = beam_idx.to(self.device)
            for buffer in self.state:
                if buffer.numel():
                    buffer.copy_(buffer.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, next to each other."""
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at ``indices`` (numbers, or a boolean per row), in that order; the batch size may change."""
        self._change_rows(lambda rows: rows[indices.to(rows.device)])

    def to(self, device: torch.device | str) -> None:
        """Moves the buffers; what is appended next must come from there."""
        if self.state is not None:
            with may_be_changed_anywhere():
                self.state = LayerState(*(buffer.to(device) for buffer in self.state))
            self.device = self.state.counts.device
            _mark_static(self.state)

    def offload(self) -> None:
        """Refused: between calls :meth:`to` moves a cache, within a call compiled graphs rely on its addresses.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(NO_OFFLOADING)

    prefetch = offload

    def resize(self, capacity: int) -> None:
        """Makes room for ``capacity`` tokens, whatever the layer was made for; what is stored stays bit for bit.

        Never shrinks.
        """
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        if self.max_cache_len is not None:
            self.max_cache_len = capacity
        if self.state is not None:
            old, self.state = self.state, None
            self.state = self._allocate()
            for before, after in zip(old, self.state, strict=True):
                after[tuple(slice(0, n) for n in before.shape)] = before

    @property
    def memory_bytes(self) -> int:
        """Bytes that the buffers occupy."""
        return 0 if self.state is None else state_bytes(self.state)

    def _allocate(self) -> LayerState:
        with may_be_changed_anywhere():
            state = allocate_state(
                self.config,
                batch_size=self.batch_size,
                num_kv_heads=self.num_heads,
                head_dim=self.head_dim,
                capacity=self.capacity,
                dtype=self.dtype,
                device=self.device,
            )
        _mark_static(state)
        return state

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        assert self.state is not None
        ops.append_kv(key, value, *self.state, self.capacity, self.spec)

    def _dequantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.state is not None
        return ops.dequantize_kv(*self.state, self.capacity, self.spec)

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._first_pads is not None:
            self._first_pads = change(self._first_pads)
        if self.state is not None:
            with may_be_changed_anywhere():
                self.state = LayerState(*(change(buffer) if buffer.numel() else buffer for buffer in self.state))
            self.batch_size = self.state.counts.shape[0]
            _mark_static(self.state)

    def _fits(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether the buffers were allocated for keys and values like these."""
        same_shape = (key.shape[0], key.shape[1], key.shape[3]) == (self.batch_size, self.num_heads, self.head_dim)
        return same_shape and key.device == self.device and all(holds(self.dtype, x.dtype) for x in (key, value))

    def _check_input(self, key: torch.Tensor, value: torch.Tensor) -> None:
        expected = (self.batch_size, self.num_heads, self.head_dim)
        for name, x in (("keys", key), ("values", value)):
            got = (x.shape[0], x.shape[1], x.shape[3])
            if got != expected:
                raise ValueError(f"InnerQ cache holds (batch, heads, head_dim) = {expected}, got {name} of {got}")
            if x.device != self.device or not holds(self.dtype, x.dtype):
                raise ValueError(
                    f"InnerQ cache holds {self.dtype} on {self.device}, got {name} of {x.dtype} on {x.device}; dtype "
                    "and device are those of the first call (run prompt and decoding alike, inside torch.autocast or "
                    "outside of it)"
                )


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of dtype ``other`` is one of ``dtype``."""
    return torch.promote_types(dtype, other) == dtype


def cast_exactly(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``. A graph gets a node for it only where something is to be done."""
    return x if x.dtype == dtype else x.to(dtype)


def _mark_static(state: LayerState) -> None:
    # A fixed address spares Dynamo a guard and lets CUDA graphs mutate the buffer. Not allowed while tracing.
    if not torch.compiler.is_compiling():
        for buffer in state:
            pytorch.mark_static_address(buffer)


_told: set[str] = set()


@contextlib.contextmanager
def told_nothing() -> Iterator[None]:
    """Keeps the hints below to itself, for a decode that no user asked for; a later one is still told."""
    before = set(_told)
    _told.update(("uncompiled", "padding"))
    try:
        yield
    finally:
        _told.intersection_update(before)


def _tell_once_that_decoding_is_uncompiled() -> None:
    if "uncompiled" not in _told:
        _told.add("uncompiled")
        logger.warning(
            "InnerQCache is being decoded without its backend: right, but slow. Call innerq_compile.enable(model) once "
            '(or model.compile(backend="innerq")); torch.compile(model).generate() would compile nothing.'
        )


@torch.compiler.assume_constant_result  # so that it speaks while a prefill is being compiled, too
def _tell_once_that_padding_is_unknown() -> None:
    if "padding" not in _told:
        _told.add("padding")
        logger.warning(
            "InnerQCache was not shown the 2-dimensional attention_mask of this batch. If its rows are padded, the "
            "pads are not attended to, but they take part in quantization as if they were tokens. Call "
            "cache.set_padding(attention_mask) before the model to leave them out."
        )
