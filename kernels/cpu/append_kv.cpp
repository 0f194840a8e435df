// append_kv and dequantize_kv: tokens into windows, windows into packed blocks, everything back into plain tensors.
//
// Built without floating-point contraction: every code, scale, zero and norm equals the reference's bit for bit
// (innerq_compile/quant.py is the definition). A group's 32 numbers run over `inner`, vector lanes over `outer`.

#include <cmath>

#include "cache.h"

namespace innerq {
namespace {

constexpr float FP16_MAX = 65504.0f;
constexpr float KEY_NORM_EPS = 0x1p-10f;

constexpr uint16_t HALF_NAN = 0x7e00;

INNERQ_INLINE HalfWords to_stored(Floats x) {
    return to_half(min(max(x, broadcast(-FP16_MAX)), broadcast(FP16_MAX)));
}

INNERQ_INLINE Floats from_stored(HalfWords h) {
    Half bits[LANES];
    store(bits, h);
    return load_floats(bits);
}

// Codes and stored parameters of LANES groups: x[i] is the i-th number of each.
struct Quantized {
    Words codes[BLOCK];
    HalfWords scale, zero;
};

// u = round(clamp(x / s + shift, 0, max_code)), with x / s = 0 where the stored scale is zero.
INNERQ_INLINE void to_codes(const Floats* x, Floats offset, Floats s, float shift, float max_code, Words* codes) {
    Ints usable = s > 0;
    Floats divisor = usable ? s : broadcast(1.0f);
    for (int i = 0; i < BLOCK; i++) {
        Floats u = (usable ? (x[i] - offset) / divisor : Floats{}) + shift;
        codes[i] = (Words)round_to_ints(min(max(u, Floats{}), broadcast(max_code)));
    }
}

INNERQ_INLINE void quantize_symmetric(const Floats* x, const TensorSpec& spec, Quantized& q) {
    Floats largest = {};
    for (int i = 0; i < BLOCK; i++) largest = max(largest, abs(x[i]));
    q.scale = to_stored(largest / spec.symmetric_span);
    q.zero = HalfWords{};
    to_codes(x, Floats{}, from_stored(q.scale), spec.symmetric_center, (float)spec.symmetric_max_code, q.codes);
}

INNERQ_INLINE void quantize_asymmetric(const Floats* x, const TensorSpec& spec, Quantized& q) {
    Floats low = x[0], high = x[0];
    for (int i = 1; i < BLOCK; i++) {
        low = min(x[i], low);
        high = max(x[i], high);
    }
    q.zero = to_stored(low);
    q.scale = to_stored((high - low) / (float)spec.asymmetric_max_code);
    to_codes(x, from_stored(q.zero), from_stored(q.scale), 0, (float)spec.asymmetric_max_code, q.codes);
}

// Summed |x - dequantized x|, added up by halving the group, as the reference does.
INNERQ_INLINE Floats summed_error(const Floats* x, const Quantized& q, float center) {
    Floats s = from_stored(q.scale), z = from_stored(q.zero), error[BLOCK];
    for (int i = 0; i < BLOCK; i++) error[i] = abs(x[i] - (s * (to_floats((Ints)q.codes[i]) - center) + z));
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) error[i] = error[i] + error[i + half];
    }
    return error[0];
}

INNERQ_INLINE void quantize_hybrid(const Floats* x, const TensorSpec& spec, Quantized& q) {
    Quantized symmetric;
    quantize_symmetric(x, spec, symmetric);
    quantize_asymmetric(x, spec, q);
    Ints wide = summed_error(x, symmetric, spec.symmetric_center) < summed_error(x, q, 0);
    HalfWords narrow = low_halves((Words)wide);
    for (int i = 0; i < BLOCK; i++) q.codes[i] = wide ? symmetric.codes[i] : q.codes[i];
    q.scale = (symmetric.scale & narrow) | ((q.scale ^ 0x8000) & ~narrow);
    q.zero &= ~narrow;
}

