// What ops.cpp asks of the kernels: a cache's settings and buffers, and one request per op. No torch, no vectors.
//
// Letters: B rows, H key-value heads, D head_dim, N quantized tokens, M new or query tokens. The layout of every
// buffer is described in innerq_compile/layout.py. Strides are in elements.
#pragma once

#include <cstdint>

#define INNERQ_EXPORT __attribute__((visibility("default")))

namespace innerq {

// In the order of config.py's MODES and ROPE_PAIRS.
enum Mode : int32_t { SYMMETRIC, ASYMMETRIC, HYBRID };
enum RopePairs : int32_t { HALF_APART, ADJACENT, NO_PAIRS };
enum DType : int32_t { FLOAT32, BFLOAT16, FLOAT16, OTHER_DTYPE };  // in the order of settings.py's DTYPES

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

extern "C" {
// settings.py writes these two.
struct TensorSpec {
    int32_t bits, mode, symmetric_max_code, asymmetric_max_code;
    float symmetric_center, symmetric_span;
};
struct Settings {
    int64_t sink, recent, flush, center_min_tokens;
    int32_t runtime_center, runtime_norm, norm_is_root, rope_pairs;
    TensorSpec key, value;
};
}

struct Geometry : Settings {
    int64_t batch, heads, head_dim, blocks;
    DType dtype;  // of the windows
};

// In the order of layout.py's LayerState.
struct Buffers {
    uint8_t* k_codes;
    Half* k_scales;
    Half* k_zeros;
    void* k_window;
    uint8_t* v_codes;
    Half* v_scales;
    Half* v_zeros;
    void* v_window;
    float* key_norm;
    float* key_center;
    int64_t* counts;
};

struct AppendRequest {
    Buffers buffers;
    const void *key, *value;  // [B, H, num_new, D] in the windows' dtype, last axis contiguous
    const int64_t *key_strides, *value_strides;
    int64_t num_new, capacity, threads;
};

struct DequantizeRequest {
    Buffers buffers;
    void *keys, *values;  // contiguous [B, H, capacity, D] in the windows' dtype
    int64_t capacity, threads;
};

enum MaskKind : int64_t { CAUSAL, BOOLEAN, ADDITIVE };

struct AttentionRequest {
    Buffers buffers;
    const void* query;  // [B, Hq, M, D] in the windows' dtype, last axis contiguous
    void* out;          // the same shape, contiguous
    const void* mask;   // bool or float32, broadcast to [B, Hq, M, capacity] by strides of 0; null if CAUSAL
    const int64_t *query_strides, *mask_strides;
    int64_t q_heads, q_len, mask_kind, capacity, exact, threads;
    double sm_scale;
};

// False, with nothing written, when a row would exceed the capacity.
bool append_kv(const Geometry&, const AppendRequest&);
void dequantize_kv(const Geometry&, const DequantizeRequest&);
void decode_attention(const Geometry&, const AttentionRequest&);

// What the kernels were compiled for, in words.
const char* instruction_set();

// The OpenMP runtime that torch itself runs on, so that a process never has two; null: threads that a call starts.
using OmpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline OmpParallel omp_parallel = nullptr;

}  // namespace innerq
