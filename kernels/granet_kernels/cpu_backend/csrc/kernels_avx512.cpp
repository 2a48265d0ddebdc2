// AVX-512: 16 floats a vector, 32 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace granet {
namespace {

constexpr bool STREAMS = true;
constexpr int LANES = 16, MAX_TILE = 28, MAX_DOT = 24, MAX_PAIR = 8, SHARED = 4;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(64)));

inline __attribute__((always_inline)) void transpose(const float* in, ptrdiff_t stride, int rows, int columns,
                                                     Vec (&out)[LANES]) {
    const __mmask16 mask = __mmask16((1u << columns) - 1);
    __m512 r[16], t[16];
    for (int i = 0; i < 16; i += 4) {  // in fours, so that few registers hold the addresses
        const float* row = in + i * stride;
#if defined(__GNUC__)
        asm("" : "+r"(row));
#endif
        for (int k = 0; k < 4; ++k)
            r[i + k] = i + k < rows ? _mm512_maskz_loadu_ps(mask, row + k * stride) : _mm512_setzero_ps();
    }
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int k = 0; k < 2; ++k) {
            const __m512d low = _mm512_castps_pd(t[i + k]), high = _mm512_castps_pd(t[i + k + 2]);
            r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int k = 0; k < 4; ++k) {
        t[k] = _mm512_shuffle_f32x4(r[k], r[k + 4], 0x88);
        t[k + 4] = _mm512_shuffle_f32x4(r[k], r[k + 4], 0xdd);
        t[k + 8] = _mm512_shuffle_f32x4(r[k + 8], r[k + 12], 0x88);
        t[k + 12] = _mm512_shuffle_f32x4(r[k + 8], r[k + 12], 0xdd);
    }
    for (int k = 0; k < 8; ++k) {
        out[k] = (Vec)_mm512_shuffle_f32x4(t[k], t[k + 8], 0x88);
        out[k + 8] = (Vec)_mm512_shuffle_f32x4(t[k], t[k + 8], 0xdd);
    }
}

inline void store_first(Vec vector, float* out, int count) {
    _mm512_mask_storeu_ps(out, __mmask16((1u << count) - 1), (__m512)vector);
}

inline Vec load_first(const float* from, int count) {
    return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}

inline void store_past_cache(Vec vector, float* out) { _mm512_stream_ps(out, (__m512)vector); }
void fence() { _mm_sfence(); }

inline IntVec load_bytes(const unsigned char* from) {
    return (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}
inline void store_bytes(IntVec vector, unsigned char* to) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)vector));
}

inline void keep(Vec& vector) { asm("" : "+v"(vector)); }

inline Vec fused(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline void split_pairs(Vec a, Vec b, Vec& even, Vec& odd) {
    const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = (Vec)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
    odd = (Vec)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(first, _mm512_set1_epi32(1)), (__m512)b);
}

inline void join_pairs(Vec even, Vec odd, Vec& a, Vec& b) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    a = (Vec)_mm512_permutex2var_ps((__m512)even, first, (__m512)odd);
    b = (Vec)_mm512_permutex2var_ps((__m512)even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), (__m512)odd);
}

inline Four sums4(Vec va, Vec vb, Vec vc, Vec vd) {
    const __m512 a = (__m512)va, b = (__m512)vb, c = (__m512)vc, d = (__m512)vd;
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    return (Four)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline Vec load_masked(const float* from, LaneMask mask) { return (Vec)_mm512_maskz_loadu_ps(mask, from); }

#define GRANET_LANE_MASKS
#include "kernels.inl"
#undef GRANET_LANE_MASKS

}  // namespace

const KernelSet& kernels_avx512() {
    static const KernelSet set = make_set();
    return set;
}

}  // namespace granet

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