// Writes one sub-column of a tile: units[half][quad] holds four codes per lane (the byte map stands in layout.py).
INNERQ_INLINE void pack(const Words (*units)[8], int bits, uint8_t* p) {
    if (bits == 8) {
        for (int quad = 0; quad < 8; quad++) {
            for (int half = 0; half < 2; half++) store(p + 64 * (2 * quad + half), units[half][quad]);
        }
    } else if (bits == 4) {
        for (int quad = 0; quad < 8; quad++) store(p + 64 * quad, units[0][quad] | units[1][quad] << 4);
    } else {
        for (int row = 0; row < 4; row++) {
            Words low = {};
            for (int field = 0; field < 4; field++) {
                low |= (units[field % 2][row + field / 2 * 4] & 0x03030303u) << (2 * field);
            }
            store(p + 64 * row, low);
        }
        for (int row = 0; row < 2 && bits == 3; row++) {
            Words high = {};
            for (int field = 0; field < 8; field++) {
                high |= ((units[field % 2][row + field / 2 * 2] >> 2) & 0x01010101u) << field;
            }
            store(p + 256 + 64 * row, high);
        }
    }
}

// Quantizes and packs x[inner][outer], 32 x 32 numbers: 128 * bits bytes, 32 scales, 32 zeros or none. A group with a
// number that is not finite has scale NaN, zero and codes 0.
void quantize_tile(const float (*x)[BLOCK], const TensorSpec& spec, uint8_t* tile, Half* scales, Half* zeros) {
    for (int sub = 0; sub < SUBS; sub++) {
        Words units[2][8];
        for (int half = 0; half < 2; half++) {
            int outer = half * 16 + sub * LANES;
            Floats column[BLOCK];
            Ints finite = Ints{} - 1;
            for (int i = 0; i < BLOCK; i++) finite &= is_finite(load_floats(&x[i][outer]));
            for (int i = 0; i < BLOCK; i++) column[i] = finite ? load_floats(&x[i][outer]) : Floats{};
            Quantized q;
            if (spec.mode == SYMMETRIC) quantize_symmetric(column, spec, q);
            if (spec.mode == ASYMMETRIC) quantize_asymmetric(column, spec, q);
            if (spec.mode == HYBRID) quantize_hybrid(column, spec, q);
            HalfWords narrow = low_halves((Words)finite);
            store(scales + outer, (q.scale & narrow) | (HALF_NAN & ~narrow));
            if (zeros) store(zeros + outer, q.zero & narrow);
            for (int quad = 0; quad < 8; quad++) {
                const Words* c = q.codes + 4 * quad;
                units[half][quad] = (c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24) & (Words)finite;
            }
        }
        pack(units, spec.bits, tile + sub * VB);
    }
}

// New tokens of one tensor, [B, H, M, D] with the last axis contiguous; strides in elements.
template <class T> struct NewTokens {
    const T* data;
    int64_t stride_b, stride_h, stride_m;
    const T* at(int64_t b, int64_t h, int64_t m) const { return data + b * stride_b + h * stride_h + m * stride_m; }
};

