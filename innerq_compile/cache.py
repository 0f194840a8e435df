"""The cache a model is given: transformers' ``Cache`` protocol over packed layers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from innerq_compile.config import InnerQConfig
from innerq_compile.folded import mark_of
from innerq_compile.layer import MIN_CAPACITY, InnerQLayer
from innerq_compile.layout import unsupported_head_dim
from innerq_compile.padding import ask, leading_pads, watch_masks


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
        self._awaits_first_tokens = True
        watch_masks()

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
        if query_length > 1 or self._awaits_first_tokens:
            ask(self, query_length)
        return super().get_mask_sizes(query_length, layer_idx)

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
        super().reset()
        self._awaits_first_tokens = True

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
