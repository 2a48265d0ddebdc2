// 3 x 3 convolutions with stride 1 and padding 1 of images so small that a whole one stays in registers: 4 x 4 and
// 2 x 2 pixels, as in the last layers of networks for 32 x 32 images. The entries of a row are ordered by tap, and each
// tap has code for the pixels that it reaches, so the padding costs nothing: 4/9 of the work on 2 x 2 pixels, 25/36 on
// 4 x 4.
// Included by kernels.inl.

// What tap (DY, DX), counted from the centre, adds to image row a, column b, group v: column b * V + v of an array.
template <int H, int W, int V, int DY, int DX>
struct Reach {
    static constexpr bool valid(int a, int column) {
        const int b = column / V + DX;
        return a + DY >= 0 && a + DY < H && b >= 0 && b < W;
    }
    static constexpr ptrdiff_t offset(int a, int column) {
        return ((a + DY) * W * V + column + DX * V) * ptrdiff_t(sizeof(Vec));
    }
};

template <int H, int W, int V, int TAP>
inline __attribute__((always_inline)) void whole_tile_tap(Vec (&acc)[H][W * V], const TileArgs& t, const int32_t* ptr) {
    using R = Reach<H, W, V, TAP / 3 - 1, TAP % 3 - 1>;
    const int32_t end = ptr[TAP + 1];
    for (int32_t j = ptr[TAP]; j < end; ++j) {
        const char* source = t.source + t.offset[j];
        const float value = t.value[j];
        GRANET_UNROLL
        for (int a = 0; a < H; ++a)
            GRANET_UNROLL
            for (int b = 0; b < W * V; ++b)
                if (R::valid(a, b)) acc[a][b] += value * *(const Vec*)(source + R::offset(a, b));
    }
    if constexpr (TAP + 1 < WHOLE_TAPS) whole_tile_tap<H, W, V, TAP + 1>(acc, t, ptr);
}

template <int H, int W, int V>
void whole_tile(const TileArgs& args) {
    const TileArgs t = args;
    char* out = t.out;
    for (int64_t row = 0; row < t.rows; ++row, out += t.out_row) {
        Vec acc[H][W * V];
        const float start = t.bias ? t.bias[row] : 0.0f;
        GRANET_UNROLL
        for (int a = 0; a < H; ++a)
            GRANET_UNROLL
            for (int b = 0; b < W * V; ++b)
                acc[a][b] = t.accumulate ? *(const Vec*)(out + a * t.out_pitch + b * t.out_step) : start - Vec{};
        whole_tile_tap<H, W, V, 0>(acc, t, t.ptr + row * WHOLE_TAPS);
        GRANET_UNROLL
        for (int a = 0; a < H; ++a)
            GRANET_UNROLL
            for (int b = 0; b < W * V; ++b) *(Vec*)(out + a * t.out_pitch + b * t.out_step) = acc[a][b];
    }
}

template <int H, int W, int V, int TAP, int N>
inline __attribute__((always_inline)) void whole_dot_group(const Vec (&g)[H][W * V], const DotArgs& t, int32_t j) {
    using R = Reach<H, W, V, TAP / 3 - 1, TAP % 3 - 1>;
    Vec acc[N];
    const char* source[N];
    GRANET_UNROLL
    for (int k = 0; k < N; ++k) {
        acc[k] = Vec{};
        source[k] = t.source + t.offset[j + k];
    }
    GRANET_UNROLL
    for (int a = 0; a < H; ++a)
        GRANET_UNROLL
        for (int b = 0; b < W * V; ++b)
            GRANET_UNROLL
            for (int k = 0; k < N; ++k)
                if (R::valid(a, b)) acc[k] += g[a][b] * *(const Vec*)(source[k] + R::offset(a, b));
    add_sums<N>(acc, t.sum + j);
}

template <int H, int W, int V, int TAP>
inline __attribute__((always_inline)) void whole_dot_tap(const Vec (&g)[H][W * V], const DotArgs& t,
                                                         const int32_t* ptr) {
    int32_t j = ptr[TAP];
    const int32_t end = ptr[TAP + 1];
    for (; j + 4 <= end; j += 4) whole_dot_group<H, W, V, TAP, 4>(g, t, j);
    for (; j < end; ++j) whole_dot_group<H, W, V, TAP, 1>(g, t, j);
    if constexpr (TAP + 1 < WHOLE_TAPS) whole_dot_tap<H, W, V, TAP + 1>(g, t, ptr);
}

template <int H, int W, int V>
void whole_dot(const DotArgs& args) {
    const DotArgs t = args;
    for (int64_t row = 0; row < t.rows; ++row) {
        const int32_t* ptr = t.ptr + row * WHOLE_TAPS;
        if (ptr[0] == ptr[WHOLE_TAPS]) continue;
        Vec g[H][W * V];
        GRANET_UNROLL
        for (int a = 0; a < H; ++a)
            GRANET_UNROLL
            for (int b = 0; b < W * V; ++b)
                g[a][b] = *(const Vec*)(t.gradient + row * t.gradient_row + a * t.gradient_pitch +
                                        b * ptrdiff_t(sizeof(Vec)));
        whole_dot_tap<H, W, V, 0>(g, t, ptr);
    }
}

template <int SIDE, int V>
WholeKernel whole_kernel() {
    WholeKernel kernel{SIDE, V, nullptr, nullptr};
    if constexpr (SIDE * SIDE * V <= MAX_TILE) kernel.tile = whole_tile<SIDE, SIDE, V>;
    if constexpr (SIDE * SIDE * V <= MAX_DOT) kernel.dot = whole_dot<SIDE, SIDE, V>;
    return kernel;
}