template <class T> struct Append {
    const Geometry& g;
    const Buffers& buffers;
    NewTokens<T> tokens[2];
    int64_t num_new;

    int64_t num_flushes(const Row& row) const {
        int64_t held = std::max<int64_t>(row.slots + num_new - row.pads, 0);
        return std::max<int64_t>(held - g.sink - row.quantized - g.recent, 0) / g.flush;
    }

    // Blocks of a row that really leave: the new tokens bound them, and so does the buffer.
    int64_t leaving_blocks(const Row& row) const {
        int64_t most = (num_new + g.flush - 1) / g.flush;
        int64_t blocks = std::min(num_flushes(row), most) * g.flush / BLOCK;
        return std::max<int64_t>(std::min(blocks, g.blocks - row.quantized / BLOCK), 0);
    }

    T* window(int side, int64_t b, int64_t h) const {
        void* data = side ? buffers.v_window : buffers.k_window;
        return static_cast<T*>(data) + (b * g.heads + h) * (g.sink + g.recent + g.flush) * g.head_dim;
    }

    // A token that leaves the window: from the window where it already lies there, else from the new ones.
    const T* leaving(int side, const Row& row, int64_t b, int64_t h, int64_t token) const {
        if (token < row.held) return window(side, b, h) + window_slot(g, token) * g.head_dim;
        return tokens[side].at(b, h, token + row.pads - row.slots);
    }

    bool changes_keys() const { return g.runtime_center || g.runtime_norm; }

    // Center and norm of every channel from all tokens behind the sink when the first block leaves: c = (lo + hi) / 2
    // and n = max |k|, its RoPE partner's if that is larger, or the root of it (quant.py's key_center_and_norm).
    void fix_center_and_norm(int64_t b, int64_t h) const {
        Row row(buffers, b);
        if (row.quantized != 0 || leaving_blocks(row) == 0) return;
        int64_t count = row.slots + num_new - row.pads - g.sink, dim = g.head_dim;
        float* center = buffers.key_center + (b * g.heads + h) * dim;
        float* norm = buffers.key_norm + (b * g.heads + h) * dim;
        alignas(VB) float low[MAX_HEAD_DIM], high[MAX_HEAD_DIM];
        std::fill(low, low + dim, INFINITY);
        std::fill(high, high + dim, -INFINITY);
        for (int64_t i = 0; i < count; i++) {
            const T* key = leaving(0, row, b, h, g.sink + i);
            for (int64_t d = 0; d < dim; d += LANES) {
                Floats k = load_floats(key + d);
                Ints finite = is_finite(k);
                store(low + d, min(finite ? k : broadcast(INFINITY), load_floats(low + d)));
                store(high + d, max(finite ? k : broadcast(-INFINITY), load_floats(high + d)));
            }
        }
        for (int64_t d = 0; d < dim; d++) {
            if (low[d] > high[d]) low[d] = high[d] = 0;  // no finite number at all
            center[d] = g.runtime_center && count >= g.center_min_tokens ? 0.5f * low[d] + 0.5f * high[d] : 0;
        }
        for (int64_t d = 0; d < dim; d++) {
            int64_t partner = g.rope_pairs == ADJACENT ? d ^ 1 : g.rope_pairs == HALF_APART ? (d + dim / 2) % dim : d;
            float largest = std::max({high[d], -low[d], high[partner], -low[partner]});
            float n = g.norm_is_root ? std::sqrt(largest) : largest;
            norm[d] = g.runtime_norm ? std::max(n, KEY_NORM_EPS) : 1;
        }
    }

    void quantize_keys(const Row& row, int64_t b, int64_t h, int64_t index) const {
        int64_t head = b * g.heads + h, first = g.sink + row.quantized + index * BLOCK;
        BlockPointers p = block_pointers(g, buffers, 0, head, row.quantized / BLOCK + index);
        const float *center = buffers.key_center + head * g.head_dim, *norm = buffers.key_norm + head * g.head_dim;
        for (int64_t tile = 0; tile < g.head_dim / BLOCK; tile++) {
            alignas(VB) float x[BLOCK][BLOCK];
            for (int t = 0; t < BLOCK; t++) {
                const T* key = leaving(0, row, b, h, first + t) + tile * BLOCK;
                for (int c = 0; c < BLOCK; c += LANES) {
                    Floats k = load_floats(key + c);
                    int64_t d = tile * BLOCK + c;
                    if (changes_keys()) k = (k - load_floats(center + d)) / load_floats(norm + d);
                    for (int i = 0; i < LANES; i++) x[c + i][t] = k[i];
                }
            }
            quantize_tile(x, g.key, p.codes + tile * 128 * g.key.bits, p.scales + tile * BLOCK,
                          p.zeros ? p.zeros + tile * BLOCK : nullptr);
        }
    }

    void quantize_values(const Row& row, int64_t b, int64_t h, int64_t index) const {
        int64_t head = b * g.heads + h, first = g.sink + row.quantized + index * BLOCK;
        BlockPointers p = block_pointers(g, buffers, 1, head, row.quantized / BLOCK + index);
        for (int64_t tile = 0; tile < g.head_dim / BLOCK; tile++) {
            alignas(VB) float x[BLOCK][BLOCK];
            for (int t = 0; t < BLOCK; t++) {
                const T* value = leaving(1, row, b, h, first + t) + tile * BLOCK;
                for (int c = 0; c < BLOCK; c += LANES) store(&x[t][c], load_floats(value + c));
            }
            quantize_tile(x, g.value, p.codes + tile * 128 * g.value.bits, p.scales + tile * BLOCK,
                          p.zeros ? p.zeros + tile * BLOCK : nullptr);
        }
    }

    // Every window slot takes the newest new token that belongs there.
    void write_windows(int64_t b, int64_t h) const {
        Row row(buffers, b);
        int64_t held = std::max<int64_t>(row.slots + num_new - row.pads, 0);
        int64_t ring_first = std::max(held - (g.recent + g.flush), g.sink);
        for (int side = 0; side < 2; side++) {
            T* slots = window(side, b, h);
            for (int64_t token = row.held; token < held; token++) {
                if (token >= g.sink && token < ring_first) {
                    token = ring_first - 1;
                    continue;
                }
                std::memcpy(slots + window_slot(g, token) * g.head_dim,
                            tokens[side].at(b, h, token + row.pads - row.slots), g.head_dim * sizeof(T));
            }
        }
    }

    void run(int64_t threads) const {
        int64_t most_blocks = 0, heads = g.batch * g.heads;
        bool first = false;
        for (int64_t b = 0; b < g.batch; b++) {
            Row row(buffers, b);
            int64_t blocks = leaving_blocks(row);
            most_blocks = std::max(most_blocks, blocks);
            first |= row.quantized == 0 && blocks > 0;
        }
        if (first && changes_keys()) {
            parallel_for(threads, heads, [&](int64_t i) { fix_center_and_norm(i / g.heads, i % g.heads); });
        }
        if (most_blocks > 0) {
            parallel_for(threads, heads * most_blocks, [&](int64_t i) {
                int64_t head = i / most_blocks, b = head / g.heads, h = head % g.heads, index = i % most_blocks;
                Row row(buffers, b);
                if (index >= leaving_blocks(row)) return;
                quantize_keys(row, b, h, index);
                quantize_values(row, b, h, index);
            });
        }
        // A decode step copies a few hundred bytes per head: less work than waking a thread.
        parallel_for(num_new < BLOCK ? 1 : threads, heads, [&](int64_t i) { write_windows(i / g.heads, i % g.heads); });
        for (int64_t b = 0; b < g.batch; b++) {
            Row row(buffers, b);
            buffers.counts[3 * b + 1] += num_flushes(row) * g.flush;
            buffers.counts[3 * b] += num_new;
        }
    }
};

