"""A cache on disk: one safetensors file of the layers' buffers, and a header that says what they are.

Reading executes nothing and believes nothing: the header, the names, dtypes and shapes of all tensors, the counts of
every row and a checksum over all of it are checked before a buffer is allocated. Only what is in use is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

from innerq_compile.cache.layer import InnerQLayer
from innerq_compile.cache.sixteen_bit import is_all_keys_and_values
from innerq_compile.numerics.config import BLOCK, InnerQConfig
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS, LayerState, allocate_state

FORMAT = "innerq_cache"
VERSION = 2

_STATIC_TENSORS = ("keys", "values")

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {torch.int64: "I64", torch.uint8: "U8", **{dtype: name for name, dtype in _FLOATS.items()}}
"""torch's dtypes and what safetensors calls them."""


def save_layers(path: str | os.PathLike[str], header: Mapping[str, Any], layers: Sequence[CacheLayerMixin]) -> None:
    """Writes a file; one that is there is replaced only once the new one is complete, and one that fails leaves none.

    Args:
        header: What identifies the cache, in JSON types.

    Raises:
        ValueError: A layer of a kind whose buffers this module does not know, or layers that hold different tokens.
    """
    tensors: dict[str, torch.Tensor] = {}
    lengths: list[int | None] = []
    for index, layer in enumerate(layers):
        found, length = _contents(index, layer)
        tensors.update({f"{index}.{name}": tensor.contiguous().cpu() for name, tensor in found.items()})
        lengths.append(length)
    if len({length for length in lengths if length is not None}) > 1:
        raise ValueError(f"the layers hold different numbers of tokens and cannot be saved: {lengths}")
    described = {"version": VERSION, "layers": lengths, **header}
    text = json.dumps({**described, "checksum": _checksum(described, tensors)})
    # Two processes may save to one path. The name does the work of tempfile, the mode stays that of a file like any.
    unfinished = Path(f"{os.fspath(path)}.{os.getpid()}-{secrets.token_hex(4)}.unfinished")
    try:
        save_file(tensors, unfinished, metadata={FORMAT: text})
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a saved cache.

    Raises:
        ValueError: The file is no cache, is damaged, or was written by another version of the format.
    """
    with _opened(path) as file:
        text = (file.metadata() or {}).get(FORMAT)
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but no saved InnerQ cache")
    try:
        header = json.loads(text)
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header: {error}") from error
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path} has version {version} of the format, this is version {VERSION}")
    return dict(header)


@dataclasses.dataclass(frozen=True)
class SavedLayers:
    """The layers of a file, found right.

    Attributes:
        tensors: Of each layer, by name; nothing for an empty layer.
        tokens: Slots that each layer takes, pads included. 0 for an empty cache.
        capacity: Least capacity in tokens that holds them.
    """

    tensors: tuple[dict[str, torch.Tensor], ...]
    tokens: int
    capacity: int


def read_layers(
    path: str | os.PathLike[str], header: Mapping[str, Any], layers: Sequence[CacheLayerMixin]
) -> SavedLayers:
    """Reads what a file says about empty layers, which it leaves as they are.

    Names, dtypes and shapes of all tensors are compared with those of the layers before one of them is read.

    Raises:
        ValueError: The file's tensors do not fit these layers, one another, the header or its checksum.
    """
    lengths = header.get("layers")
    if not isinstance(lengths, list) or len(lengths) != len(layers):
        raise ValueError(f"{path} does not describe {len(layers)} layers")
    with _opened(path) as file:
        names = set(file.keys())
        owned: list[dict[str, str]] = []
        sizes: set[tuple[int, int]] = set()
        capacity = 0
        for index, (layer, length) in enumerate(zip(layers, lengths, strict=True)):
            prefix = f"{index}."
            mine = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            try:
                if _holds_tokens(layer):
                    rows, needed = _check_layer({name: file.get_slice(prefix + name) for name in mine}, layer, length)
                    sizes.add((rows, length))
                    capacity = max(capacity, needed)
                elif mine or length is not None:
                    raise ValueError(f"a {type(layer).__name__} holds no tokens")
            except (TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
                raise ValueError(f"{path} does not fit at layer {index}: {error}") from error
            owned.append({name: prefix + name for name in mine})
        extra = names - {name for mine in owned for name in mine.values()}
        if extra:
            raise ValueError(f"{path} holds tensors that belong to no layer: {', '.join(sorted(extra)[:3])}")
        if len(sizes) > 1:
            raise ValueError(f"{path} is damaged: the (rows, tokens) of its layers differ: {sorted(sizes)}")
        tensors = {name: file.get_tensor(name) for name in sorted(names)}
    if header.get("checksum") != _checksum({k: v for k, v in header.items() if k != "checksum"}, tensors):
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    by_layer = tuple({name: tensors[full] for name, full in mine.items()} for mine in owned)
    return SavedLayers(by_layer, max((tokens for _, tokens in sizes), default=0), capacity)


def fill_layers(saved: SavedLayers, layers: Sequence[CacheLayerMixin], device: torch.device | str) -> None:
    """Puts what :func:`read_layers` read into layers whose capacity holds it."""
    for layer, tensors in zip(layers, saved.tensors, strict=True):
        if tensors and isinstance(layer, InnerQLayer):
            _fill_quantized(layer, tensors, device)
        elif tensors and isinstance(layer, StaticLayer):
            _fill_static(layer, tensors, saved.tokens, device)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no saved InnerQ cache, or is damaged: {error}") from error


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> int:
    """Against damage, not against malice: whoever can write the file can write this number too."""
    checksum = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _holds_tokens(layer: CacheLayerMixin) -> bool:
    return isinstance(layer, InnerQLayer | StaticLayer)


def _contents(index: int, layer: CacheLayerMixin) -> tuple[dict[str, torch.Tensor], int | None]:
    """The tensors of a layer that are in use, and the slots it takes; ``None`` for a layer that never holds a token."""
    if isinstance(layer, InnerQLayer):
        if layer.state is None or layer.is_empty:
            return {}, 0
        blocks = int(layer.state.counts[:, QUANTIZED].max()) // BLOCK
        return _in_use(layer.state, layer.config, blocks), int(layer.state.counts[0, SLOTS])
    if is_all_keys_and_values(layer):
        assert isinstance(layer, StaticLayer)
        length = int(getattr(layer, "cumulative_length_int", layer.cumulative_length))
        if layer.keys is None or not length:
            return {}, 0
        used = min(length, layer.max_cache_len)
        return {name: getattr(layer, name)[:, :, :used] for name in _STATIC_TENSORS}, length
    if type(layer).__name__ == "DummyLayer":
        return {}, None
    raise ValueError(f"layer {index} is a {type(layer).__name__}, which cannot be saved")


def _in_use(state: LayerState, config: InnerQConfig, blocks: int) -> dict[str, torch.Tensor]:
    """The buffers by name, those that hold packed blocks cut behind the last of ``blocks`` in use."""
    units = dict.fromkeys(("k_codes", "k_scales", "k_zeros", "v_codes"), blocks)
    units |= dict.fromkeys(("v_scales", "v_zeros"), blocks * BLOCK // config.group_size)
    return {
        name: buffer[:, :, : units[name]] if name in units and buffer.numel() else buffer
        for name, buffer in state._asdict().items()
    }


def _check_layer(found: Mapping[str, Any], layer: CacheLayerMixin, length: Any) -> tuple[int, int]:
    """Checks one layer of a file, given as slices that are not read yet. Of them only the counts are.

    Returns:
        Its rows and the least capacity in tokens that holds it; (0, 0) for an empty layer.
    """
    if type(length) is not int or length < 0:
        raise ValueError(f"its number of tokens must be an integer >= 0, got {length!r}")
    is_quantized = isinstance(layer, InnerQLayer)
    expected = () if not length else LayerState._fields if is_quantized else _STATIC_TENSORS
    if set(found) != set(expected):
        raise ValueError(
            f"expected the tensors {', '.join(expected) or 'of an empty layer: none'}, got "
            f"{', '.join(sorted(found)) or 'none'}"
        )
    if not length:
        return 0, 0
    lead = found["k_window" if is_quantized else "keys"]
    shape, dtype = lead.get_shape(), _FLOATS.get(lead.get_dtype())
    if len(shape) != 4 or min(shape) < 1 or dtype is None:
        raise ValueError(f"keys must be floats [B, H, T, D], none of them 0, got {lead.get_dtype()} {shape}")
    if isinstance(layer, InnerQLayer):
        return shape[0], _check_quantized(found, layer.config, shape, dtype, length)
    assert isinstance(layer, StaticLayer)
    used = min(length, layer.max_cache_len) if layer.is_sliding else length
    _check_like("keys", found["keys"], (*shape[:2], used, shape[3]), lead.get_dtype())
    _check_like("values", found["values"], (*shape[:2], used, *found["values"].get_shape()[3:]), lead.get_dtype())
    return shape[0], used


def _check_quantized(
    found: Mapping[str, Any], config: InnerQConfig, window: list[int], dtype: torch.dtype, length: int
) -> int:
    batch, heads, _, head_dim = window
    _check_like("counts", found["counts"], (batch, 3), "I64")
    counts = found["counts"][:]
    _check_counts(counts, config)
    if int(counts[0, SLOTS]) != length:
        raise ValueError(f"it holds {int(counts[0, SLOTS])} tokens, its header says {length}")
    quantized = int(counts[:, QUANTIZED].max())
    capacity = max(length, quantized + config.sink + config.recent)  # a crop leaves windows that are not full
    state = allocate_state(
        config, batch_size=batch, num_kv_heads=heads, head_dim=head_dim, capacity=capacity, dtype=dtype, device="meta"
    )
    for name, buffer in _in_use(state, config, quantized // BLOCK).items():
        _check_like(name, found[name], tuple(buffer.shape), _NAMES[buffer.dtype])
    return capacity


def _fill_static(layer: StaticLayer, tensors: dict[str, torch.Tensor], length: int, device: torch.device | str) -> None:
    keys, values = (tensors[name].to(device) for name in _STATIC_TENSORS)
    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    for source, target in ((keys, layer.keys), (values, layer.values)):
        target[:, :, : source.shape[2]] = source
    layer.cumulative_length.fill_(keys.shape[2])
    if isinstance(layer, StaticSlidingWindowLayer):
        layer.cumulative_length_int = length


def _fill_quantized(layer: InnerQLayer, tensors: dict[str, torch.Tensor], device: torch.device | str) -> None:
    empty = tensors["k_window"][:, :, :0].to(device)
    layer.lazy_initialization(empty, empty)
    assert layer.state is not None
    blocks = int(tensors["counts"][:, QUANTIZED].max()) // BLOCK
    for name, target in _in_use(layer.state, layer.config, blocks).items():
        target.copy_(tensors[name])
    layer.is_empty = False


def _check_like(name: str, found: Any, shape: tuple[int, ...], dtype: str) -> None:
    """Compares a slice of a file, which need not be read for it."""
    if tuple(found.get_shape()) != shape or found.get_dtype() != dtype:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {found.get_dtype()} {found.get_shape()}")


def _check_counts(counts: torch.Tensor, config: InnerQConfig) -> None:
    """Counts index buffers in native code, so none may point outside of them."""
    slots, quantized, pads = counts[:, SLOTS], counts[:, QUANTIZED], counts[:, PADS]
    if not (slots == slots[0]).all() or slots[0] < 0:
        raise ValueError(f"every row must have the same number of slots, got {slots.tolist()}")
    held = (slots - pads).clamp(min=0)
    in_window = (held - config.sink - quantized).clamp(min=0)
    possible = (pads >= 0) & (quantized >= 0) & (quantized % config.flush_tokens == 0) & (in_window < config.ring)
    possible &= (quantized == 0) | (quantized + config.sink <= held)
    if not possible.all():
        raise ValueError(f"no cache of these settings can have the counts {counts.tolist()}")
