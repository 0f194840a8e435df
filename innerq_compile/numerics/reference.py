"""The oracle of every op in plain torch: slow, readable, and the definition of every number.

All functions work on any device without reading a value back to the host, so they are also the fallback
implementation of the ops. Axis letters and buffers: see ``layout``.

Numbers that are not finite behave as in ``scaled_dot_product_attention``, with one rule on top: what a row may not
attend to cannot spoil it (there, a weight of 0 times NaN is NaN).

- A query with NaN or infinity gives NaN in its own row; 0 if the row may attend to nothing.
- In the windows a key's or value's NaN and infinity stay what they are. A NaN key makes NaN of every row that attends
  to it, a value makes NaN or infinity of its channel in such a row.
- A *packed* group with such a number is NaN as a whole: a key for the token that it belongs to, a value for its
  channel in the 32 (``group_size``) tokens of the group. Other groups, channels, tokens, heads and rows keep their
  exact codes. The key center and key norm of a row are made from its finite numbers.
"""

from __future__ import annotations

import math

import torch

from innerq_compile.numerics.config import BLOCK, InnerQConfig, TensorQuantSpec
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS, LayerState
from innerq_compile.numerics.quant import (
    dequantize_groups,
    key_center_and_norm,
    pack_tiles,
    quantize_groups,
    unpack_tiles,
)