// Keys and values [B, H, capacity, D] of one head; slots without a token are 0.
template <class T> struct Dequantize {
    const Geometry& g;
    const Buffers& buffers;
    T* out[2];
    int64_t capacity;

    T* slot(int side, int64_t head, int64_t index) const {
        return out[side] + (head * capacity + index) * g.head_dim;
    }

    void block(int side, int64_t head, int64_t index, int64_t first_slot) const {
        const TensorSpec& spec = side ? g.value : g.key;
        BlockPointers p = block_pointers(g, buffers, side, head, index);
        int64_t count = std::min<int64_t>(BLOCK, capacity - first_slot);
        const float *center = buffers.key_center + head * g.head_dim, *norm = buffers.key_norm + head * g.head_dim;
        for (int64_t tile = 0; tile < g.head_dim / BLOCK; tile++) {
            alignas(VB) float x[BLOCK][BLOCK], row[BLOCK];
            dequantize_tile_for(spec)(spec, p.codes + tile * 128 * spec.bits, p.scales + tile * BLOCK,
                                      p.zeros ? p.zeros + tile * BLOCK : nullptr, x);
            for (int t = 0; t < count; t++) {
                for (int c = 0; c < BLOCK && !side; c++) {
                    row[c] = x[c][t] * norm[tile * BLOCK + c] + center[tile * BLOCK + c];
                }
                T* to = slot(side, head, first_slot + t) + tile * BLOCK;
                for (int c = 0; c < BLOCK; c += LANES) store_floats(to + c, load_floats(side ? &x[t][c] : row + c));
            }
        }
    }

    void head(int side, int64_t head) const {
        Row row(buffers, head / g.heads);
        int64_t window_size = g.sink + g.recent + g.flush, size = g.head_dim * (int64_t)sizeof(T);
        const char* window = (const char*)(side ? buffers.v_window : buffers.k_window) + head * window_size * size;
        int64_t end = std::min(std::max(row.slots, row.pads), capacity), begin = std::min(row.pads, end);
        int64_t packed = std::min(row.quantized, g.blocks * BLOCK);
        std::memset(slot(side, head, 0), 0, begin * size);
        std::memset(slot(side, head, end), 0, (capacity - end) * size);
        for (int64_t s = begin; s < end;) {
            int64_t middle = s - row.pads - g.sink;
            if (middle >= 0 && middle < packed) {
                block(side, head, middle / BLOCK, s);
                s += BLOCK;
            } else {
                std::memcpy(slot(side, head, s), window + window_slot(g, s - row.pads) * size, size);
                s++;
            }
        }
    }

    void run(int64_t threads) const {
        parallel_for(threads, 2 * g.batch * g.heads, [&](int64_t i) { head(i % 2, i / 2); });
    }
};

