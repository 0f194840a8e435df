"""The cache a model is given: transformers' ``Cache`` protocol over packed layers."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Self

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from innerq_compile.config import InnerQConfig
from innerq_compile.folded import mark_of
from innerq_compile.layer import MIN_CAPACITY, InnerQLayer
from innerq_compile.layout import unsupported_head_dim
from innerq_compile.padding import ask, leading_pads, watch_masks
from innerq_compile.per_layer import config_of_layer, setting
from innerq_compile.refused import Refused, first_line
from innerq_compile.rope import head_dim_of, rope_pairs_of
from innerq_compile.storage import load_layers, read_header, save_layers


class InnerQCache(Cache):
    """A KV cache of packed codes for ``generate()`` and for direct calls of a model.

    Args:
        config: The model's configuration.
        preset: Name of the settings, see :data:`innerq_compile.config.PRESETS`.
        max_cache_len: Capacity in tokens, allocated at once. ``None`` lets the cache grow by doubling, which costs a
            recompile per doubling and, on an accelerator, reads the length back once per call of the model.
        **overrides: Single settings of :class:`~innerq_compile.config.InnerQConfig` that replace the preset's. A model
            whose key norm was folded into its weights gets ``key_norm="folded"`` unless told otherwise, and
            ``rope_pairs`` follows the model where the preset has it on.

    Attributes:
        unquantized: Layer index -> why that layer keeps transformers' own 16-bit layer (sliding windows, latent
            attention, a head_dim that does not fit the tiles).

    Raises:
        ValueError: Unknown preset or setting, one out of range, or ``key_norm="folded"`` for a model that is not.
        Refused: A model without layers that a cache of fixed length fits. A ``ValueError`` too.
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
        self._model = _facts_of(config)
        self._max_cache_len = max_cache_len
        text_config = config.get_text_config(decoder=True)
        self.config = InnerQConfig.from_preset(preset, **_with_folded_norm(config, overrides))
        if self.config.rope_pairs != "off" and "rope_pairs" not in overrides:
            self.config = dataclasses.replace(self.config, rope_pairs=rope_pairs_of(text_config))
        # transformers knows which layer is of which kind; only its plain full-attention layers are replaced.
        fixed_len = max_cache_len or getattr(text_config, "max_position_embeddings", None) or MIN_CAPACITY
        template = _layers_of_transformers(config, fixed_len)
        self.unquantized: dict[int, str] = {}
        layers: list[CacheLayerMixin] = []
        for index, layer in enumerate(template.layers):
            reason = _why_not_quantized(layer, config_of_layer(text_config, index), self.config)
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

    def to(self, device: torch.device | str) -> Self:
        """Moves every buffer to ``device``. Returns the cache itself, like :meth:`torch.nn.Module.to`."""
        for layer in self.layers:
            if isinstance(layer, InnerQLayer):
                layer.to(device)
            elif getattr(layer, "is_initialized", False):
                for name, value in vars(layer).items():
                    if isinstance(value, torch.Tensor):
                        setattr(layer, name, value.to(device))
                layer.device = layer.keys.device
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a safetensors file; of the packed buffers only what is in use.

        Raises:
            ValueError: A layer of transformers' own that has no fixed buffers.
        """
        header = {"settings": self.config.options, "model": self._model, "max_cache_len": self.max_cache_len}
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
        """Reads what :meth:`save` wrote. Nothing in the file is executed.

        Args:
            config: The model's configuration. The settings of the cache come from the file.
            device: Where the buffers go.
            max_cache_len: Another capacity than that of the saved cache.

        Raises:
            ValueError: The file is none of ours, damaged, of a model of another shape or with another folded key
                norm, or holds more tokens than ``max_cache_len``. That the weights are the same nobody can check.
        """
        header = read_header(path)
        settings, model = header.get("settings"), header.get("model")
        if not isinstance(settings, dict) or not isinstance(model, dict):
            raise ValueError(f"{path} has a damaged header: settings and model must be objects")
        facts = _facts_of(config)
        for name in sorted({*facts, *model}):
            if facts.get(name) != model.get(name):
                raise ValueError(
                    f"{path} was saved for another model: its {name} is {model.get(name)!r}, that of this "
                    f"configuration {facts.get(name)!r}"
                )
        cache = cls(config, max_cache_len=max_cache_len or header.get("max_cache_len"), **settings)
        load_layers(path, header, cache.layers, device)
        return cache

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


def _layers_of_transformers(config: PreTrainedConfig, max_cache_len: int) -> StaticCache:
    """One layer for each of the model's: of the kind that transformers itself would decode from, at a fixed length."""
    if "local" in (getattr(config.get_text_config(decoder=True), "attention_layers", None) or ()):
        # GPT-Neo's code, and the one fact about it that its configuration tells.
        raise Refused(
            config.model_type,
            "its local attention layers count their window from the end of the buffer, wherever the tokens end",
        )
    try:
        return StaticCache(config=config, max_cache_len=max_cache_len)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"transformers has no cache of fixed length for it ({first_line(error)})"
        raise Refused(config.model_type, reason) from error


def _facts_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What two models must have in common to read each other's caches, in JSON types; their weights aside."""
    text_config = config.get_text_config(decoder=True)
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    mark = mark_of(config)
    facts = {name: setting(text_config, name) for name in names}
    return {**facts, "folded key norm": None if mark is None else json.loads(json.dumps(dict(mark)))}


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
    return unsupported_head_dim(config, head_dim_of(text_config))
