// One split of a head against a batch of query rows: scores, masks, online softmax and weighted values.
//
// A part of decode_attention.cpp, which says what a split and a row are. Numbers that are not finite follow
// innerq_compile/reference.py: a score of NaN or infinity makes the row NaN, and what a row does not attend to is left out
// of it, because a weight of 0 times NaN is NaN.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "tiles.h"

namespace innerq {
namespace {

constexpr float LOWEST = -std::numeric_limits<float>::max();
constexpr double LOG2E = 1.44269504088896341;
constexpr float LOG2_127 = 6.98868468677217f;

// Online softmax of R query rows: largest score so far (in units of log 2), sum of exponentials, and weighted sum of
// values [R][D].
struct Partial {
    float *largest, *sum, *out;
};

// Row r of key-value head h in batch row b is query head h * group + r / M, query token r % M.
struct Head {
    const Geometry& g;
    const Buffers& buffers;
    const AttentionRequest& request;
    Row row;
    int64_t b, h;
    int64_t query_head(int64_t r) const { return h * (request.q_heads / g.heads) + r / request.q_len; }
    int64_t query_token(int64_t r) const { return r % request.q_len; }
    int64_t index() const { return b * g.heads + h; }
};

// Applies mask and causality to a query row's scores (in units of log 2) of `count` tokens that start at `token`.
void mask_scores(const Head& head, int64_t r, int64_t token, int64_t count, float* scores) {
    const AttentionRequest& request = head.request;
    int64_t m = head.query_token(r), slot = token + head.row.pads;
    int64_t end = std::min(head.row.slots, request.capacity);
    if (request.mask_kind == CAUSAL) end = std::min(end, head.row.slots - request.q_len + m + 1);
    int64_t visible = std::clamp<int64_t>(end - slot, 0, count);
    std::fill(scores + visible, scores + count, -INFINITY);
    if (request.mask_kind == CAUSAL) return;
    const int64_t *strides = request.mask_strides, step = strides[3];
    int64_t offset = head.b * strides[0] + head.query_head(r) * strides[1] + m * strides[2] + slot * step;
    if (request.mask_kind == BOOLEAN) {
        const uint8_t* mask = static_cast<const uint8_t*>(request.mask) + offset;
        if (step != 1) {
            for (int64_t i = 0; i < visible; i++) scores[i] = mask[i * step] ? scores[i] : -INFINITY;
        } else if (std::memchr(mask, 0, visible)) {
            for (int64_t i = 0; i < visible; i++) scores[i] = mask[i] ? scores[i] : -INFINITY;
        }
    } else {
        // The most negative finite number is a common "no": it must stay finite in units of log 2, as it does here.
        // Minus infinity hides a token, also one whose score is NaN.
        const float* mask = static_cast<const float*>(request.mask) + offset;
        for (int64_t i = 0; i < visible; i++) {
            float bias = mask[i * step] * (float)LOG2E;
            float score = scores[i] + (bias < LOWEST && mask[i * step] >= LOWEST ? LOWEST : bias);
            scores[i] = mask[i * step] == -INFINITY ? -INFINITY : score;
        }
    }
}

// ROWS query rows from row `first` on, against one split.
template <int ROWS> struct Batch {
    // (row, block) pairs of a chunk, at least a vector of them
    static constexpr int USED_PAIRS = ROWS * CHUNK_BLOCKS;
    static constexpr int PAIRS = USED_PAIRS > LANES ? USED_PAIRS : LANES;
    static constexpr int FOLDED = USED_PAIRS <= LANES / 2 ? LANES / 2 : LANES;
    static constexpr int GROUPS = ROWS * MAX_HEAD_DIM / BLOCK + LANES;
    const Head& head;
    int64_t first, dim;
    Partial state;  // of these rows
    const uint8_t* ahead[2];  // where the prefetching of key and value codes stands
    float starts[ROWS];       // what a packed key's score starts with (see load_query)
    alignas(VB) float row_largest[PAIRS];  // state.largest, by pair
    alignas(VB) float query[ROWS * MAX_HEAD_DIM];
    alignas(VB) float scores[ROWS * CHUNK];
    alignas(VB) int32_t query_fours[ROWS * MAX_HEAD_DIM / 4];
    alignas(VB) float query_factors[3][GROUPS];   // by tile * ROWS + r: scale, centered, total (see Factors)
    alignas(VB) int32_t weight_fours[ROWS * CHUNK / 4];
    alignas(VB) float weight_factors[3][PAIRS];  // by block * ROWS + r

    Batch(const Head& head, int64_t first, Partial all) : head(head), first(first), dim(head.g.head_dim) {
        state = {all.largest + first, all.sum + first, all.out + first * dim};
        std::fill(state.largest, state.largest + ROWS, LOWEST);
        std::fill(row_largest, row_largest + PAIRS, LOWEST);
        std::fill(state.sum, state.sum + ROWS, 0.0f);
        std::fill(state.out, state.out + ROWS * dim, 0.0f);
    }

    // query = q * sm_scale * log2(e) against the windows. Against packed keys, which stand for k' * norm + center, it
    // is that times norm, and every score starts with that times center. A query that is not finite is NaN as a whole.
    template <class T> void load_query(const float* norm, const float* center) {
        const AttentionRequest& request = head.request;
        Floats scale = broadcast((float)(request.sm_scale * LOG2E));
        for (int r = 0; r < ROWS; r++) {
            const T* from = static_cast<const T*>(request.query) + head.b * request.query_strides[0] +
                            head.query_head(first + r) * request.query_strides[1] +
                            head.query_token(first + r) * request.query_strides[2];
            Floats start = {};
            for (int64_t d = 0; d < dim; d += LANES) {
                Floats q = load_floats(from + d) * scale;
                start += center ? q * load_floats(center + d) : q * 0.0f;
                store(query + r * dim + d, norm ? q * load_floats(norm + d) : q);
            }
            starts[r] = sum_lanes(start);
            if (!std::isfinite(starts[r])) {
                starts[r] = NAN;
                std::fill(query + r * dim, query + (r + 1) * dim, NAN);
            }
        }
    }

    // query -> query_fours and query_factors; LANES groups of 32 channels at a time. Group tile * ROWS + r.
    void quantize_query() {
        int groups = (int)(dim / BLOCK) * ROWS;
        for (int first_group = 0; first_group < groups; first_group += LANES) {
            Floats largest[LANES];
            Words totals[LANES];
            auto group_at = [&](int i) { return std::min(first_group + i, groups - 1); };
            auto channels = [&](int group) { return query + group % ROWS * dim + group / ROWS * BLOCK; };
            for (int i = 0; i < LANES; i++) {
                const float* q = channels(group_at(i));
                largest[i] = abs(load_floats(q));
                for (int c = LANES; c < BLOCK; c += LANES) largest[i] = max(abs(load_floats(q + c)), largest[i]);
            }
            alignas(VB) float inverse[LANES];
            Floats steps = fold_lanes<Max>(largest) / 127;
            store(inverse, steps > 0 ? 1 / steps : Floats{});
            for (int i = 0; i < LANES; i++) {
                const float* q = channels(group_at(i));
                int8_t* bytes = reinterpret_cast<int8_t*>(query_fours + group_at(i) * 8);
                totals[i] = Words{} - BLOCK / LANES * ROUND_BITS;
                for (int c = 0; c < BLOCK; c += LANES) {
                    Ints rounded = (Ints)(load_floats(q + c) * inverse[i] + ROUND);
                    store_low_bytes(bytes + c, rounded);
                    totals[i] += (Words)rounded;
                }
            }
            Floats total = to_floats((Ints)fold_lanes<Sum>(totals)) * steps;
            store(query_factors[0] + first_group, steps);
            store(query_factors[1] + first_group, total * head.g.key.symmetric_center);
            store(query_factors[2] + first_group, total);
        }
    }

    void mask_all(int64_t token, int64_t count, int64_t padded) {
        const AttentionRequest& request = head.request;
        int64_t last_for_all = std::min(head.row.held - request.q_len, request.capacity - head.row.pads);
        bool plain = request.mask_kind == CAUSAL && token + count <= last_for_all;
        for (int r = 0; r < ROWS; r++) {
            if (!plain) mask_scores(head, first + r, token, count, scores + r * CHUNK);
            std::fill(scores + r * CHUNK + count, scores + r * CHUNK + padded, -INFINITY);
        }
    }

    // Makes `largest` the largest score of row r and brings what was summed up before to it.
    void raise_largest(int r, float largest) {
        if (!(largest > state.largest[r])) return;
        float factor = std::exp2(state.largest[r] - largest), *out = state.out + r * dim;
        state.largest[r] = largest;
        state.sum[r] *= factor;
        for (int64_t d = 0; d < dim; d += LANES) store(out + d, load_floats(out + d) * factor);
    }

    // A score of NaN or infinity: the row's result is NaN, and nothing of the row needs to be computed any more.
    void spoil_row(int r) {
        state.sum[r] = NAN;
        std::fill(scores + r * CHUNK, scores + (r + 1) * CHUNK, -INFINITY);
    }

    // scores -> 2^(scores - largest), in place; `count` a multiple of BLOCK.
    void softmax_float(int64_t count) {
        for (int r = 0; r < ROWS; r++) {
            float* s = scores + r * CHUNK;
            Floats largest = broadcast(LOWEST), sum = {};
            Ints hostile = {};
            for (int64_t i = 0; i < count; i += LANES) {
                largest = max(load_floats(s + i), largest);
                hostile |= not_below_infinity(load_floats(s + i));
            }
            if (any_set(hostile)) {
                spoil_row(r);
                largest = broadcast(LOWEST);
            }
            raise_largest(r, max_lanes(largest));
            for (int64_t i = 0; i < count; i += LANES) {
                Floats p = exp2<5>(load_floats(s + i) - state.largest[r]);
                store(s + i, p);
                sum += p;
            }
            state.sum[r] += sum_lanes(sum);
        }
    }

    // scores -> weight_fours, 127 * 2^(scores - largest of the block) rounded, and their factors. The rounded weights
    // are also what a row's sum is made of, so that they add up to one.
    void softmax_bytes(int blocks) {
        auto scores_of = [&](int pair) { return scores + pair % ROWS * CHUNK + pair / ROWS * BLOCK; };
        for (int pair = blocks * ROWS; pair < USED_PAIRS; pair++) {
            std::fill(scores_of(pair), scores_of(pair) + BLOCK, -INFINITY);
        }
        alignas(VB) float largest[PAIRS], shifts[PAIRS];
        Ints hostile = {};
        bool raised = false;
        for (int i = 0; i < PAIRS; i += LANES) {
            Floats folded[FOLDED];
            for (int j = 0; j < FOLDED; j++) {
                const float* s = scores_of((i + j) % USED_PAIRS);
                folded[j] = load_floats(s);
                hostile |= not_below_infinity(folded[j]);
                for (int k = LANES; k < BLOCK; k += LANES) {
                    Floats more = load_floats(s + k);
                    hostile |= not_below_infinity(more);
                    folded[j] = max(more, folded[j]);
                }
            }
            Floats most = max(fold_lanes<Max, FOLDED>(folded), broadcast(LOWEST));
            store(largest + i, most);
            store(shifts + i, LOG2_127 - most);
            raised |= any_above(most, load_floats(row_largest + i));
        }
        if (any_set(hostile)) {
            for (int r = 0; r < ROWS; r++) {
                const float* s = scores + r * CHUNK;
                if (!std::all_of(s, s + CHUNK, [](float x) { return x < INFINITY; })) spoil_row(r);
            }
            return softmax_bytes(blocks);
        }
        if (raised) {
            for (int r = 0; r < ROWS; r++) {
                float most = largest[r];
                for (int pair = r + ROWS; pair < USED_PAIRS; pair += ROWS) most = std::max(largest[pair], most);
                raise_largest(r, most);
            }
            for (int pair = 0; pair < PAIRS; pair++) row_largest[pair] = state.largest[pair % ROWS];
        }

        Words totals[PAIRS];
        for (int pair = USED_PAIRS; pair < PAIRS; pair++) totals[pair] = Words{};
        const uint8_t *keys_ahead = ahead[0], *values_ahead = ahead[1];
        int key_lines = lines_per_pair(head.g.key), value_lines = lines_per_pair(head.g.value);
        for (int pair = 0; pair < USED_PAIRS; pair++) {
            prefetch_lines(keys_ahead, key_lines);
            prefetch_lines(values_ahead, value_lines);
            keys_ahead += 64 * key_lines, values_ahead += 64 * value_lines;
            const float* s = scores_of(pair);
            int8_t* bytes = reinterpret_cast<int8_t*>(weight_fours + pair * 8);
            Floats shift = broadcast(shifts[pair]);
            totals[pair] = Words{} - BLOCK / LANES * ROUND_BITS;
            for (int j = 0; j < BLOCK; j += LANES) {
                Ints rounded = (Ints)(exp2<3>(load_floats(s + j) + shift) + ROUND);
                store_low_bytes(bytes + j, rounded);
                totals[pair] += (Words)rounded;
            }
        }
        ahead[0] = keys_ahead, ahead[1] = values_ahead;
        for (int i = 0; i < PAIRS; i += LANES) {
            Floats below = load_floats(largest + i) - load_floats(row_largest + i);
            Floats scale = exp2<5>(below) * (1.0f / 127);
            Floats weight = to_floats((Ints)fold_lanes<Sum, FOLDED>(totals + i)) * scale;
            store(weight_factors[0] + i, scale);
            store(weight_factors[1] + i, weight * head.g.value.symmetric_center);
            store(weight_factors[2] + i, weight);
        }
        for (int pair = 0; pair < USED_PAIRS; pair++) state.sum[pair % ROWS] += weight_factors[2][pair];
    }

    int lines_per_pair(const TensorSpec& spec) const {
        return ((int)(dim / BLOCK) * softmax_lines(spec.bits) + ROWS - 1) / ROWS;
    }

    // Adds the values of a chunk's blocks to the rows that attend to any token of them: to the others they must do
    // nothing at all, because a weight of 0 times a scale of NaN is NaN.
    void add_packed_values(int64_t block, int blocks, BlockLoop add_values) {
        auto add = [&](int first, int count) {
            int pair = first * ROWS;
            BlockPointers values = block_pointers(head.g, head.buffers, 1, head.index(), block + first);
            Factors factors = {weight_factors[0] + pair, weight_factors[1] + pair, weight_factors[2] + pair, nullptr};
            add_values(head.g.value, values, (int)(dim / BLOCK), count, weight_fours + pair * 8, factors, ahead[1],
                       state.out);
        };
        const float* weights = weight_factors[2];
        if (std::all_of(weights, weights + blocks * ROWS, [](float x) { return x != 0; })) return add(0, blocks);
        for (int i = 0; i < blocks; i++, weights += ROWS) {
            if (std::all_of(weights, weights + ROWS, [](float x) { return x == 0; })) continue;
            alignas(VB) float before[ROWS * MAX_HEAD_DIM];
            std::copy_n(state.out, ROWS * dim, before);
            add(i, 1);
            for (int r = 0; r < ROWS; r++) {
                if (weights[r] == 0) std::copy_n(before + r * dim, dim, state.out + r * dim);
            }
        }
    }

    void packed_chunk(int64_t block, int blocks, BlockLoop score, BlockLoop add_values) {
        const Geometry& g = head.g;
        int tiles = (int)(dim / BLOCK);
        score(g.key, block_pointers(g, head.buffers, 0, head.index(), block), tiles, blocks, query_fours,
              {query_factors[0], query_factors[1], query_factors[2], starts}, ahead[0], scores);
        ahead[0] += blocks * tiles * dot_lines(g.key.bits) * 64;
        mask_all(g.sink + block * BLOCK, blocks * BLOCK, blocks * BLOCK);
        softmax_bytes(blocks);
        add_packed_values(block, blocks, add_values);
        ahead[1] += blocks * tiles * dot_lines(g.value.bits) * 64;
    }

    // to[r][outer] += sum over inner of vectors[r][inner] * x[inner][outer], for the rows whose bit is set
    void add_products(const float (*x)[BLOCK], const float* vectors, int64_t vector_stride, float* to,
                      int64_t to_stride, unsigned rows) const {
        for (int r = 0; r < ROWS; r++) {
            for (int outer = 0; outer < BLOCK && rows >> r & 1; outer += LANES) {
                Floats sum = {};
                for (int i = 0; i < BLOCK; i++) sum += load_floats(&x[i][outer]) * vectors[r * vector_stride + i];
                float* p = to + r * to_stride + outer;
                store(p, load_floats(p) + sum);
            }
        }
    }

    // The rows, a bit each, that attend to any of the 32 tokens that `weights` of a chunk stand for.
    unsigned attending_rows(const float* weights) const {
        unsigned rows = 0;
        for (int r = 0; r < ROWS; r++) {
            const float* w = weights + r * CHUNK;
            rows |= (unsigned)std::any_of(w, w + BLOCK, [](float x) { return x != 0; }) << r;
        }
        return rows;
    }

    void exact_chunk(int64_t block, int blocks) {
        const Geometry& g = head.g;
        for (int r = 0; r < ROWS; r++) std::fill(scores + r * CHUNK, scores + (r + 1) * CHUNK, starts[r]);
        for (int side = 0; side < 2; side++) {
            const TensorSpec& spec = side ? g.value : g.key;
            for (int i = 0; i < blocks; i++) {
                BlockPointers p = block_pointers(g, head.buffers, side, head.index(), block + i);
                float* tokens = scores + i * BLOCK;
                unsigned rows = side ? attending_rows(tokens) : ~0u;
                for (int64_t tile = 0; tile < dim / BLOCK && rows; tile++) {
                    alignas(VB) float x[BLOCK][BLOCK];
                    dequantize_tile_for(spec)(spec, p.codes + tile * 128 * spec.bits, p.scales + tile * BLOCK,
                                              p.zeros ? p.zeros + tile * BLOCK : nullptr, x);
                    float* channels = (side ? state.out : query) + tile * BLOCK;
                    if (side) add_products(x, tokens, CHUNK, channels, dim, rows);
                    if (!side) add_products(x, channels, dim, tokens, CHUNK, rows);
                }
            }
            if (side) continue;
            mask_all(g.sink + block * BLOCK, blocks * BLOCK, blocks * BLOCK);
            softmax_float(blocks * BLOCK);
        }
    }

    // scores of `count` keys [count][D]: LANES dot products, of a few tokens and rows, are finished together.
    // Meanwhile the values are fetched, which are then read by columns.
    template <class T> void score_window(const T* keys, const T* values, int64_t count) {
        constexpr int AT_ONCE = ROWS < LANES ? ROWS : LANES, TOKENS = LANES / AT_ONCE;
        for (int64_t t = 0; t < count; t += TOKENS) {
            const T* token[TOKENS];
            for (int i = 0; i < TOKENS; i++) token[i] = keys + std::min(t + i, count - 1) * dim;
            for (int first_row = 0; first_row < ROWS; first_row += AT_ONCE) {
                Floats sums[LANES] = {};
                for (int64_t d = 0; d < dim; d += LANES) {
                    for (int i = 0; i < TOKENS; i++) {
                        __builtin_prefetch(values + (t + i) * dim + d);
                        Floats k = load_floats(token[i] + d);
                        for (int r = 0; r < AT_ONCE; r++) {
                            sums[i * AT_ONCE + r] += k * load_floats(query + (first_row + r) * dim + d);
                        }
                    }
                }
                alignas(VB) float folded[LANES];
                store(folded, fold_lanes<Sum>(sums));
                for (int i = 0; i < LANES; i++) {
                    scores[(first_row + i % AT_ONCE) * CHUNK + t + i / AT_ONCE] = folded[i];
                }
            }
        }
    }

    // Tokens [token, token + count) that lie side by side in the windows.
    template <class T> void window_chunk(int64_t token, int64_t count) {
        const Geometry& g = head.g;
        int64_t offset = (head.index() * (g.sink + g.recent + g.flush) + window_slot(g, token)) * dim;
        const T* keys = static_cast<const T*>(head.buffers.k_window) + offset;
        const T* values = static_cast<const T*>(head.buffers.v_window) + offset;
        score_window(keys, values, count);
        int64_t padded = (count + BLOCK - 1) / BLOCK * BLOCK;
        mask_all(token, count, padded);
        softmax_float(padded);
        for (int64_t d = 0; d < dim; d += 2 * LANES) {
            if (any_set(add_window_values<false>(values + d, count, d))) add_window_values<true>(values + d, count, d);
        }
    }

    // Adds two vectors of channels of `count` values to every row, unless some number is not finite: such lanes are
    // returned and nothing is added. CHECKED adds them too, to the rows in which their token has a weight.
    template <bool CHECKED, class T> Ints add_window_values(const T* values, int64_t count, int64_t d) {
        Floats sum[ROWS][2];
        Ints hostile = {};
        for (int r = 0; r < ROWS; r++) {
            for (int i = 0; i < 2; i++) sum[r][i] = load_floats(state.out + r * dim + d + i * LANES);
        }
        for (int64_t t = 0; t < count; t++) {
            Floats v[2] = {load_floats(values + t * dim), load_floats(values + t * dim + LANES)};
            if (!CHECKED) hostile |= ~is_finite(v[0]) | ~is_finite(v[1]);
            for (int r = 0; r < ROWS; r++) {
                float weight = scores[r * CHUNK + t];
                if (CHECKED && weight == 0) continue;
                for (int i = 0; i < 2; i++) sum[r][i] += v[i] * weight;
            }
        }
        if (any_set(hostile)) return hostile;
        for (int r = 0; r < ROWS; r++) {
            for (int i = 0; i < 2; i++) store(state.out + r * dim + d + i * LANES, sum[r][i]);
        }
        return hostile;
    }

    template <class T> void run_packed(int64_t block, int64_t blocks) {
        const Geometry& g = head.g;
        int64_t channels = head.index() * dim;
        load_query<T>(head.buffers.key_norm + channels, head.buffers.key_center + channels);
        if (!head.request.exact) quantize_query();
        for (int side = 0; side < 2; side++) {
            ahead[side] = block_pointers(g, head.buffers, side, head.index(), block).codes;
            prefetch_lines(ahead[side], PREFETCH_AHEAD / 64);
            ahead[side] += PREFETCH_AHEAD;
        }
        BlockLoop score = block_loop_for(ROWS, g.key, false), add_values = block_loop_for(ROWS, g.value, true);
        for (int64_t i = 0; i < blocks; i += CHUNK_BLOCKS) {
            int count = (int)std::min<int64_t>(CHUNK_BLOCKS, blocks - i);
            if (head.request.exact) exact_chunk(block + i, count);
            if (!head.request.exact) packed_chunk(block + i, count, score, add_values);
        }
    }

    template <class T> void run_windows(int64_t packed) {
        const Geometry& g = head.g;
        load_query<T>(nullptr, nullptr);
        int64_t ring = g.recent + g.flush;
        for (int64_t token = 0; token < head.row.held;) {
            bool in_sink = token < g.sink;
            if (!in_sink && token < g.sink + packed) token = g.sink + packed;
            int64_t run = in_sink ? g.sink - token : ring - (token - g.sink) % ring;
            int64_t count = std::min({run, head.row.held - token, (int64_t)CHUNK});
            if (count > 0) window_chunk<T>(token, count);
            token += count;
            if (count <= 0) break;
        }
    }
};

}  // namespace
}  // namespace innerq