template <class T> void append(const Geometry& g, const AppendRequest& r) {
    const int64_t *k = r.key_strides, *v = r.value_strides;
    NewTokens<T> tokens[2] = {{static_cast<const T*>(r.key), k[0], k[1], k[2]},
                              {static_cast<const T*>(r.value), v[0], v[1], v[2]}};
    Append<T>{g, r.buffers, {tokens[0], tokens[1]}, r.num_new}.run(r.threads);
}

template <class T> void dequantize(const Geometry& g, const DequantizeRequest& r) {
    Dequantize<T>{g, r.buffers, {static_cast<T*>(r.keys), static_cast<T*>(r.values)}, r.capacity}.run(r.threads);
}

}  // namespace

bool append_kv(const Geometry& g, const AppendRequest& r) {
    for (int64_t row = 0; row < g.batch; row++) {
        if (r.buffers.counts[3 * row] + r.num_new > r.capacity) return false;
    }
    if (g.dtype == FLOAT32) append<float>(g, r);
    if (g.dtype == BFLOAT16) append<BFloat>(g, r);
    if (g.dtype == FLOAT16) append<Half>(g, r);
    return true;
}

void dequantize_kv(const Geometry& g, const DequantizeRequest& r) {
    if (g.dtype == FLOAT32) dequantize<float>(g, r);
    if (g.dtype == BFLOAT16) dequantize<BFloat>(g, r);
    if (g.dtype == FLOAT16) dequantize<Half>(g, r);
}

const char* instruction_set() {
#if defined(INNERQ_AVX512) && defined(__GFNI__)
    return "AVX-512 VNNI and GFNI";
#elif defined(INNERQ_AVX512)
    return "AVX-512 VNNI";
#elif defined(INNERQ_AVX2) && defined(__AVXVNNI__)
    return "AVX-VNNI";
#elif defined(INNERQ_AVX2)
    return "AVX2";
#elif defined(INNERQ_ARM) && defined(__ARM_FEATURE_MATMUL_INT8)
    return "Arm NEON with 8-bit matrices";
#elif defined(INNERQ_ARM)
    return "Arm NEON with dot products";
#else
    return "any CPU (no vector instructions that are known here)";
#endif
}

}  // namespace innerq
