"""The cache a model is given: transformers' ``Cache`` protocol over packed layers."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any, Self, cast

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from innerq_compile.cache import sixteen_bit
from innerq_compile.cache.facts import facts_of
from innerq_compile.cache.held_tensors import leave_inference_mode, may_be_changed_anywhere, replace_tensors
from innerq_compile.cache.layer import NO_OFFLOADING, InnerQLayer, cast_exactly
from innerq_compile.cache.layer_choice import layers_of_transformers, why_not_quantized
from innerq_compile.cache.live_caches import OwnConfig, register, take_back
from innerq_compile.cache.mark import mark_of
from innerq_compile.cache.overflow import check_nothing_lost, check_room
from innerq_compile.cache.padding import ask, leading_pads, watch_masks
from innerq_compile.cache.per_layer import config_of_layer
from innerq_compile.cache.room import MIN_CAPACITY, check_tokens, first_capacity, grown_capacity
from innerq_compile.cache.rope import rope_pairs_of
from innerq_compile.cache.saved import read_cache
from innerq_compile.cache.storage import fill_layers, save_layers
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import LayerState


class InnerQCache(Cache):
    """A KV cache of packed codes for ``generate()`` and for direct calls of a model.

    Args:
        config: The model's configuration.
        preset: Name of the settings, see :data:`innerq_compile.numerics.config.PRESETS`.
        max_cache_len: Capacity in tokens, allocated at once. ``None`` lets the cache grow by doubling, which costs a
            recompile per doubling and, on an accelerator, reads the length back once per call of the model.
        **overrides: Single settings of :class:`~innerq_compile.numerics.config.InnerQConfig` that replace the preset's.
            A model whose key norm was folded into its weights gets ``key_norm="folded"`` unless told otherwise, and
            ``rope_pairs`` follows the model where the preset has it on.

    Attributes:
        grows_per_call: Whether ``generate()`` of an enabled model may :meth:`reserve` room for what it is about to add.
            :func:`~innerq_compile.enable` sets it for caches that it sized itself; it is always so without a
            ``max_cache_len``.
        unquantized: Layer index -> why that layer keeps transformers' own 16-bit layer (sliding windows, latent
            attention, a head_dim that does not fit the tiles).

    Raises:
        ValueError: Unknown preset or setting, one out of range, or ``key_norm="folded"`` for a model that is not.
        Refused: A model without layers that a cache of fixed length fits. A ``ValueError`` too.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Copies, too, are caches that live."""
        cache = super().__new__(cls)
        register(cache)
        return cache

    def __init__(
        self,
        config: PreTrainedConfig,
        preset: str = "base",
        max_cache_len: int | None = None,
        **overrides: Any,
    ) -> None:
        if overrides.get("offloading"):
            raise ValueError(NO_OFFLOADING)
        if max_cache_len is not None:
            check_tokens("max_cache_len", max_cache_len, "a positive integer or None")
        self._model = facts_of(config)
        self._max_cache_len = max_cache_len
        self._capacity = max_cache_len or MIN_CAPACITY
        self.grows_per_call = max_cache_len is None
        text_config = config.get_text_config(decoder=True)
        self.model_config = OwnConfig(config)
        self.set_aside: tuple[int, list[CacheLayerMixin]] | None = None
        self.config = InnerQConfig.from_preset(preset, **_with_folded_norm(config, overrides))
        if self.config.rope_pairs != "off" and "rope_pairs" not in overrides:
            self.config = dataclasses.replace(self.config, rope_pairs=rope_pairs_of(text_config))
        # transformers knows which layer is of which kind; only its plain full-attention layers are replaced.
        with may_be_changed_anywhere():
            template = layers_of_transformers(config, sixteen_bit.UNBOUNDED)
        self.unquantized: dict[int, str] = {}
        self._windows: dict[int, int | None] = {}  # of the 16-bit layers whose capacity follows that of the cache
        layers: list[CacheLayerMixin] = []
        for index, layer in enumerate(template.layers):
            reason = why_not_quantized(layer, config_of_layer(text_config, index), self.config)
            if reason:
                self.unquantized[index] = reason
                layers.append(layer)
            else:
                layers.append(InnerQLayer(self.config, max_cache_len))
            if reason and sixteen_bit.is_resizable(layer):
                self._windows[index] = layer.max_cache_len if layer.is_sliding else None
                sixteen_bit.resize(layer, self._capacity, self._windows[index])
            elif reason and isinstance(layer, StaticLayer):
                longest = max_cache_len or getattr(text_config, "max_position_embeddings", None) or MIN_CAPACITY
                layers[-1] = StaticCache(config=config, max_cache_len=longest).layers[index]
        super().__init__(layers=layers)
        self._first_quantized = next((i for i, layer in enumerate(layers) if isinstance(layer, InnerQLayer)), None)
        self._awaits_first_tokens = True
        watch_masks()

    @property
    def max_cache_len(self) -> int | None:
        """Capacity in tokens; ``None`` for a cache that grows."""
        return self._max_cache_len

    @property
    def is_bounded(self) -> bool:
        """Whether a layer needs room for every token: not all of them are sliding windows that the capacity holds."""
        windows = [self._windows.get(index) for index in range(len(self.layers)) if self._is_sized(index)]
        return any(window is None or window > self._capacity for window in windows)

    def num_tokens(self) -> int:
        """Slots taken, pads included. Reads the device."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, InnerQLayer) and layer.state is not None:
                return int(layer.get_seq_length())
            if index in self._windows and sixteen_bit.is_allocated(layer):
                return sixteen_bit.tokens_held(layer)
        return 0

    def reserve(self, num_tokens: int) -> None:
        """Makes room for ``num_tokens`` tokens in all, pads and tokens held included; what is held stays bit for bit.

        A ``max_cache_len`` becomes this number. Never shrinks. A compiled step compiles once more for the new capacity.

        Raises:
            ValueError: ``num_tokens`` is no positive integer, or a layer of the model has buffers of its own whose size
                this class does not know; nothing was changed.
        """
        check_tokens("num_tokens", num_tokens, "a positive integer")
        self._leave_inference_mode()
        if num_tokens <= self._capacity:
            return
        for layer in self.layers:
            if isinstance(layer, StaticLayer) and not sixteen_bit.is_resizable(layer):
                raise ValueError(
                    f"a {type(layer).__name__} cannot be enlarged: build the cache with max_cache_len={num_tokens}"
                )
        self._resize(num_tokens)
        if self._max_cache_len is not None:
            self._max_cache_len = num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Capacity in tokens, of the cache or of a layer; -1 for one that grows."""
        return -1 if self._max_cache_len is None else super().get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, offset) that the attention mask of layer ``layer_idx`` must have.

        The model asks before it runs its layers, so this is where a growing cache grows.
        """
        if self._max_cache_len is None:
            self._grow_for(query_length)
        else:
            self._check_room(query_length)
        if query_length > 1:
            self._leave_inference_mode()
        if query_length > 1 or self._awaits_first_tokens:
            ask(self, query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values [B, H, M, D] to a layer and returns those to attend to: :meth:`InnerQLayer.update`.

        Raises:
            ValueError, RuntimeError: They do not fit what the layer holds, or its capacity, or tokens did not before;
                nothing was changed.
        """
        layer = self.layers[layer_idx]
        leave_inference_mode(layer)
        if layer_idx == self._first_quantized:
            self._check_room(key_states.shape[2])
        if layer_idx in self._windows:
            num_new, window = key_states.shape[2], self._windows[layer_idx]
            if not sixteen_bit.is_allocated(layer):
                dtype = torch.promote_types(key_states.dtype, value_states.dtype)
                if self._max_cache_len is None:
                    self._grow_for(num_new)
                with may_be_changed_anywhere():
                    layer.lazy_initialization(key_states.to(dtype), value_states.to(dtype))
            sixteen_bit.check_fits(layer, num_new, window, key_states.device)
            key_states, value_states = cast_exactly(key_states, layer.dtype), cast_exactly(value_states, layer.dtype)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def set_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Leaves the padding in front of each row out of the windows, key norms and scales.

        The cache calls this itself when the model, or ``generate()``, builds its mask from a 2-dimensional one. Call it
        before the model only if you hand over a mask of your own making.

        Args:
            attention_mask: [B, columns so far], 0 at pads; ``None`` for a batch without padding. Only the zeros in
                front of a row's first token count, and only for rows that hold no token yet.
        """
        pads = None if attention_mask is None else leading_pads(attention_mask)
        for layer in self.layers:
            if isinstance(layer, InnerQLayer):
                layer.set_pads(pads)
        # A row may still begin in a later chunk, be it of one token. Not worth a graph break where it is compiled.
        compiling = torch.compiler.is_compiling()
        self._awaits_first_tokens = pads is not None and not compiling and bool((attention_mask[:, -1] == 0).any())  # type: ignore[index]

    def reset(self) -> None:
        """Empties every layer without reallocating."""
        if self.set_aside is not None:
            take_back(self)
        self._leave_inference_mode()
        super().reset()
        self._awaits_first_tokens = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last ``-tokens_to_remove`` tokens of every layer.

        Raises:
            ValueError: A positive number.
            NotImplementedError: A layer that stays in 16 bit cannot drop tokens; nothing was changed.
            RuntimeError: Tokens were lost because they did not fit; nothing was changed.
        """
        fixed = [layer for layer in self.layers if not hasattr(layer, "crop")]
        if fixed:
            raise NotImplementedError(f"a {type(fixed[0]).__name__} of transformers cannot drop tokens")
        self._check_nothing_lost()
        self._leave_inference_mode()
        super().crop(tokens_to_remove)
        self._awaits_first_tokens |= any(getattr(layer, "is_empty", False) for layer in self.layers)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i of every layer becomes the former row ``beam_idx[i]``."""
        self._leave_inference_mode()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, next to each other. Raises what :meth:`batch_select_indices` raises."""
        self._leave_inference_mode()
        for index, layer in sixteen_bit.layers_with_rows(self.layers):
            if index not in self._windows:
                layer.batch_repeat_interleave(repeats)
            elif sixteen_bit.is_allocated(layer):
                sixteen_bit.select_rows(layer, torch.arange(layer.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at ``indices``, in that order.

        Raises:
            NotImplementedError: A layer of transformers that holds something cannot do this; nothing was changed.
        """
        self._leave_inference_mode()
        for index, layer in sixteen_bit.layers_with_rows(self.layers):
            if index in self._windows:
                sixteen_bit.select_rows(layer, indices)
            else:
                layer.batch_select_indices(indices)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Refused, see :meth:`InnerQLayer.offload`.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(NO_OFFLOADING)

    prefetch = offload

    def to(self, device: torch.device | str) -> Self:
        """Moves every buffer to ``device``. Returns the cache itself, like :meth:`torch.nn.Module.to`."""
        for layer in self.layers:
            if isinstance(layer, InnerQLayer):
                layer.to(device)
            elif getattr(layer, "is_initialized", False):
                replace_tensors(layer, lambda tensor: tensor.to(device))
                if getattr(layer, "keys", None) is not None:
                    layer.device = layer.keys.device
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a safetensors file; of the packed buffers only what is in use.

        Raises:
            RuntimeError: Tokens were lost because they did not fit the capacity.
            ValueError: A layer of transformers' own that has no fixed buffers.
        """
        self._check_nothing_lost()
        header = {
            "settings": self.config.options,
            "model": self._model,
            "max_cache_len": self.max_cache_len,
            "grows_per_call": self.grows_per_call,
        }
        save_layers(path, header, self.layers)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig,
        *,
        device: torch.device | str = "cpu",
        max_cache_len: int | None = None,
    ) -> Self:
        """Reads what :meth:`save` wrote. Nothing in the file is executed, and nothing allocated before it was checked.

        Args:
            config: The model's configuration. The settings of the cache come from the file.
            device: Where the buffers go.
            max_cache_len: Another capacity than that of the saved cache.

        Raises:
            ValueError: The file is none of ours, damaged, of a model of another shape or with another folded key
                norm, or holds more tokens than ``max_cache_len``. That the weights are the same nobody can check.
            OSError: It cannot be read.
        """
        cache, saved = read_cache(functools.partial(cls, config), path, config, max_cache_len)
        if saved.tokens and cache.max_cache_len is None:
            cache._resize(max(cache._capacity, grown_capacity(0, saved.capacity)))
        fill_layers(saved, cache.layers, device)
        cache._awaits_first_tokens = not saved.tokens
        return cast(Self, cache)

    def _grow_for(self, num_new: int) -> None:
        """Makes room in a growing cache, or only chooses the size of one that has no buffers yet."""
        if not any(self._is_allocated(index) for index in range(len(self.layers))):
            self._resize(max(self._capacity, first_capacity(num_new)))
        elif not torch.compiler.is_compiling():
            needed = (self._check_nothing_lost() or self.num_tokens()) + num_new
            if needed > self._capacity:
                self._resize(grown_capacity(self._capacity, needed))

    def _resize(self, capacity: int) -> None:
        self._capacity = capacity
        for index, layer in enumerate(self.layers):
            if isinstance(layer, InnerQLayer):
                layer.resize(capacity)
            elif index in self._windows:
                sixteen_bit.resize(layer, capacity, self._windows[index])

    def _is_sized(self, index: int) -> bool:
        return index in self._windows or isinstance(self.layers[index], InnerQLayer)

    def _is_allocated(self, index: int) -> bool:
        layer = self.layers[index]
        return layer.state is not None if isinstance(layer, InnerQLayer) else getattr(layer, "keys", None) is not None

    def _leave_inference_mode(self) -> None:
        for layer in self.layers:
            leave_inference_mode(layer)

    def _check_room(self, num_new: int) -> None:
        """Of the first quantized layer: all others are given the same tokens."""
        if torch.compiler.is_compiling():
            return
        state, capacity, name = self._first_state()
        if state is not None:
            check_room(state.counts, num_new, capacity, name)

    def _check_nothing_lost(self) -> int:
        """Slots taken in the first quantized layer, 0 where there is none. Waits for the device."""
        state, capacity, name = self._first_state()
        return 0 if state is None else check_nothing_lost(state.counts, capacity, name)

    def _first_state(self) -> tuple[LayerState | None, int, str]:
        """Buffers, capacity and name of the first quantized layer."""
        index = self._first_quantized
        layer = None if index is None else self.layers[index]
        if not isinstance(layer, InnerQLayer):
            return None, 0, ""
        return layer.state, layer.capacity, f"layer {index}"

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
