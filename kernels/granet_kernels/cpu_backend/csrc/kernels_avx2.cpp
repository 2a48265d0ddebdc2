// AVX2 with FMA: 8 floats a vector, 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace granet {
namespace {

constexpr bool STREAMS = false;  // a vector is less than a cache line
constexpr int LANES = 8, MAX_TILE = 12, MAX_DOT = 8, MAX_PAIR = 4, SHARED = 2;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(32)));

inline __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline __attribute__((always_inline)) void transpose(const float* in, ptrdiff_t stride, int rows, int columns,
                                                     Vec (&out)[LANES]) {
    const __m256i mask = first(columns);
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = i < rows ? _mm256_maskload_ps(in + i * stride, mask) : _mm256_setzero_ps();
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int k = 0; k < 2; ++k) {
            r[i + 2 * k] = _mm256_shuffle_ps(t[i + k], t[i + k + 2], 0x44);
            r[i + 2 * k + 1] = _mm256_shuffle_ps(t[i + k], t[i + k + 2], 0xee);
        }
    }
    for (int k = 0; k < 4; ++k) {
        out[k] = (Vec)_mm256_permute2f128_ps(r[k], r[k + 4], 0x20);
        out[k + 4] = (Vec)_mm256_permute2f128_ps(r[k], r[k + 4], 0x31);
    }
}

inline void store_first(Vec vector, float* out, int count) { _mm256_maskstore_ps(out, first(count), (__m256)vector); }

inline Vec load_first(const float* from, int count) { return (Vec)_mm256_maskload_ps(from, first(count)); }

inline __m256 swap_middle(__m256 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); }

inline IntVec load_bytes(const unsigned char* from) {
    return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
inline void store_bytes(IntVec vector, unsigned char* to) {
    const __m256i v = (__m256i)vector;
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
}

inline void keep(Vec& vector) { asm("" : "+x"(vector)); }

inline Vec fused(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline void split_pairs(Vec a, Vec b, Vec& even, Vec& odd) {
    even = (Vec)swap_middle(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88));
    odd = (Vec)swap_middle(_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd));
}

inline void join_pairs(Vec even, Vec odd, Vec& a, Vec& b) {
    const __m256 low = _mm256_unpacklo_ps((__m256)even, (__m256)odd);
    const __m256 high = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
    a = (Vec)_mm256_permute2f128_ps(low, high, 0x20);
    b = (Vec)_mm256_permute2f128_ps(low, high, 0x31);
}

inline Four sums4(Vec va, Vec vb, Vec vc, Vec vd) {
    const __m256 a = (__m256)va, b = (__m256)vb, c = (__m256)vc, d = (__m256)vd;
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return (Four)_mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

inline void store_past_cache(Vec, float*) {}
void fence() {}

#include "kernels.inl"

}  // namespace

const KernelSet& kernels_avx2() {
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
