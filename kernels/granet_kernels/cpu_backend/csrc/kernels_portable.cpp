// Any CPU: 4 floats a vector, which compilers map to SSE2, NEON or scalar code.
#include "kernels.h"

namespace granet {
namespace {

constexpr bool STREAMS = false;  // a vector is less than a cache line
constexpr int LANES = 4, MAX_TILE = 12, MAX_DOT = 8, MAX_PAIR = 4, SHARED = 2;
typedef float Vec __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(16)));

inline void transpose(const float* in, ptrdiff_t stride, int rows, int columns, Vec (&out)[LANES]) {
    for (int p = 0; p < LANES; ++p)
        for (int i = 0; i < LANES; ++i) out[p][i] = i < rows && p < columns ? in[i * stride + p] : 0.0f;
}

inline void store_first(Vec vector, float* out, int count) {
    for (int i = 0; i < count; ++i) out[i] = vector[i];
}

inline Vec load_first(const float* from, int count) {
    Vec vector{};
    for (int i = 0; i < count; ++i) vector[i] = from[i];
    return vector;
}

inline void store_past_cache(Vec, float*) {}
void fence() {}

inline IntVec load_bytes(const unsigned char* from) { return IntVec{from[0], from[1], from[2], from[3]}; }
inline void store_bytes(IntVec vector, unsigned char* to) {
    for (int i = 0; i < LANES; ++i) to[i] = static_cast<unsigned char>(vector[i]);
}

inline void keep(Vec&) {}

template <typename T>
inline T fused(T a, T b, T c) {
    return a * b + c;
}

inline void split_pairs(Vec a, Vec b, Vec& even, Vec& odd) {
    even = Vec{a[0], a[2], b[0], b[2]};
    odd = Vec{a[1], a[3], b[1], b[3]};
}

inline void join_pairs(Vec even, Vec odd, Vec& a, Vec& b) {
    a = Vec{even[0], odd[0], even[1], odd[1]};
    b = Vec{even[2], odd[2], even[3], odd[3]};
}

inline float sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline Four sums4(Vec a, Vec b, Vec c, Vec d) { return Four{sum(a), sum(b), sum(c), sum(d)}; }

#include "kernels.inl"

}  // namespace

const KernelSet& kernels_portable() {
    static const KernelSet set = make_set();
    return set;
}

}  // namespace granet
