"""A cache on disk: one safetensors file of the layers' buffers, and a header that says what they are.

Reading executes nothing and believes nothing: the file's header, every tensor's name, dtype and shape and the counts of
every row are checked before a cache is handed out. Of the packed buffers only the blocks in use are written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from innerq_compile.config import BLOCK, InnerQConfig
from innerq_compile.layer import InnerQLayer
from innerq_compile.layout import PADS, QUANTIZED, SLOTS, LayerState

FORMAT = "innerq_cache"
VERSION = 1

_STATIC_TENSORS = ("keys", "values", "cumulative_length")
_STATIC_NUMBER = "cumulative_length_int"


def save_layers(path: str | os.PathLike[str], header: Mapping[str, Any], layers: Sequence[CacheLayerMixin]) -> None:
    """Writes a file; one that is there is replaced only once the new one is complete.

    Args:
        header: What identifies the cache, in JSON types.

    Raises:
        ValueError: A layer of a kind whose buffers this module does not know.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: list[dict[str, int]] = []
    for index, layer in enumerate(layers):
        found, number = _contents(index, layer)
        tensors.update({f"{index}.{name}": tensor.contiguous().cpu() for name, tensor in found.items()})
        numbers.append(number)
    text = json.dumps({"version": VERSION, "layers": numbers, **header})
    unfinished = Path(f"{os.fspath(path)}.unfinished")
    save_file(tensors, unfinished, metadata={FORMAT: text})
    os.replace(unfinished, path)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a saved cache.

    Raises:
        ValueError: The file is no cache, is damaged, or was written by another version of the format.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
    except SafetensorError as error:
        raise ValueError(f"{path} is no saved InnerQ cache, or is damaged: {error}") from error
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but no saved InnerQ cache")
    try:
        header = json.loads(text)
        version = header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a damaged header: {error}") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version} of the format, this is version {VERSION}")
    return dict(header)


def load_layers(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    layers: Sequence[CacheLayerMixin],
    device: torch.device | str,
) -> None:
    """Fills empty layers from a file.

    Raises:
        ValueError: Tensors that are missing, left over, or of another shape or dtype; counts that no cache can have; a
            capacity that does not hold what was saved. The layers must not be used afterwards.
    """
    numbers = header.get("layers")
    if not isinstance(numbers, list) or len(numbers) != len(layers):
        raise ValueError(f"{path} does not describe {len(layers)} layers")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    try:
        for index, (layer, number) in enumerate(zip(layers, numbers, strict=True)):
            prefix = f"{index}."
            mine = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            if mine:
                _fill(layer, mine, number, device)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} does not fit at layer {index}: {error}") from error
    if tensors:
        raise ValueError(f"{path} holds tensors that belong to no layer: {', '.join(sorted(tensors)[:3])}")


def _contents(index: int, layer: CacheLayerMixin) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    if not layer.is_initialized:
        return {}, {}
    if isinstance(layer, InnerQLayer):
        assert layer.state is not None
        blocks = int(layer.state.counts[:, QUANTIZED].max()) // BLOCK
        return _in_use(layer.state, layer.config, blocks), {}
    if isinstance(layer, StaticLayer) and set(_tensor_names(layer)) == set(_STATIC_TENSORS):
        return {name: getattr(layer, name) for name in _STATIC_TENSORS}, {
            _STATIC_NUMBER: getattr(layer, _STATIC_NUMBER, 0)
        }
    raise ValueError(f"layer {index} is a {type(layer).__name__}, which cannot be saved")


def _tensor_names(layer: CacheLayerMixin) -> list[str]:
    return [name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)]


