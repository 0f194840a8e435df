"""The cache a model is given: transformers' ``Cache`` protocol over packed buffers.

A layer's life: prefill (attends to itself, then is quantized), append, flush, crop, reorder, reset. What is computed is
defined by the ops; this file only decides which op a call needs and keeps the buffers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from innerq_compile import ops, reference
from innerq_compile.config import BLOCK, InnerQConfig
from innerq_compile.folded import mark_of
from innerq_compile.layout import SLOTS, LayerState, allocate_state, state_bytes, unsupported_head_dim

logger = logging.getLogger(__name__)

MIN_CAPACITY = 512
"""Tokens a growing cache starts with, at least: below that the windows outweigh the packed part anyway."""


class InnerQLayer(CacheLayerMixin):
    """Keys and values of one attention layer, quantized behind 16-bit windows.

    Args:
        config: Settings.
        max_cache_len: Capacity in tokens, or ``None`` for a layer that grows.
    """

    is_compileable = True
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

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the buffers for keys and values [B, H, M, D] like these; M may be 0."""
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"InnerQ needs keys and values of one shape, got {tuple(key_states.shape)} and "
                f"{tuple(value_states.shape)}"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads, num_new, self.head_dim = key_states.shape
        if self.max_cache_len is None:
            self.capacity = max(MIN_CAPACITY, _round_up(2 * num_new), self.capacity)
        self.state = self._allocate()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values [B, H, M, D] and returns those to attend to.

        Returns:
            On an empty layer the exact chunk itself, [B, H, M, D]. Otherwise [B, H, capacity, D]: the dequantized
            past and the exact chunk, each in its slot.

        Raises:
            ValueError: Batch, heads, head_dim, dtype or device differ from the first call; nothing was changed.
            RuntimeError: The chunk does not fit the capacity; nothing was changed.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.state is not None
        self._check_input(key_states, value_states)
        num_new = key_states.shape[2]
        if self.is_empty:
            if num_new > self.capacity:
                raise RuntimeError(
                    f"InnerQ cache is too small: a prompt of {num_new} tokens does not fit its capacity of "
                    f"{self.capacity}; build the cache with a larger max_cache_len"
                )
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
        keys, values = keys.index_copy(2, slot, key_states), values.index_copy(2, slot, value_states)
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
        """Empties the layer without reallocating."""
        self.is_empty = True
        if self.state is not None:
            self.state.counts.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last ``-tokens_to_remove`` tokens (transformers hands over a number <= 0).

        Raises:
            ValueError: A positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a number <= 0, got {tokens_to_remove}")
        if self.state is not None and tokens_to_remove:
            reference.crop_kv(self.state, self.config, self.capacity, -int(tokens_to_remove))
            self.is_empty = int(self.state.counts[0, SLOTS]) == 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes the former row ``beam_idx[i]``; the buffers keep their addresses."""
        if self.state is not None:
            index = beam_idx.to(self.device)
            for buffer in self.state:
                if buffer.numel():
                    buffer.copy_(buffer.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, next to each other."""
        self.batch_select_indices(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at ``indices``, in that order; the batch size may change."""
        if self.state is not None:
            index = indices.to(self.device)
            self.state = LayerState(*(b.index_select(0, index) if b.numel() else b for b in self.state))
            self.batch_size = len(index)
            _mark_static(self.state)

    def offload(self) -> None:
        """Moves the buffers to the CPU."""
        if self.state is not None:
            self.state = LayerState(*(buffer.to("cpu", non_blocking=True) for buffer in self.state))

    def prefetch(self) -> None:
        """Brings offloaded buffers back."""
        if self.state is not None and self.state.counts.device != self.device:
            self.state = LayerState(*(buffer.to(self.device, non_blocking=True) for buffer in self.state))

    def ensure_capacity(self, num_tokens: int) -> None:
        """Doubles a growing layer until it holds ``num_tokens``; what is stored stays bit for bit."""
        if self.max_cache_len is not None or num_tokens <= self.capacity:
            return
        self.capacity = max(2 * self.capacity, MIN_CAPACITY, _round_up(num_tokens))
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

    def _check_input(self, key: torch.Tensor, value: torch.Tensor) -> None:
        expected = (self.batch_size, self.num_heads, self.head_dim)
        for name, x in (("keys", key), ("values", value)):
            got = (x.shape[0], x.shape[1], x.shape[3])
            if got != expected:
                raise ValueError(f"InnerQ cache holds (batch, heads, head_dim) = {expected}, got {name} of {got}")
            if x.dtype != self.dtype or x.device != self.device:
                raise ValueError(
                    f"InnerQ cache holds {self.dtype} on {self.device}, got {name} of {x.dtype} on {x.device}"
                )


class InnerQCache(Cache):
    """A KV cache of packed codes for ``generate()`` and for direct calls of a model.

    Args:
        config: The model's configuration.
        preset: Name of the settings, see :data:`innerq_compile.config.PRESETS`.
        max_cache_len: Capacity in tokens, allocated at once. ``None`` lets the cache grow by doubling, which costs a
            recompile per doubling and, on an accelerator, reads the length back once per call of the model.
        **overrides: Single settings of :class:`~innerq_compile.config.InnerQConfig` that replace the preset's. A model
            whose key norm was folded into its weights gets ``key_norm="folded"`` unless told otherwise.

    Attributes:
        unquantized: Layer index -> why that layer keeps transformers' own 16-bit layer (sliding windows, latent
            attention, a head_dim that does not fit the tiles).

    Raises:
        ValueError: Unknown preset or setting, one out of range, or ``key_norm="folded"`` for a model that is not.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        preset: str = "base",
        max_cache_len: int | None = None,
        **overrides: Any,
    ) -> None:
        if max_cache_len is not None and (not isinstance(max_cache_len, int) or max_cache_len < 1):
            raise ValueError(f"max_cache_len must be a positive integer or None, got {max_cache_len!r}")
        self.config = InnerQConfig.from_preset(preset, **_with_folded_norm(config, overrides))
        self._max_cache_len = max_cache_len
        text_config = config.get_text_config(decoder=True)
        # transformers knows which layer is of which kind; only its plain full-attention layers are replaced.
        fixed_len = max_cache_len or getattr(text_config, "max_position_embeddings", None) or MIN_CAPACITY
        template = StaticCache(config=config, max_cache_len=fixed_len)
        self.unquantized: dict[int, str] = {}
        layers: list[CacheLayerMixin] = []
        for index, layer in enumerate(template.layers):
            reason = _why_not_quantized(layer, text_config, self.config)
            if reason:
                self.unquantized[index] = reason
                layers.append(layer)
            else:
                layers.append(InnerQLayer(self.config, max_cache_len))
        super().__init__(layers=layers)

    @property
    def max_cache_len(self) -> int | None:
        """Capacity in tokens; ``None`` for a cache that grows."""
        return self._max_cache_len

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, offset) that the attention mask of layer ``layer_idx`` must have.

        The model asks before it runs its layers, so this is where a growing cache grows.
        """
        if self.max_cache_len is None and not torch.compiler.is_compiling():
            self._grow_for(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def _grow_for(self, num_new: int) -> None:
        quantized = [layer for layer in self.layers if isinstance(layer, InnerQLayer) and layer.state is not None]
        if quantized:
            needed = int(quantized[0].get_seq_length()) + num_new
            for layer in quantized:
                layer.ensure_capacity(needed)

    @property
    def memory_bytes(self) -> int:
        """Bytes that all buffers of the cache occupy, layers that stay in 16 bit included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, InnerQLayer):
                total += layer.memory_bytes
            elif getattr(layer, "keys", None) is not None:
                total += layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        return total


