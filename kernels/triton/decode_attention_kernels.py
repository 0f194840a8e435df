"""The two device kernels of decode_attention: one split of the cache, and the merge of the splits.

Codes are the *left* operand of both products, tokens (keys) or channels (values) being its rows, and the query rows are
the columns: 8 of them cost half of what 16 padded rows would. A scale multiplies a finished sum over one tile
(InnerQ's inner grouping). NB blocks at a time are NB independent online softmaxes, one per warp, merged when the split
ends. Scores are in units of log 2.

Keys, values and scales may be NaN or infinite. What a row may not see of them must not reach it: a score is replaced
where it is masked, and where a product would multiply such a value by a weight of 0, the value is replaced.
"""

from __future__ import annotations

import triton
import triton.language as tl

from innerq_compile.kernels.triton.groups import is_finite
from innerq_compile.kernels.triton.launch import SIZES
from innerq_compile.kernels.triton.operands import (
    code_offset,
    inner_place,
    load_high_shifts,
    load_operand,
    operand_words,
    place,
)
from innerq_compile.kernels.triton.pieces import (
    LARGEST,
    pieces_of,
    pieces_outer_to_inner,
    power_of_two,
    repeat_pieces,
    times_pieces,
)
from innerq_compile.kernels.triton.scales import load_key_scales, load_value_scales

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_SMALLEST_PEAK = tl.constexpr(2.0**-100)  # far below any query that has a score; its inverse is finite
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves an integer
_CAUSAL, _BOOLEAN, _ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=SIZES)
def decode_attention_kernel(
    query_ptr, k_codes_ptr, k_scales_ptr, k_zeros_ptr, k_window_ptr, v_codes_ptr, v_scales_ptr, v_zeros_ptr,
    v_window_ptr, key_norm_ptr, key_center_ptr, counts_ptr, mask_ptr, sums_ptr, stats_ptr,
    stride_qb, stride_qh, stride_qm, stride_mb, stride_mh, stride_mm, stride_ms,
    num_heads, num_blocks, capacity, num_splits, sm_scale,
    Q_PER_KV: tl.constexpr, Q_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    SINK: tl.constexpr, RING: tl.constexpr,
    K_BITS: tl.constexpr, K_MODE: tl.constexpr, K_CENTER: tl.constexpr,
    V_BITS: tl.constexpr, V_MODE: tl.constexpr, V_CENTER: tl.constexpr,
    MASK: tl.constexpr, MASK_SHARED: tl.constexpr, EXACT: tl.constexpr, WIDEN: tl.constexpr, ASM: tl.constexpr,
    NB: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """Partial sums of one split of one key-value head, for RT of its R = Q_PER_KV * Q_LEN stacked query rows.

    Grid (splits, B * H, row tiles). Row r is query head ``r // Q_LEN`` of the head's own, query token ``r % Q_LEN``.
    Splits ``0 .. num_splits - 1`` share the packed blocks that exist, and one that gets none writes nothing; each other
    one takes 32 * NB slots of the windows. Written: ``sums`` float32 [B * H, splits, R, D], weighted sums of values,
    and ``stats`` float32 [B * H, splits, R, 2], largest score and sum of weights.

    MASK_SHARED: one mask serves all rows of a head. WIDEN: windows are multiplied as float32, not in their own dtype.
    EXACT: queries and weights keep their 24 bits, in pieces, where they are otherwise rounded to float16.
    """
    # Read as what they hold here, not by a view outside: for Inductor such a view is a copy (bool) or a call (uint8).
    k_codes_ptr = k_codes_ptr.to(tl.pointer_type(tl.int16))
    v_codes_ptr = v_codes_ptr.to(tl.pointer_type(tl.int16))
    if MASK == _BOOLEAN:
        mask_ptr = mask_ptr.to(tl.pointer_type(tl.int8))
    split = tl.program_id(0)
    # Numbers of heads, tokens and blocks fit 32 bits; divisions by sizes in 64 would be calls.
    head = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    slots = tl.load(counts_ptr + batch * 3).to(tl.int32)
    pads = tl.load(counts_ptr + batch * 3 + 2).to(tl.int32)
    blocks = tl.minimum(tl.load(counts_ptr + batch * 3 + 1).to(tl.int32) // 32, num_blocks)

    rows = tl.program_id(2) * RT + tl.arange(0, RT)
    row_exists = rows < Q_PER_KV * Q_LEN
    q_head = (tl.program_id(1) % num_heads).to(tl.int64) * Q_PER_KV
    query_rows = query_ptr + batch * stride_qb + (q_head + rows // Q_LEN) * stride_qh + rows % Q_LEN * stride_qm
    # Asked for before the counts are looked at: after the branches that those decide, it would be one more trip.
    query, peak, center = _load_normed_query(
        query_rows, key_norm_ptr + head * HEAD_DIM, key_center_ptr + head * HEAD_DIM, row_exists, HEAD_DIM, EXACT, RT
    )
    held = slots - pads
    # A row sees the tokens below its end; a row that does not exist sees none.
    limit = tl.minimum(held, capacity - pads)
    end = limit + 0 * rows
    if MASK == _CAUSAL:
        end = tl.minimum(end, held - Q_LEN + 1 + rows % Q_LEN)
    end = tl.where(row_exists, end, 0)
    mask_ptr += batch * stride_mb + q_head * stride_mh + pads.to(tl.int64) * stride_ms
    mask_rows = (rows // Q_LEN).to(tl.int64) * stride_mh + rows % Q_LEN * stride_mm
    scale = tl.full([], sm_scale, tl.float32) * _LOG2E  # comes as float64 under Inductor
    out_rows = (head * tl.num_programs(0) + split) * (Q_PER_KV * Q_LEN) + rows

    if split >= num_splits:
        window = head * (SINK + RING) * HEAD_DIM
        _attend_windows(
            query_rows, k_window_ptr + window, v_window_ptr + window, mask_ptr, mask_rows, stride_ms,
            sums_ptr, stats_ptr, out_rows, row_exists, end, limit, scale,
            (split - num_splits) * (32 * NB), held, blocks, slots <= capacity, Q_LEN, HEAD_DIM, SINK, RING,
            MASK, MASK_SHARED, EXACT, WIDEN, NB, RT,
        )  # fmt: skip
    else:
        # In units of NB blocks, as even as can be; the first splits get what is left over.
        units = tl.cdiv(blocks, NB)
        each = units // num_splits
        left_over = units - each * num_splits
        first = (split * each + tl.minimum(split, left_over)) * NB
        last = tl.minimum(first + (each + (split < left_over).to(tl.int32)) * NB, blocks)
        if first < last:
            codes = head * num_blocks * HEAD_DIM * 2  # times bits: int16 words before this head
            groups = head * num_blocks * (HEAD_DIM * 32 // GROUP)
            _attend_packed(
                query, peak, center, k_codes_ptr + codes * K_BITS, k_scales_ptr + groups, k_zeros_ptr + groups,
                v_codes_ptr + codes * V_BITS, v_scales_ptr + groups, v_zeros_ptr + groups,
                mask_ptr, mask_rows, stride_ms,
                sums_ptr, stats_ptr, out_rows, row_exists, end, limit, scale, first, last, slots,
                Q_LEN, HEAD_DIM, GROUP, SINK, K_BITS, K_MODE, K_CENTER, V_BITS, V_MODE, V_CENTER,
                MASK, MASK_SHARED, EXACT, ASM, NB, RT,
            )  # fmt: skip


@triton.jit
def _attend_packed(
    normed_query, peak, center, k_codes_ptr, k_scales_ptr, k_zeros_ptr, v_codes_ptr, v_scales_ptr, v_zeros_ptr,
    mask_ptr, mask_rows, stride_ms, sums_ptr, stats_ptr, out_rows, row_exists, end, limit, scale, first, last, slots,
    Q_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr,
    K_BITS: tl.constexpr, K_MODE: tl.constexpr, K_CENTER: tl.constexpr,
    V_BITS: tl.constexpr, V_MODE: tl.constexpr, V_CENTER: tl.constexpr,
    MASK: tl.constexpr, MASK_SHARED: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    NB: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """Blocks [first, last): codes enter the products as they are, scales multiply the sums over a tile.

    Rows and columns of all operands are in operand order: token and channel of a position are ``place`` of it, or
    ``inner_place`` where the product sums over them.
    """
    TILES: tl.constexpr = HEAD_DIM // 32
    K_WORDS: tl.constexpr = HEAD_DIM * 2 * K_BITS  # of a block
    V_WORDS: tl.constexpr = HEAD_DIM * 2 * V_BITS
    PARTS: tl.constexpr = 32 // min(GROUP, 32)  # a group of 16 is a part of a tile; a longer one covers tiles
    # Subtracted from exact codes before the product; others leave it to the start value of the accumulator.
    K_SHIFT: tl.constexpr = K_CENTER if K_MODE == 0 else 0.0
    V_SHIFT: tl.constexpr = V_CENTER if V_MODE == 0 else 0.0
    K_EXACT_SHIFT: tl.constexpr = K_SHIFT if EXACT else None
    V_EXACT_SHIFT: tl.constexpr = V_SHIFT if EXACT else None
    LARGEST_WEIGHT: tl.constexpr = LARGEST if EXACT else 1.0
    SEES_ALL: tl.constexpr = MASK == _CAUSAL and Q_LEN == 1  # no packed block is hidden from a row
    lane = place(tl.arange(0, 32))
    nb = tl.arange(0, NB)
    query, query_starts, query_sums = (), (), ()
    inverse = tl.div_rn(1.0, peak)  # of a power of two: exact
    for t in tl.static_range(TILES):
        for part in tl.static_range(PARTS):
            q = _only_part(normed_query[t] * inverse[None, :], part, PARTS)
            query += (repeat_pieces(pieces_of(q, tl.float16, EXACT), NB, RT),)
            if EXACT:
                query_starts += (tl.zeros([NB, 32, RT], tl.float32),)
            else:
                q = q.to(tl.float16)
                query_starts += (_query_start(q, K_BITS, K_SHIFT, NB, RT),)
            query_sums += (tl.sum(q.to(tl.float32), 0)[None, None, :],)
    row_scale = (peak * scale)[None, None, :]
    center = (center * scale)[None, None, :]
    high_shifts = load_high_shifts(k_codes_ptr, slots)
    start_operand = _start_operand(V_BITS, V_SHIFT, NB)

    largest = tl.full([NB, RT], _LOWEST, tl.float32)
    total = tl.zeros([NB, 32, RT], tl.float32)
    sums = ()
    for _ in tl.static_range(TILES):
        sums += (tl.zeros([NB, 32, RT], tl.float32),)

    limit = tl.minimum(limit, SINK + last * 32)
    token = nb[:, None] * 32 + lane[None, :]
    next_mask = _load_mask(SINK + first * 32, token, end, limit, mask_ptr, mask_rows, stride_ms, MASK, MASK_SHARED)
    # Stated at the loop, the number of stages also holds for loads that feed no product: the scales of the values.
    STAGES: tl.constexpr = _stages(HEAD_DIM, GROUP, K_BITS, K_MODE, V_BITS, V_MODE, EXACT, RT, ASM)
    for i in tl.range(first, last, NB, num_stages=STAGES):
        # Blocks past the last are the last one again, and no row sees their tokens. Behind a minimum the compiler does
        # not see i; as a sum with i, each of 17 addresses would be carried from iteration to iteration.
        block = tl.minimum(i + nb, last - 1).to(tl.int64)
        mask = next_mask
        if MASK != _CAUSAL:
            next_mask = _load_mask(
                SINK + tl.minimum(i + NB, last) * 32, token, end, limit, mask_ptr, mask_rows, stride_ms,
                MASK, MASK_SHARED,
            )  # fmt: skip
        words, high_words = operand_words(k_codes_ptr, block * K_WORDS, K_BITS)
        steps, constants = load_key_scales(k_scales_ptr, k_zeros_ptr, block, HEAD_DIM, GROUP, K_MODE, K_CENTER, NB)
        scores = tl.zeros([NB, 32, RT], tl.float32)
        for t in tl.static_range(TILES):
            start = t * (64 * K_BITS)
            codes = load_operand(words + start, high_words + start, high_shifts, K_BITS, K_EXACT_SHIFT, NB, ASM)
            for part in tl.static_range(PARTS):
                products = times_pieces(codes, query[t * PARTS + part], query_starts[t * PARTS + part])
                scores += products * steps[(t * PARTS + part) * 32 // max(GROUP, 32)][:, :, None]
                if K_MODE != 0:
                    constant = constants[(t * PARTS + part) * 32 // max(GROUP, 32)]
                    scores += constant[:, :, None] * query_sums[t * PARTS + part]
        visible = _visible(SINK + i * 32, token, end, limit, MASK_SHARED)
        scores, visible = _mask_scores(scores * row_scale + center, visible, mask, MASK)
        largest, weights, rescale = _weigh(scores, largest)
        total = total * rescale + weights
        words, high_words = operand_words(v_codes_ptr, block * V_WORDS, V_BITS)
        for part in tl.static_range(PARTS):
            w = _only_part(weights * LARGEST_WEIGHT, part, PARTS)
            w_pieces = pieces_outer_to_inner(pieces_of(w, tl.float16, EXACT), NB, RT)
            if EXACT:
                value_start = tl.zeros([NB, 32, RT], tl.float32)
            else:
                w = w_pieces[0].to(tl.float32)
                value_start = tl.dot(start_operand, w_pieces[0], input_precision="ieee")
            steps, constants = load_value_scales(
                v_scales_ptr, v_zeros_ptr, block, part, HEAD_DIM, GROUP, V_MODE, V_CENTER, NB
            )
            if not SEES_ALL:
                seen = tl.max(_only_part(visible.to(tl.float32), part, PARTS), 1) > 0  # [NB, RT or 1]
            updated = ()
            for t in tl.static_range(TILES):
                start = t * (64 * V_BITS)
                codes = load_operand(words + start, high_words + start, high_shifts, V_BITS, V_EXACT_SHIFT, NB, ASM)
                products = times_pieces(codes, w_pieces, value_start)
                step, constant = steps[t], constants[t]
                if MASK_SHARED:
                    step, constant = tl.where(seen, step, 0.0), tl.where(seen, constant, 0.0)
                added = products * step[:, :, None]
                if V_MODE != 0:
                    added += constant[:, :, None] * tl.sum(w, 1)[:, None, :]
                if not (MASK_SHARED or SEES_ALL):
                    added = tl.where(seen[:, None, :], added, 0.0)
                updated += (sums[t] * rescale + added if part == 0 else sums[t] + added,)
            sums = updated
    for t in tl.static_range(TILES):
        plain = sums[t] * (1.0 / LARGEST_WEIGHT)
        _store_sums(sums_ptr, plain, largest, out_rows, row_exists, t * 32 + lane, HEAD_DIM)
    _store_stats(stats_ptr, total, largest, out_rows, row_exists)


@triton.constexpr_function
def _stages(head_dim, group, k_bits, k_mode, v_bits, v_mode, exact, rows, asm):
    """Iterations under way at a time, in their loads or at work.

    Three: with two, blocks are asked for when one iteration ends and awaited when the next begins. Fewer where the
    blocks to come and the query's operands take more shared memory than small GPUs have (99 KiB); on AMD, where the
    blocks to come would wait in registers, none ahead.
    """
    if not asm:
        return 1
    # Of NB = 4 blocks. A 1-bit plane is loaded twice; scales and zeros are two bytes a group.
    codes = 16 * head_dim * sum(4 if bits == 3 else bits for bits in (k_bits, v_bits))
    scales = 256 * head_dim // group * (2 + (k_mode != 0) + (v_mode != 0))
    query = 8 * head_dim * rows * (3 if exact else 1)
    return 1 + max(0, min(2, (99 * 1024 - query) // (codes + scales)))


@triton.jit
def _attend_windows(
    query_rows, k_window_ptr, v_window_ptr, mask_ptr, mask_rows, stride_ms,
    sums_ptr, stats_ptr, out_rows, row_exists, end, limit, scale, first_slot, held, blocks, is_whole,
    Q_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
    MASK: tl.constexpr, MASK_SHARED: tl.constexpr, EXACT: tl.constexpr, WIDEN: tl.constexpr,
    NB: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """Slots [first_slot, first_slot + 32 * NB) of the windows, in the order in which they lie in memory.

    Every row has such a split, so this is where one that has lost tokens (not ``is_whole``) gets weights that are NaN.
    """
    TILES: tl.constexpr = HEAD_DIM // 32
    DTYPE: tl.constexpr = tl.float32 if WIDEN else k_window_ptr.dtype.element_ty
    CUT: tl.constexpr = EXACT and not WIDEN
    SEES_THE_SAME: tl.constexpr = MASK_SHARED or (MASK == _CAUSAL and Q_LEN == 1)  # as all other rows
    LARGEST_WEIGHT: tl.constexpr = LARGEST if CUT else 1.0
    lane = tl.arange(0, 32)
    slot = first_slot + tl.arange(0, NB)[:, None] * 32 + lane[None, :]
    # The newest token that belongs in a ring slot; it is in the slot unless it was never appended or is packed.
    token = tl.where(slot < SINK, slot, held - 1 - (held - 1 - slot) % RING)
    is_held = (token < held) & ((slot < SINK) | (token >= SINK + blocks * 32)) & (slot < SINK + RING)
    scores = tl.zeros([NB, 32, RT], tl.float32)
    for t in tl.static_range(TILES):
        channels = (t * 32 + lane)[None, None, :]
        keys = tl.load(k_window_ptr + slot[:, :, None] * HEAD_DIM + channels, mask=is_held[:, :, None], other=0.0)
        query = _load_query(query_rows, t * 32 + lane, row_exists).to(DTYPE)
        query = tl.broadcast_to(query[None, :, :], [NB, 32, RT])
        scores = tl.dot(keys.to(DTYPE), query, scores, input_precision="ieee")
    token = tl.where(is_held, token, held)
    mask = _load_mask(0, token.to(tl.int64), end, limit, mask_ptr, mask_rows, stride_ms, MASK, MASK_SHARED)
    visible = _visible(0, token, end, limit, MASK_SHARED)
    scores, visible = _mask_scores(scores * scale, visible, mask, MASK)
    is_seen = tl.max(visible.to(tl.float32), 2) > 0
    largest, weights, _ = _weigh(scores, tl.full([NB, RT], _LOWEST, tl.float32))
    pieces = pieces_of(weights * LARGEST_WEIGHT, DTYPE, CUT)
    for t in tl.static_range(TILES):
        channels = (t * 32 + lane)[None, :, None]
        values = tl.load(v_window_ptr + slot[:, None, :] * HEAD_DIM + channels, mask=is_seen[:, None, :], other=0.0)
        values = values.to(DTYPE)
        infinite = tl.zeros([NB, 32, RT], tl.float32)
        if not SEES_THE_SAME:
            values, infinite = _take_infinite(values, weights, infinite)
        sums = times_pieces(values, pieces, tl.zeros([NB, 32, RT], tl.float32)) * (1.0 / LARGEST_WEIGHT) + infinite
        _store_sums(sums_ptr, sums, largest, out_rows, row_exists, t * 32 + lane, HEAD_DIM)
    weights = tl.where(is_whole, weights, float("nan"))
    _store_stats(stats_ptr, weights, largest, out_rows, row_exists)


@triton.jit
def _take_infinite(values, weights, none):
    """Values [NB, 32 channels, 32 tokens] with 0 for what is not finite, and what a row gets from that, [NB, 32, RT].

    A NaN counts as both infinities, whose sum it is. Their numbers among the tokens that have a weight are counted by
    one product, negative ones in units of 128, which a bfloat16 adds exactly to 1.
    """
    x = values.to(tl.float32)
    marks = tl.where(x < float("inf"), 0.0, 1.0) + tl.where(x > float("-inf"), 0.0, 128.0)
    found = tl.dot(marks.to(values.dtype), (weights > 0).to(values.dtype), none, input_precision="ieee")
    negative = found * (1.0 / 128.0) + _ROUND - _ROUND  # of 32 tokens at most, so that the others are no half of a unit
    infinite = tl.where(found > 128.0 * negative, float("inf"), 0.0) - tl.where(negative > 0, float("inf"), 0.0)
    return tl.where(marks == 0.0, values, 0.0), infinite


@triton.jit
def _load_query(query_rows, channels, row_exists):
    """Query rows of some channels as float32 [channels, RT]; NaN for infinity, whose scores could be -inf."""
    q = tl.load(query_rows[None, :] + channels[:, None], mask=row_exists[None, :], other=0.0).to(tl.float32)
    return tl.where(is_finite(q), q, float("nan"))


@triton.jit
def _load_normed_query(
    query_rows, norm_ptr, center_ptr, row_exists, HEAD_DIM: tl.constexpr, EXACT: tl.constexpr, RT: tl.constexpr
):
    """Each row times key norm, as a tuple of tiles [32 inner, RT] in operand order; what to divide it by before it is
    rounded or cut into pieces, and the row times key center, both [RT].
    """
    tiles = ()
    peaks = tl.zeros([32, RT], tl.float32)
    centers = tl.zeros([32, RT], tl.float32)
    for t in tl.static_range(HEAD_DIM // 32):
        channels = t * 32 + inner_place(tl.arange(0, 32))
        q = _load_query(query_rows, channels, row_exists)
        normed = q * tl.load(norm_ptr + channels)[:, None]
        centers += q * tl.load(center_ptr + channels)[:, None]
        peaks = tl.maximum(peaks, tl.abs(normed))
        tiles += (normed,)
    peak, center = tl.max(peaks, 0), tl.sum(centers, 0)
    if EXACT:
        peak = power_of_two(peak) * (1.0 / LARGEST)
    return tiles, tl.maximum(peak, _SMALLEST_PEAK), center


@triton.jit
def _only_part(x, part: tl.constexpr, PARTS: tl.constexpr):
    """x [..., 32, RT] with the rows outside a part of the tile's inner axis set to 0."""
    if PARTS > 1:
        inside = (tl.arange(0, 32) // 16 == part)[:, None]
        x = tl.where(inside if len(x.shape) == 2 else inside[None, :, :], x, 0.0)
    return x


@triton.jit
def _start_operand(BITS: tl.constexpr, SHIFT: tl.constexpr, NB: tl.constexpr):
    """[NB, 32 outer, 32 inner]: minus what :func:`load_operand` added to the codes, minus SHIFT."""
    position = tl.arange(0, 32)
    start = (-SHIFT - code_offset(position[None, :], position[:, None] // 16, BITS)).to(tl.float16)
    return tl.broadcast_to(start[None, :, :], [NB, 32, 32])


@triton.jit
def _query_start(q, BITS: tl.constexpr, SHIFT: tl.constexpr, NB: tl.constexpr, RT: tl.constexpr):
    """Start of the accumulator of ``codes @ q`` for q [32, RT]: float32 [NB, 32, RT]."""
    position = tl.arange(0, 32)
    low = tl.sum(q.to(tl.float32) * (-SHIFT - code_offset(position, 0, BITS))[:, None], 0)
    start = low[None, :]
    if BITS == 4:
        high = tl.sum(q.to(tl.float32) * (-SHIFT - code_offset(position, 1, BITS))[:, None], 0)
        start = tl.where((position < 16)[:, None], start, high[None, :])
    else:
        start = tl.broadcast_to(start, [32, RT])
    return tl.broadcast_to(start[None, :, :], [NB, 32, RT])


@triton.jit
def _visible(first_token, token, end, limit, MASK_SHARED: tl.constexpr):
    """Which tokens first_token + token [NB, 32] may be looked at, as [NB, 32, RT or 1].

    That is before ``end`` [RT], or, where MASK_SHARED saves the rows a bound of their own, before ``limit``.
    """
    if MASK_SHARED:
        visible = (token < limit - first_token)[:, :, None]
    else:
        visible = token[:, :, None] < (tl.minimum(end, limit) - first_token)[None, None, :]
    return visible


@triton.jit
def _load_mask(
    first_token, token, end, limit, mask_ptr, mask_rows, stride_ms, MASK: tl.constexpr, MASK_SHARED: tl.constexpr
):
    """The mask's numbers for tokens first_token + token [NB, 32], as [NB, 32] where MASK_SHARED and else [NB, 32, RT].

    Without a mask they have no meaning.
    """
    mask = token
    if MASK != _CAUSAL:
        at = mask_ptr + tl.cast(first_token, tl.int64) * stride_ms + token * stride_ms
        if MASK_SHARED:
            mask = tl.load(at, mask=token < limit - first_token, other=0)
        else:
            visible = _visible(first_token, token, end, limit, MASK_SHARED)
            mask = tl.load(at[:, :, None] + mask_rows[None, None, :], mask=visible, other=0)
    return mask


@triton.jit
def _mask_scores(scores, visible, mask, MASK: tl.constexpr):
    """Scores [NB, 32, RT] with what :func:`_load_mask` returned applied, -inf where a row may not look; and where it
    may, [NB, 32, RT or 1].
    """
    if MASK != _CAUSAL:
        if len(mask.shape) == 2:
            mask = mask[:, :, None]
        # Triton derives the order of a product's operands from the narrowest load that their numbers come from, and
        # bytes would have it shuffle all the unpacked values; it does not look past a reduction, be it of one number.
        mask = tl.max(tl.expand_dims(mask, 3), 3)
        if MASK == _BOOLEAN:
            visible = mask != 0
        else:
            # The most negative finite number is a common "no": it must stay finite in units of log 2, as it does here.
            scores += tl.where(mask >= _LOWEST, tl.maximum(mask * _LOG2E, _LOWEST), mask)
            visible = visible & (mask != float("-inf"))
    return tl.where(visible, scores, float("-inf")), visible


@triton.jit
def _weigh(scores, largest):
    """Weights 2^(scores - largest) [NB, 32, RT] with the new largest [NB, RT], and what brings old sums to it."""
    new = tl.maximum(largest, tl.max(scores, 1))
    return new, tl.exp2(scores - new[:, None, :]), tl.exp2(largest - new)[:, None, :]


@triton.jit
def _store_sums(sums_ptr, sums, largest, out_rows, row_exists, channels, HEAD_DIM: tl.constexpr):
    """Merges the NB softmaxes' sums [NB, 32 channels, RT]."""
    factor = tl.exp2(largest - tl.max(largest, 0)[None, :])
    merged = tl.sum(sums * factor[:, None, :], 0)
    tl.store(sums_ptr + out_rows[None, :] * HEAD_DIM + channels[:, None], merged, mask=row_exists[None, :])


@triton.jit
def _store_stats(stats_ptr, total, largest, out_rows, row_exists):
    """Merges the NB softmaxes' largest scores [NB, RT] and weights [NB, 32, RT]."""
    top = tl.max(largest, 0)
    merged = tl.sum(tl.sum(total, 1) * tl.exp2(largest - top[None, :]), 0)
    tl.store(stats_ptr + out_rows * 2, top, mask=row_exists)
    tl.store(stats_ptr + out_rows * 2 + 1, merged, mask=row_exists)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    sums_ptr, stats_ptr, counts_ptr, out_ptr, num_heads, num_blocks, num_splits, num_window_splits, out_rows,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, NB: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one query row: ``out`` [B, Hq, M, D]; 0 for a row that attends to nothing, NaN where the
    weights of a split are.

    Grid (R, B * H), R = ``out_rows`` rows per key-value head. CHANNELS: HEAD_DIM, made a power of two.
    """
    head = tl.program_id(1).to(tl.int64)
    blocks = tl.minimum(tl.load(counts_ptr + tl.program_id(1) // num_heads * 3 + 1).to(tl.int32) // 32, num_blocks)
    used = tl.minimum(tl.cdiv(blocks, NB), num_splits)
    all_splits = num_splits + num_window_splits
    channels = tl.arange(0, CHANNELS)
    largest = tl.full([1], _LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, all_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        written = (split < used) | ((split >= num_splits) & (split < all_splits))
        row = (head * all_splits + split) * out_rows + tl.program_id(0)
        top = tl.load(stats_ptr + row * 2, mask=written, other=_LOWEST)
        weight = tl.load(stats_ptr + row * 2 + 1, mask=written, other=0.0)
        new = tl.maximum(largest, tl.max(top, 0))
        factor = tl.where(written, tl.exp2(top - new), 0.0)
        at = row[:, None] * HEAD_DIM + channels[None, :]
        part = tl.load(sums_ptr + at, mask=written[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)
        rescale = tl.exp2(largest - new)
        sums = sums * rescale + tl.sum(part * factor[:, None], 0)
        total = total * rescale + tl.sum(weight * factor, 0)
        largest = new
    result = tl.where(total != 0.0, sums / total, 0.0)
    row = head * out_rows + tl.program_id(0)
    tl.store(out_ptr + row * HEAD_DIM + channels, result.to(out_ptr.dtype.element_ty), mask=channels < HEAD_DIM)
