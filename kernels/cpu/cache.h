// What the kernels share: where a token, a block and its codes lie, and the loop over work items.
//
// BLOCK x BLOCK tiles (innerq_compile/layout.py), group_size 32 only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace innerq {

constexpr int BLOCK = 32;
constexpr int MAX_HEAD_DIM = 512;  // settings.py lets none larger through
constexpr int SUBS = 16 / LANES;  // vectors in a 64-byte unit of a tile

// One row's counts. Tokens 0 .. held-1; token t sits in slot t + pads; tokens sink .. sink+quantized-1 are packed.
struct Row {
    int64_t slots, quantized, pads, held;
    Row(const Buffers& b, int64_t row) {
        const int64_t* counts = b.counts + 3 * row;
        slots = counts[0], quantized = counts[1], pads = counts[2];
        held = std::max<int64_t>(slots - pads, 0);
    }
};

inline int64_t window_slot(const Geometry& g, int64_t token) {
    return token < g.sink ? token : g.sink + (token - g.sink) % (g.recent + g.flush);
}

// Codes, scales and zeros of one block of one head. `side` is 0 for keys, 1 for values; both look alike: scales of a
// tile's outer rows are 32 consecutive halves.
struct BlockPointers {
    uint8_t* codes;
    Half* scales;
    Half* zeros;
};

inline BlockPointers block_pointers(const Geometry& g, const Buffers& b, int side, int64_t head, int64_t block) {
    const TensorSpec& spec = side ? g.value : g.key;
    int64_t index = (head * g.blocks + block) * g.head_dim;
    Half* zeros = side ? b.v_zeros : b.k_zeros;
    return {(side ? b.v_codes : b.k_codes) + index * 4 * spec.bits, (side ? b.v_scales : b.k_scales) + index,
            spec.mode == SYMMETRIC ? nullptr : zeros + index};
}

// Four codes per lane: inner quad `quad` of the 16 outer rows of `half`, LANES of them from row LANES * sub on.
template <int BITS> INNERQ_INLINE Words unpack(const uint8_t* tile, int quad, int half, int sub) {
    const uint8_t* p = tile + sub * VB;
    if (BITS == 8) return load<Words>(p + 64 * (2 * quad + half));
    if (BITS == 4) return (load<Words>(p + 64 * quad) >> (4 * half)) & 0x0f0f0f0fu;
    Words low = (load<Words>(p + 64 * (quad % 4)) >> (2 * (quad / 4 * 2 + half))) & 0x03030303u;
    if (BITS == 2) return low;
    Words high = (load<Words>(p + 256 + 64 * (quad % 2)) >> (quad / 2 * 2 + half)) & 0x01010101u;
    return low | high << 2;
}

// x[inner][outer] of one tile, s * (u - c0) + z rounded as the reference rounds it (build without contraction).
// Static: the two source files are built with different rounding rules and must not share one instance.
template <int BITS>
static void dequantize_tile(const TensorSpec& spec, const uint8_t* tile, const Half* scales, const Half* zeros,
                     float (*x)[BLOCK]) {
    for (int half = 0; half < 2; half++) {
        for (int sub = 0; sub < SUBS; sub++) {
            int outer = half * 16 + sub * LANES;
            Floats s = load_floats(scales + outer), z = {}, center = broadcast(spec.symmetric_center);
            if (zeros) {
                z = load_floats(zeros + outer);
                center = spec.mode == ASYMMETRIC ? Floats{} : (Ints)s < 0 ? Floats{} : center;
                s = spec.mode == HYBRID ? abs(s) : s;
            }
            for (int quad = 0; quad < 8; quad++) {
                Words codes = unpack<BITS>(tile, quad, half, sub);
                for (int j = 0; j < 4; j++) {
                    Floats value = s * (to_floats((Ints)(codes >> (8 * j) & 0xffu)) - center);
                    if (zeros) value = value + z;
                    store(&x[4 * quad + j][outer], value);
                }
            }
        }
    }
}

using DequantizeTile = void (*)(const TensorSpec&, const uint8_t*, const Half*, const Half*, float (*)[BLOCK]);

[[maybe_unused]] static DequantizeTile dequantize_tile_for(const TensorSpec& spec) {
    return spec.bits == 2   ? dequantize_tile<2>
           : spec.bits == 3 ? dequantize_tile<3>
           : spec.bits == 4 ? dequantize_tile<4>
                            : dequantize_tile<8>;
}

// Runs body(item) for every item on up to `threads` threads. Each thread takes a contiguous run of items, because they
// lie side by side in memory, and then helps the others. Which thread takes an item does not change a result.
template <class Body> void parallel_for(int64_t threads, int64_t items, const Body& body) {
    constexpr int64_t MAX_THREADS = 256;
    struct alignas(64) Run {
        std::atomic<int64_t> next;
        int64_t end;
    };
    struct Job {
        const Body& body;
        int64_t threads;
        std::atomic<int64_t> started;
        Run runs[MAX_THREADS];
    };
    // Starting a thread costs as much as a few items.
    int64_t most = omp_parallel ? items : items / 4;
    threads = std::clamp<int64_t>(threads, 1, std::max<int64_t>(std::min(most, MAX_THREADS), 1));
    if (threads <= 1) {
        for (int64_t i = 0; i < items; i++) body(i);
        return;
    }
    Job job{body, threads, {0}, {}};
    for (int64_t t = 0; t < threads; t++) {
        job.runs[t].next = items * t / threads;
        job.runs[t].end = items * (t + 1) / threads;
    }
    auto work = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        int64_t self = job.started.fetch_add(1, std::memory_order_relaxed);
        for (int64_t t = 0; t < job.threads; t++) {
            Run& run = job.runs[(self + t) % job.threads];
            for (int64_t i; (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;) job.body(i);
        }
    };
    if (omp_parallel) return omp_parallel(work, &job, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> started;
    for (int64_t t = 1; t < threads; t++) started.emplace_back(static_cast<void (*)(void*)>(work), &job);
    work(&job);
    for (std::thread& thread : started) thread.join();
}

}  // namespace innerq