def _with_folded_norm(config: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """The keys of a folded model arrive normalized: its cache must not do it again, nor another cache leave it out."""
    if mark_of(config) is not None:
        return {"key_norm": "folded", **overrides}
    if overrides.get("key_norm") == "folded":
        raise ValueError(
            "key_norm='folded' needs a model whose key norm sits in its weights, but this configuration says nothing: "
            "call innerq_compile.fold_key_norm(model, calibration) first"
        )
    return overrides


def _why_not_quantized(layer: CacheLayerMixin, text_config: PreTrainedConfig, config: InnerQConfig) -> str | None:
    if type(layer) is not StaticLayer:
        return f"{type(layer).__name__} keeps its own 16-bit buffers"
    if getattr(text_config, "kv_lora_rank", None):
        return "latent attention: keys and values differ in shape"
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return unsupported_head_dim(config, head_dim)


def _mark_static(state: LayerState) -> None:
    # A fixed address spares Dynamo a guard and lets CUDA graphs mutate the buffer. Not allowed while tracing.
    if not torch.compiler.is_compiling():
        for buffer in state:
            torch._dynamo.mark_static_address(buffer)


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // (8 * BLOCK)) * 8 * BLOCK


_told: set[str] = set()


def _tell_once_that_decoding_is_uncompiled() -> None:
    if "uncompiled" not in _told:
        _told.add("uncompiled")
        logger.warning(
            "InnerQCache is being decoded without its backend: right, but slow. Call innerq_compile.enable(model) once "
            '(or model.compile(backend="innerq")); torch.compile(model).generate() would compile nothing.'
        )
