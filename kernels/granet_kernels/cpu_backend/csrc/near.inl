// 3 x 3 convolutions on the panels of near_panel.h: a vector holds pixels of a row, and a mask takes away those that a
// tap would read beyond its ends.
// Included by kernels.inl.

template <int TW>
struct NearMasks {
    LaneMask left, right;

    explicit NearMasks(const Tap& tap) : left(TW == 1 ? tap.alone : tap.left), right(tap.right) {}
    Vec load(const char* from, int b) const {
        if (b == 0 || b == TW - 1) return load_masked((const float*)from, b == 0 ? left : right);
        return *(const Vec*)from;
    }
};

inline void prefetch_part(const char* ahead, int64_t step, int64_t part) {
    for (int64_t i = 0; i < step; i += 64) __builtin_prefetch(ahead + part * step + i, 0, 2);
}

template <int TH, int TW>
void near_tile(const TileArgs& args) {
    constexpr ptrdiff_t step = sizeof(Vec);
    const TileArgs t = args;
    for (int64_t i = 0; i < t.rows; ++i) {
        const int64_t row = row_at(t.order, i);
        char* out = t.out + row * t.out_row;
        prefetch_part(t.ahead, t.ahead_step, i);
        Vec acc[TH][TW];
        const float start = t.bias ? t.bias[row] : 0.0f;
        GRANET_UNROLL
        for (int a = 0; a < TH; ++a)
            GRANET_UNROLL
            for (int b = 0; b < TW; ++b)
                acc[a][b] = t.accumulate ? *(const Vec*)(out + (a * TW + b) * step) : start - Vec{};
        const int32_t end = t.ptr[row + 1];
        for (int32_t j = t.ptr[row]; j < end; ++j) {
            const Tap& tap = t.taps[t.offset[j] & (TAP_UNIT - 1)];
            const char* source = t.source + (t.offset[j] + tap.shift);
            const NearMasks<TW> mask(tap);
            const float value = t.value[j];
            GRANET_UNROLL
            for (int a = 0; a < TH; ++a)
                GRANET_UNROLL
                for (int b = 0; b < TW; ++b)
                    acc[a][b] += value * mask.load(source + (a * TW + b) * step, b);
        }
        GRANET_UNROLL
        for (int a = 0; a < TH; ++a)
            GRANET_UNROLL
            for (int b = 0; b < TW; ++b) *(Vec*)(out + (a * TW + b) * step) = acc[a][b];
    }
}

template <int TH, int TW, int N>
inline __attribute__((always_inline)) void near_dot_group(const Vec (&g)[TH][TW], const DotArgs& t, int32_t j) {
    constexpr ptrdiff_t step = sizeof(Vec);
    Vec acc[N];
    GRANET_UNROLL
    for (int k = 0; k < N; ++k) {
        const Tap& tap = t.taps[t.offset[j + k] & (TAP_UNIT - 1)];
        const char* source = t.source + (t.offset[j + k] + tap.shift);
        const NearMasks<TW> mask(tap);
        Vec sum[2] = {};  // two chains of additions, to hide the latency of one
        GRANET_UNROLL
        for (int a = 0; a < TH; ++a)
            GRANET_UNROLL
            for (int b = 0; b < TW; ++b)
                sum[a % 2] += g[a][b] * mask.load(source + (a * TW + b) * step, b);
        acc[k] = sum[0] + sum[1];
    }
    add_sums<N>(acc, t.sum + j);
}

template <int TH, int TW>
void near_dot(const DotArgs& args) {
    constexpr ptrdiff_t step = sizeof(Vec);
    const DotArgs t = args;
    for (int64_t i = 0; i < t.rows; ++i) {
        const int64_t row = row_at(t.order, i);
        int32_t j = t.ptr[row];
        const int32_t end = t.ptr[row + 1];
        prefetch_part(t.ahead, t.ahead_step, i);
        if (j == end) continue;
        Vec g[TH][TW];
        GRANET_UNROLL
        for (int a = 0; a < TH; ++a)
            GRANET_UNROLL
            for (int b = 0; b < TW; ++b)
                g[a][b] = *(const Vec*)(t.gradient + row * t.gradient_row + (a * TW + b) * step);
        for (; j + 4 <= end; j += 4) near_dot_group<TH, TW, 4>(g, t, j);
        for (; j < end; ++j) near_dot_group<TH, TW, 1>(g, t, j);
    }
}
