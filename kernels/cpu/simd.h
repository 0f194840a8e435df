// The few vector operations that the kernels are written in, for one instruction set chosen by the compiler's macros.
//
// A vector has VB bytes: LANES = VB / 4 floats or 32-bit integers. Float code uses the compiler's own vector types, so
// it is the same on every machine; only the integer dot product, half floats and prefetching name instructions.
// INNERQ_PLAIN switches every intrinsic off.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if !defined(INNERQ_PLAIN) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define INNERQ_AVX512 1
#include <immintrin.h>
#elif !defined(INNERQ_PLAIN) && defined(__AVX2__) && defined(__F16C__)
#define INNERQ_AVX2 1
#include <immintrin.h>
#elif !defined(INNERQ_PLAIN) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_NEON)
#define INNERQ_ARM 1
#include <arm_neon.h>
#endif

namespace innerq {

#if defined(INNERQ_AVX512)
constexpr int VB = 64;
#elif defined(INNERQ_AVX2)
constexpr int VB = 32;
#else
constexpr int VB = 16;
#endif
constexpr int LANES = VB / 4;

typedef float Floats __attribute__((vector_size(VB)));
typedef int32_t Ints __attribute__((vector_size(VB)));
typedef uint32_t Words __attribute__((vector_size(VB)));
typedef uint16_t HalfWords __attribute__((vector_size(VB / 2)));

#define INNERQ_INLINE inline __attribute__((always_inline))

INNERQ_INLINE Floats broadcast(float x) { return x - Floats{}; }
INNERQ_INLINE Words broadcast(uint32_t x) { return x - Words{}; }

template <class V> INNERQ_INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V> INNERQ_INLINE void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

INNERQ_INLINE Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// A float in [0, 2^22), rounded half to even: its sum with ROUND = 1.5 * 2^23 has it in the low bits.
constexpr float ROUND = 12582912.0f;
constexpr uint32_t ROUND_BITS = 0x4b400000;
INNERQ_INLINE Ints round_to_ints(Floats v) { return (Ints)(v + ROUND) & 0x3fffff; }

// The low byte or half of each lane. (Left to itself the compiler moves them one by one.)
INNERQ_INLINE void store_low_bytes(int8_t* p, Ints v) {
#if defined(INNERQ_AVX512)
    store(p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(INNERQ_AVX2)
    __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                     -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i bytes = _mm256_shuffle_epi8((__m256i)v, order);
    __m128i both = _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64((__m128i*)p, both);
#else
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)v[i];
#endif
}
INNERQ_INLINE HalfWords low_halves(Words v) {
#if defined(INNERQ_AVX512)
    return (HalfWords)_mm512_cvtepi32_epi16((__m512i)v);
#else
    return __builtin_convertvector(v, HalfWords);
#endif
}

INNERQ_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
INNERQ_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
INNERQ_INLINE Floats abs(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

INNERQ_INLINE Ints is_finite(Floats v) { return (Ints)abs(v) < 0x7f800000; }
INNERQ_INLINE Ints not_below_infinity(Floats v) { return ~(v < __builtin_inff()); }  // NaN is not either

// Whether any bit of any lane is set.
INNERQ_INLINE bool any_set(Ints v) {
#if defined(INNERQ_AVX512)
    return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
#elif defined(INNERQ_AVX2)
    return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
    int32_t any = 0;
    for (int i = 0; i < LANES; i++) any |= v[i];
    return any;
#endif
}

INNERQ_INLINE float sum_lanes(Floats v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}
INNERQ_INLINE float max_lanes(Floats v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
}

INNERQ_INLINE bool any_above(Floats a, Floats b) {
#if defined(INNERQ_AVX512)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
    bool any = false;
    for (int i = 0; i < LANES; i++) any |= a[i] > b[i];
    return any;
#endif
}

#if defined(__clang__)
#define INNERQ_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INNERQ_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

struct Sum {
    template <class V> static INNERQ_INLINE V of(V a, V b) { return a + b; }
};
struct Max {
    static INNERQ_INLINE Floats of(Floats a, Floats b) { return max(a, b); }
};

// Folds COUNT vectors (LANES, or half as many) into one: lane i < COUNT becomes Op over the lanes of v[i]. Three
// instructions a vector where one reduction after the other takes eight; v is overwritten.
template <class Op, int COUNT = LANES, class V> INNERQ_INLINE V fold_lanes(V* v) {
#if defined(INNERQ_AVX512)
    int n = COUNT / 2;
    for (int i = 0; i < n; i++) {
        V a = INNERQ_SHUFFLE(v[i], v[i + n], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        V b = INNERQ_SHUFFLE(v[i], v[i + n], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        v[i] = Op::of(a, b);
    }
    n /= 2;
    for (int i = 0; i < n; i++) {
        V a = INNERQ_SHUFFLE(v[i], v[i + n], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        V b = INNERQ_SHUFFLE(v[i], v[i + n], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        v[i] = Op::of(a, b);
    }
    n /= 2;
    for (int i = 0; i < n; i++) {
        V a = INNERQ_SHUFFLE(v[i], v[i + n], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        V b = INNERQ_SHUFFLE(v[i], v[i + n], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        v[i] = Op::of(a, b);
    }
    if (COUNT == LANES / 2) {
        V a = INNERQ_SHUFFLE(v[0], v[0], 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
        V b = INNERQ_SHUFFLE(v[0], v[0], 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
        return Op::of(a, b);
    }
    V a = INNERQ_SHUFFLE(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    V b = INNERQ_SHUFFLE(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    return Op::of(a, b);
#else
    V result = {};
    for (int i = 0; i < COUNT; i++) {
        V folded = v[i];
        for (int width = LANES / 2; width > 0; width /= 2) {
            V moved = {};
            for (int j = 0; j < width; j++) moved[j] = folded[j + width];
            folded = Op::of(folded, moved);
        }
        result[i] = folded[0];
    }
    return result;
#endif
}

// --- number formats -------------------------------------------------------------------------------------------------

INNERQ_INLINE Floats load_floats(const float* p) { return load<Floats>(p); }

INNERQ_INLINE Floats load_floats(const BFloat* p) {
    return (Floats)(__builtin_convertvector(load<HalfWords>(p), Words) << 16);
}

INNERQ_INLINE Floats load_floats(const Half* p) {
#if defined(INNERQ_AVX512)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(INNERQ_AVX2)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(INNERQ_ARM)
    return (Floats)vcvt_f32_f16(vld1_f16((const __fp16*)p));
#else
    // Shifted into place the exponent is 112 too small: one exact multiplication puts that right, subnormals included.
    Words w = __builtin_convertvector(load<HalfWords>(p), Words);
    Words magnitude = (w & 0x7fffu) << 13;
    Floats finite = (Floats)magnitude * 0x1p112f;
    Words special = magnitude | 0x7f800000u;
    Words chosen = (w & 0x7c00u) == 0x7c00u ? special : (Words)finite;
    return (Floats)(chosen | (w & 0x8000u) << 16);
#endif
}

// Rounds half to even; too large a number becomes infinity.
INNERQ_INLINE HalfWords to_half(Floats v) {
#if defined(INNERQ_AVX512)
    return (HalfWords)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(INNERQ_AVX2)
    return (HalfWords)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(INNERQ_ARM)
    return (HalfWords)vcvt_f16_f32((float32x4_t)v);
#else
    Words bits = (Words)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;  // adds at 2^-24, where halves end
    Words result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= (143u << 23) ? broadcast(0x7c00u) : result;
    result = magnitude > 0x7f800000u ? broadcast(0x7e00u) : result;
    return low_halves(result | sign);
#endif
}

INNERQ_INLINE void store_floats(float* p, Floats v) { store(p, v); }
INNERQ_INLINE void store_floats(Half* p, Floats v) { store(p, to_half(v)); }
INNERQ_INLINE void store_floats(BFloat* p, Floats v) {
    Words w = (Words)v;
    Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
    rounded = (w & 0x7fffffffu) > 0x7f800000u ? broadcast(0x7fc0u) : rounded;
    store(p, low_halves(rounded));
}

// --- 2^x ------------------------------------------------------------------------------------------------------------

// 2^x for x <= 127; relative error about 1e-4 with DEGREE 3, 2e-7 with DEGREE 5 (minimax fits on an interval of length
// one). Far below the smallest normal number the result is 0. NaN gives NaN.
template <int DEGREE> INNERQ_INLINE Floats exp2(Floats x) {
#if defined(INNERQ_AVX512)
    // vscalefps multiplies by 2^floor(x), so the fraction lies in [0, 1).
    Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), p;
    if (DEGREE == 3) {
        p = 0.2260672965453973f + f * 0.07802442349160187f;
        p = 0.6958334920387789f + f * p;
        p = 0.9999252208411658f + f * p;
    } else {
        p = 0.008989342838548377f + f * 0.001877575539723325f;
        p = 0.05582631574709766f + f * p;
        p = 0.2401536178234855f + f * p;
        p = 0.6931530731100074f + f * p;
        p = 0.9999999250651368f + f * p;
    }
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    Floats whole = (x < -126.0f ? broadcast(-126.0f) : x) + ROUND;
    Floats f = x - (whole - ROUND), p;
    if (DEGREE == 3) {
        p = 0.24261111271192862f + f * 0.05517154555008292f;
        p = 0.6932610082563884f + f * p;
        p = 0.9999280747066571f + f * p;
    } else {
        p = 0.00967554122151016f + f * 0.0013276457848119994f;
        p = 0.05550713317251182f + f * p;
        p = 0.24022119726655828f + f * p;
        p = 0.6931469670379722f + f * p;
        p = 1.0000000716538178f + f * p;
    }
    Floats result = (Floats)((Ints)p + ((Ints)whole << 23));
    return x < -126.0f ? Floats{} : result;
#endif
}

// --- bit fields -----------------------------------------------------------------------------------------------------

// (x >> SHIFT) & MASK in every byte: one instruction where there is one that multiplies bytes by a bit matrix.
template <int SHIFT, unsigned MASK> INNERQ_INLINE Words byte_field(Words x) {
    constexpr uint32_t mask = MASK * 0x01010101u;
#if defined(INNERQ_AVX512) && defined(__GFNI__)
    if (SHIFT > 0) {
        uint64_t matrix = 0;  // byte 7 - i selects the source of bit i
        for (int i = 0; i < 8; i++) {
            if (MASK >> i & 1) matrix |= (uint64_t)(1u << (i + SHIFT)) << (8 * (7 - i));
        }
        return (Words)_mm512_gf2p8affine_epi64_epi8((__m512i)x, _mm512_set1_epi64((long long)matrix), 0);
    }
#endif
    return (x >> SHIFT) & mask;
}

// --- integer dot product --------------------------------------------------------------------------------------------

// Sums of unsigned codes times signed bytes: add() takes, per lane, four codes (at most 2^BITS - 1) and the same four
// signed bytes (at most 127 in magnitude) for all lanes; sums() returns the 32-bit totals. At most eight add() calls:
// where products are summed in 16 bits, 8 * 2 * 15 * 127 still fits.
template <int BITS> struct DotProduct {
#if defined(INNERQ_AVX512)
    __m512i total = _mm512_setzero_si512();
    INNERQ_INLINE void add(Words codes, int32_t four) {
        total = _mm512_dpbusd_epi32(total, (__m512i)codes, _mm512_set1_epi32(four));
    }
    INNERQ_INLINE Ints sums() const { return (Ints)total; }
#elif defined(INNERQ_AVX2) && defined(__AVXVNNI__)
    __m256i total = _mm256_setzero_si256();
    INNERQ_INLINE void add(Words codes, int32_t four) {
        total = _mm256_dpbusd_avx_epi32(total, (__m256i)codes, _mm256_set1_epi32(four));
    }
    INNERQ_INLINE Ints sums() const { return (Ints)total; }
#elif defined(INNERQ_AVX2)
    __m256i total = _mm256_setzero_si256();
    INNERQ_INLINE void add(Words codes, int32_t four) {
        __m256i u = (__m256i)codes, s = _mm256_set1_epi32(four);
        if (BITS <= 4) {
            total = _mm256_add_epi16(total, _mm256_maddubs_epi16(u, s));
            return;
        }
        __m256i s_even = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8), s_odd = _mm256_srai_epi16(s, 8);
        __m256i u_even = _mm256_and_si256(u, _mm256_set1_epi16(255)), u_odd = _mm256_srli_epi16(u, 8);
        total = _mm256_add_epi32(total, _mm256_madd_epi16(u_even, s_even));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(u_odd, s_odd));
    }
    INNERQ_INLINE Ints sums() const {
        return (Ints)(BITS <= 4 ? _mm256_madd_epi16(total, _mm256_set1_epi16(1)) : total);
    }
#elif defined(INNERQ_ARM)
    int32x4_t total = vdupq_n_s32(0);
    INNERQ_INLINE void add(Words codes, int32_t four) {
        int8x16_t s = vreinterpretq_s8_s32(vdupq_n_s32(four));
        uint8x16_t u = (uint8x16_t)codes;
#if defined(__ARM_FEATURE_MATMUL_INT8)
        total = vusdotq_s32(total, u, s);
#else
        total = vdotq_s32(total, vreinterpretq_s8_u8(BITS == 8 ? vandq_u8(u, vdupq_n_u8(127)) : u), s);
        if (BITS == 8) {
            int32x4_t high = vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(vshrq_n_u8(u, 7)), s);
            total = vaddq_s32(total, vshlq_n_s32(high, 7));
        }
#endif
    }
    INNERQ_INLINE Ints sums() const { return (Ints)total; }
#else
    typedef int16_t Shorts __attribute__((vector_size(VB)));
    Shorts total16 = {};
    Ints total = {};
    static INNERQ_INLINE Ints add_pairs(Shorts v) { return ((Ints)v << 16 >> 16) + ((Ints)v >> 16); }
    INNERQ_INLINE void add(Words codes, int32_t four) {
        Shorts s = (Shorts)broadcast((uint32_t)four);
        Shorts even = (Shorts)(codes & 0x00ff00ffu) * (s << 8 >> 8);
        Shorts odd = (Shorts)((codes >> 8) & 0x00ff00ffu) * (s >> 8);
        if (BITS <= 4) {
            total16 += even + odd;
        } else {
            total += add_pairs(even) + add_pairs(odd);
        }
    }
    INNERQ_INLINE Ints sums() const { return BITS <= 4 ? add_pairs(total16) : total; }
#endif
};

}  // namespace innerq
