// The inner loops of decode attention: what tiles.cpp offers to decode_attention.cpp.
#pragma once

#include "cache.h"

namespace innerq {

// Blocks whose scores are softmaxed together: few, so that memory stays busy through it (benchmarks/LOG.md).
constexpr int CHUNK_BLOCKS = 2;
constexpr int CHUNK = CHUNK_BLOCKS * BLOCK;

// Of one query row and group: a dot product with the row's signed bytes means `scale * (sums - center * total)`, where
// `total` is the sum of the bytes; a zero adds `zero * scale * total`. The first three arrays have the same index.
struct Factors {
    const float* scale;     // float value of one integer step
    const float* centered;  // scale * symmetric_center * total
    const float* total;     // scale * total
    const float* start;     // [rows], keys only: what a score starts with
};

// Prefetching. The hardware alone loses a stream whenever the loop turns from keys to values, and memory would idle
// while a chunk is softmaxed. So each of the two streams of codes has a pointer that runs PREFETCH_AHEAD bytes or more
// ahead: a tile's dot products move it by less than a tile, the softmax by what is missing.
constexpr int PREFETCH_AHEAD = 3072;
constexpr int dot_lines(int bits) { return 2 * bits * 3 / 4; }
constexpr int softmax_lines(int bits) { return 2 * bits - dot_lines(bits); }

INNERQ_INLINE void prefetch_lines(const uint8_t* from, int count) {
    for (int i = 0; i < count; i++) __builtin_prefetch(from + 64 * i);
}

// `blocks` blocks of `tiles` tiles against a batch of query rows; fours hold four signed bytes each.
//   keys:   out[r][token] = scores       fours [tiles][rows][8]    factors [tiles][rows]    out [rows][CHUNK]
//   values: out[r][channel] += products  fours [blocks][rows][8]   factors [blocks][rows]   out [rows][32 * tiles]
using BlockLoop = void (*)(const TensorSpec&, BlockPointers, int tiles, int blocks, const int32_t* fours,
                           const Factors& factors, const uint8_t* ahead, float* out);

// rows is 1, 2, 4 or 8.
BlockLoop block_loop_for(int rows, const TensorSpec& spec, bool values);

}  // namespace innerq