def append_kv(
    key: torch.Tensor, value: torch.Tensor, state: LayerState, config: InnerQConfig, capacity: int | None = None
) -> None:
    """Appends M tokens to every row, then quantizes the blocks that leave the recent window.

    Args:
        key, value: [B, H, M, D], any float dtype. Of a left-padded row the first columns are pads and are dropped.
        state: Changed in place.
        capacity: Slots of a row. ``None``: the caller knows that the new tokens fit.

    A block of ``flush`` tokens leaves as soon as the window holds ``recent + flush``; when the first block of
    a row leaves, all its tokens but the sink fix the row's key center and key norm.

    Of tokens that do not fit, a row stores none, but it counts them: ``SLOTS > capacity`` says from then on, whatever
    else is appended or cropped, that tokens were lost, and every read of the row gives NaN (:func:`has_lost_tokens`).
    """
    num_new, flush = key.shape[2], config.flush_tokens
    if num_new == 0:
        return
    slots, quantized, pads = state.counts.unbind(1)
    fits = torch.ones_like(slots, dtype=torch.bool) if capacity is None else slots + num_new <= capacity
    held_before = (slots - pads).clamp(min=0)
    held = torch.where(fits, (slots + num_new - pads).clamp(min=0), held_before)
    num_flushes = ((held - config.sink - quantized - config.recent) // flush).clamp(min=0) * fits

    # The window holds less than recent + flush tokens before the append: that bounds the blocks that can leave.
    max_flushes = (num_new + flush - 1) // flush
    max_leaving = max_flushes * flush
    not_packed = torch.arange(num_new + config.recent + flush, device=key.device)
    valid = not_packed[:max_leaving] < (num_flushes * flush)[:, None]
    token = config.sink + quantized[:, None] + not_packed

    def tokens_behind_the_packed(count: int, new: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        wanted = token[:, :count]
        stored = _take_tokens(window, window_slot(wanted, config)).to(new.dtype)
        is_new = wanted >= held_before[:, None]
        return torch.where(_over_tokens(is_new), _take_tokens(new, wanted + (pads - slots)[:, None]), stored).float()

    leaving_keys = tokens_behind_the_packed(max_leaving, key, state.k_window)
    leaving_values = tokens_behind_the_packed(max_leaving, value, state.v_window)
    if config.key_norm == "runtime" or config.key_center == "runtime":
        first = ((quantized == 0) & (num_flushes > 0))[:, None, None]
        seen = tokens_behind_the_packed(len(not_packed), key, state.k_window)
        center, norm = key_center_and_norm(seen, token < held[:, None], config)
        state.key_center.copy_(torch.where(first, center, state.key_center))
        state.key_norm.copy_(torch.where(first, norm, state.key_norm))
        leaving_keys = (leaving_keys - state.key_center.unsqueeze(2)) / state.key_norm.unsqueeze(2)
    _store_blocks(_quantize_keys(leaving_keys, config.key_spec), state[:3], quantized, valid, BLOCK)
    _store_blocks(_quantize_values(leaving_values, config.value_spec), state[4:7], quantized, valid, config.group_size)

    # Every window slot picks the newest token that belongs to it, so nothing is written twice.
    newest = newest_token_of_slots(held, config, key.device)
    is_written = newest >= held_before[:, None]
    for new, window in ((key, state.k_window), (value, state.v_window)):
        taken = _take_tokens(new, newest + (pads - slots)[:, None])
        window.copy_(torch.where(_over_tokens(is_written), taken.to(window.dtype), window))

    state.counts[:, SLOTS] += num_new
    state.counts[:, QUANTIZED] += num_flushes * flush


def dequantize_kv(
    state: LayerState, config: InnerQConfig, capacity: int, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole cache as keys and values [B, H, capacity, D], slot by slot; slots that hold no token are 0.

    A row that has lost tokens is NaN.

    Args:
        dtype: Of the result; the model's own (that of the windows) unless told. Dequantization runs in float32.
    """
    dtype = dtype or state.k_window.dtype
    slots, quantized, pads = state.counts.unbind(1)
    token = torch.arange(capacity, device=pads.device) - pads[:, None]
    in_middle = token - config.sink
    is_quantized = (in_middle >= 0) & (in_middle < quantized[:, None])
    is_held = (token >= 0) & (token < (slots - pads)[:, None])

    def whole(window: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        middle = _take_tokens(packed, in_middle)
        ends = _take_tokens(window, window_slot(token, config)).to(middle.dtype)
        held = torch.where(_over_tokens(is_held), torch.where(_over_tokens(is_quantized), middle, ends), 0)
        return held.masked_fill(has_lost_tokens(state, capacity), math.nan)

    keys = dequantize_keys(state, config).to(dtype)
    values = dequantize_values(state, config).to(dtype)
    return whole(state.k_window, keys), whole(state.v_window, values)


def decode_attention(
    query: torch.Tensor,
    state: LayerState,
    attn_mask: torch.Tensor | None,
    sm_scale: float,
    config: InnerQConfig,
    capacity: int,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Attention of the last M tokens over the whole cache, ``softmax(sm_scale * q K^T + mask) V``.

    Args:
        query: [B, Hq, M, D]; query head h reads key-value head ``h // (Hq // H)``.
        attn_mask: bool (True = attend) or additive float, broadcastable to [B, Hq, M, capacity]; ``None`` means
            causal: the query tokens are the last M of the cache. Empty slots and pads are never attended either way,
            nor is where an additive mask says ``-inf``.
        compute_dtype: float64 makes this the measuring stick for kernels.

    Returns:
        [B, Hq, M, D] in the query's dtype; 0 for a query that may attend to nothing, NaN where tokens were lost.
        Numbers that are not finite: see above.
    """
    batch, num_q_heads, q_len, head_dim = query.shape
    keys, values = dequantize_kv(state, config, capacity, compute_dtype)
    num_kv_heads = keys.shape[1]
    grouped = query.to(compute_dtype).reshape(batch, num_kv_heads, -1, head_dim)
    scores = sm_scale * grouped @ keys.transpose(2, 3)
    scores = torch.where(torch.isfinite(grouped).all(-1, keepdim=True), scores, math.nan)
    scores = scores.reshape(batch, num_q_heads, q_len, capacity)

    slot = torch.arange(capacity, device=query.device)
    slots, pads = state.counts[:, SLOTS, None], state.counts[:, PADS, None]
    visible = ((slot < slots) & (slot >= pads))[:, None, None]
    if attn_mask is None:
        last = slots - q_len + torch.arange(q_len, device=query.device)
        visible = visible & (slot <= last[:, None, :, None])
    elif attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    else:
        bias = attn_mask.to(compute_dtype)
        visible = visible & (bias != -math.inf)
        scores = scores + bias
    scores = scores.masked_fill(~visible, -math.inf)
    sees_nothing = (scores == -math.inf).all(-1, keepdim=True)
    probs = torch.softmax(scores, -1).masked_fill(sees_nothing, 0.0)
    out = _weighted_sum(probs.reshape(batch, num_kv_heads, -1, capacity), values)
    out = out.reshape(query.shape).masked_fill(has_lost_tokens(state, capacity), math.nan)
    return out.to(query.dtype)


def _weighted_sum(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``probs @ values`` to which a token of weight 0 adds nothing, whatever its value: 0 times NaN would be NaN."""
    out = probs @ torch.where(torch.isfinite(values), values, 0.0)
    # NaN counts as both infinities, whose sum it is.
    infinite = torch.cat([~(values < math.inf), ~(values > -math.inf)], -1).to(values.dtype)
    up, down = ((probs > 0).to(values.dtype) @ infinite > 0).chunk(2, -1)
    return out + torch.where(up, math.inf, 0.0) - torch.where(down, math.inf, 0.0)


def crop_kv(state: LayerState, config: InnerQConfig, capacity: int, num_tokens: int) -> None:
    """Drops the last ``num_tokens`` tokens of every row, in place.

    A quantized block that is cut into goes back to the recent window: its remaining tokens keep their rounded value.
    A row that has lost tokens stays one: those that are dropped need not be those that were lost.
    """
    keys, values = dequantize_kv(state, config, capacity)
    slots, quantized, pads = state.counts.unbind(1)
    slots = torch.where(slots > capacity, slots, (slots - num_tokens).clamp(min=0))
    held = (slots - pads).clamp(min=0)
    flush = config.flush_tokens
    kept = torch.minimum(quantized, ((held - config.sink) // flush).clamp(min=0) * flush)

    newest = newest_token_of_slots(held, config, pads.device)
    refilled = newest >= (config.sink + kept)[:, None]
    for whole, window in ((keys, state.k_window), (values, state.v_window)):
        window.copy_(torch.where(_over_tokens(refilled), _take_tokens(whole, newest + pads[:, None]), window))
    state.counts[:, SLOTS] = slots
    state.counts[:, QUANTIZED] = kept


def has_lost_tokens(state: LayerState, capacity: int) -> torch.Tensor:
    """Which rows were given more tokens than they hold: bool [B, 1, 1, 1]."""
    return (state.counts[:, SLOTS] > capacity)[:, None, None, None]


def window_slot(token: torch.Tensor, config: InnerQConfig) -> torch.Tensor:
    """Index of a token in the window buffer: sink tokens in front, then the ring."""
    return torch.where(token < config.sink, token, config.sink + (token - config.sink) % config.ring)


def newest_token_of_slots(held: torch.Tensor, config: InnerQConfig, device: torch.device) -> torch.Tensor:
    """For every window slot the newest of a row's ``held`` [B] tokens that belongs there, or -1: int64 [B, S+R]."""
    sink = torch.arange(config.sink, device=device).expand(held.shape[0], -1)
    last = held[:, None] - 1
    slot = torch.arange(config.ring, device=device)
    ring = last - (last - config.sink - slot) % config.ring
    ring = torch.where(ring >= config.sink, ring, -1)
    return torch.cat([torch.where(sink <= last, sink, -1), ring], 1)


def dequantize_keys(state: LayerState, config: InnerQConfig) -> torch.Tensor:
    """All packed keys, ``k' * key_norm + key_center``: float32 [B, H, N, D]."""
    spec = config.key_spec
    tiles = unpack_tiles(state.k_codes, spec.bits)  # [B, H, blocks, D/32, token, channel]
    batch, heads, blocks, _, _, _ = tiles.shape
    groups = tiles.transpose(3, 4).reshape(batch, heads, blocks, BLOCK, -1, spec.group_size)
    zeros = state.k_zeros.transpose(3, 4) if spec.stores_zeros else None
    keys = dequantize_groups(groups, state.k_scales.transpose(3, 4), zeros, spec)
    keys = keys.reshape(batch, heads, blocks * BLOCK, -1)
    return keys * state.key_norm.unsqueeze(2) + state.key_center.unsqueeze(2)


def dequantize_values(state: LayerState, config: InnerQConfig) -> torch.Tensor:
    """All packed values: float32 [B, H, N, D]."""
    spec = config.value_spec
    tiles = unpack_tiles(state.v_codes, spec.bits)  # [B, H, blocks, D/32, channel, token]
    batch, heads, blocks, num_tiles, _, _ = tiles.shape
    by_channel = tiles.permute(0, 1, 3, 4, 2, 5).reshape(batch, heads, num_tiles * BLOCK, -1, spec.group_size)
    zeros = state.v_zeros.transpose(2, 3) if spec.stores_zeros else None
    values = dequantize_groups(by_channel, state.v_scales.transpose(2, 3), zeros, spec)
    return values.reshape(batch, heads, num_tiles * BLOCK, blocks * BLOCK).transpose(2, 3)


def _quantize_keys(keys: torch.Tensor, spec: TensorQuantSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """[B, H, T, D] to packed codes [B, H, T/32, D/32, bytes], scales and zeros [B, H, T/32, D/g, 32]."""
    batch, heads, _, head_dim = keys.shape
    codes, scales, zeros = quantize_groups(
        keys.reshape(batch, heads, -1, BLOCK, head_dim // spec.group_size, spec.group_size), spec
    )
    tiles = codes.reshape(batch, heads, -1, BLOCK, head_dim // BLOCK, BLOCK).transpose(3, 4)
    return pack_tiles(tiles, spec.bits), scales.transpose(3, 4), None if zeros is None else zeros.transpose(3, 4)


def _quantize_values(
    values: torch.Tensor, spec: TensorQuantSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """[B, H, T, D] to packed codes [B, H, T/32, D/32, bytes], scales and zeros [B, H, T/g, D]."""
    batch, heads, num_tokens, head_dim = values.shape
    by_channel = values.transpose(2, 3).reshape(batch, heads, head_dim, num_tokens // spec.group_size, spec.group_size)
    codes, scales, zeros = quantize_groups(by_channel, spec)
    tiles = codes.reshape(batch, heads, head_dim // BLOCK, BLOCK, num_tokens // BLOCK, BLOCK).permute(0, 1, 4, 2, 3, 5)
    return pack_tiles(tiles, spec.bits), scales.transpose(2, 3), None if zeros is None else zeros.transpose(2, 3)


def _store_blocks(
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    buffers: tuple[torch.Tensor, ...],
    quantized: torch.Tensor,
    valid: torch.Tensor,
    scale_unit: int,
) -> None:
    """Writes codes, scales and zeros behind the ``quantized`` tokens of each row, where ``valid`` [B, T]."""
    codes, scales, zeros = buffers
    _store_units(codes, new[0], quantized, valid, BLOCK)
    _store_units(scales, new[1], quantized, valid, scale_unit)
    if new[2] is not None:
        _store_units(zeros, new[2], quantized, valid, scale_unit)


def _store_units(
    buffer: torch.Tensor, new: torch.Tensor, quantized: torch.Tensor, valid: torch.Tensor, unit: int
) -> None:
    """Axis 2 of ``buffer`` counts units of ``unit`` tokens. Units that are not valid get their old content back.

    The indices wrap round, so they stay distinct and in range; a valid unit never wraps, because capacity was checked.
    """
    total = buffer.shape[2]
    new = new[:, :, :total]
    count = new.shape[2]
    index = (quantized[:, None] // unit + torch.arange(count, device=buffer.device)) % total
    shape = (-1, 1, count) + (1,) * (buffer.dim() - 3)
    index = index.reshape(shape).expand(new.shape)
    keep = valid[:, ::unit][:, :count].reshape(shape)
    buffer.scatter_(2, index, torch.where(keep, new, buffer.gather(2, index)))


def _take_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, H, T, D] at index [B, L] of the token axis; one out of range is clamped, for the caller to mask."""
    index = index.clamp(0, x.shape[2] - 1)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def _over_tokens(mask: torch.Tensor) -> torch.Tensor:
    """[B, L] to a shape that broadcasts over [B, H, L, D]."""
    return mask[:, None, :, None]