def _in_use(state: LayerState, config: InnerQConfig, blocks: int) -> dict[str, torch.Tensor]:
    """The buffers by name, those that hold packed blocks cut behind the last of ``blocks`` in use."""
    units = dict.fromkeys(("k_codes", "k_scales", "k_zeros", "v_codes"), blocks)
    units |= dict.fromkeys(("v_scales", "v_zeros"), blocks * BLOCK // config.group_size)
    return {
        name: buffer[:, :, : units[name]] if name in units and buffer.numel() else buffer
        for name, buffer in state._asdict().items()
    }


def _fill(
    layer: CacheLayerMixin, tensors: dict[str, torch.Tensor], number: dict[str, int], device: torch.device | str
) -> None:
    if isinstance(layer, InnerQLayer):
        _fill_quantized(layer, tensors, device)
        return
    if set(tensors) != set(_STATIC_TENSORS) or not isinstance(layer, StaticLayer):
        raise ValueError(f"unexpected tensors {sorted(tensors)} for a {type(layer).__name__}")
    keys, values, length = (tensors[name] for name in _STATIC_TENSORS)
    empty = torch.empty(0, device=device).new_empty
    layer.lazy_initialization(
        empty((*keys.shape[:2], 0, keys.shape[3]), dtype=keys.dtype),
        empty((*values.shape[:2], 0, values.shape[3]), dtype=values.dtype),
    )
    for name, target in zip(_STATIC_TENSORS, (layer.keys, layer.values, layer.cumulative_length), strict=True):
        _check_like(name, tensors[name], target)
    for source, target in ((keys, layer.keys), (values, layer.values), (length, layer.cumulative_length)):
        target.copy_(source)
    if hasattr(layer, _STATIC_NUMBER):
        setattr(layer, _STATIC_NUMBER, int(number[_STATIC_NUMBER]))


def _fill_quantized(layer: InnerQLayer, tensors: dict[str, torch.Tensor], device: torch.device | str) -> None:
    if set(tensors) != set(LayerState._fields):
        raise ValueError(f"expected the tensors {', '.join(LayerState._fields)}, got {', '.join(sorted(tensors))}")
    counts, window = tensors["counts"], tensors["k_window"]
    batch, heads, _, head_dim = window.shape
    _check_counts(counts, layer.config, layer.max_cache_len)
    layer.ensure_capacity(int(counts[0, SLOTS]))
    layer.lazy_initialization(*2 * (torch.empty(batch, heads, 0, head_dim, dtype=window.dtype, device=device),))
    assert layer.state is not None
    blocks = int(counts[:, QUANTIZED].max()) // BLOCK
    for name, target in _in_use(layer.state, layer.config, blocks).items():
        _check_like(name, tensors[name], target)
    for name, target in _in_use(layer.state, layer.config, blocks).items():
        target.copy_(tensors[name])
    layer.is_empty = int(counts[0, SLOTS]) == 0


def _check_like(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(
            f"{name} must be {expected.dtype} {list(expected.shape)}, got {found.dtype} {list(found.shape)}"
        )


def _check_counts(counts: torch.Tensor, config: InnerQConfig, capacity: int | None) -> None:
    """Counts index buffers in native code, so none may point outside of them."""
    if counts.dtype != torch.int64 or counts.dim() != 2 or counts.shape[1] != 3:
        raise ValueError(f"counts must be int64 [B, 3], got {counts.dtype} {list(counts.shape)}")
    slots, quantized, pads = counts[:, SLOTS], counts[:, QUANTIZED], counts[:, PADS]
    if not (slots == slots[0]).all() or slots[0] < 0:
        raise ValueError(f"every row must have the same number of slots, got {slots.tolist()}")
    if capacity is not None and slots[0] > capacity:
        raise ValueError(f"it holds {int(slots[0])} tokens, more than the capacity of {capacity}")
    held = (slots - pads).clamp(min=0)
    in_window = (held - config.sink - quantized).clamp(min=0)
    possible = (pads >= 0) & (quantized >= 0) & (quantized % config.flush_tokens == 0) & (in_window < config.ring)
    possible &= (quantized == 0) | (quantized + config.sink <= held)
    if not possible.all():
        raise ValueError(f"no cache of these settings can have the counts {counts.tolist()}")
