// Max-pooling of 2 x 2 pixels, one image of one channel at a time, or several of an even height, one below the other.
// Included by kernels.inl.

// Where the greatest of four is, as in torch: the first of equal ones; NaN is above all, and the last NaN wins.
inline __attribute__((always_inline)) void pool_take(Vec& best, IntVec& which, Vec value, int number) {
    const IntVec takes = (value > best) | (value != value);
    best = takes ? value : best;
    which = takes ? IntVec{} + number : which;
}

inline void pool_one(const float* top, const float* bottom, float* y, unsigned char* which) {
    const float values[4] = {top[0], top[1], bottom[0], bottom[1]};
    float best = values[0];
    int at = 0;
    for (int k = 1; k < 4; ++k) {
        if (values[k] > best || values[k] != values[k]) {
            best = values[k];
            at = k;
        }
    }
    *y = best;
    *which = static_cast<unsigned char>(at);
}

// LANES outputs: of a row of 2 LANES pixels and the one below it.
inline __attribute__((always_inline)) void pool_vector(const float* top, const float* bottom, float* y,
                                                       unsigned char* which) {
    Vec best, others[3];
    split_pairs(load(top), load(top + LANES), best, others[0]);
    split_pairs(load(bottom), load(bottom + LANES), others[1], others[2]);
    IntVec at{};
    for (int k = 0; k < 3; ++k) pool_take(best, at, others[k], k + 1);
    *(Vec*)y = best;
    store_bytes(at, which);
}

inline __attribute__((always_inline)) void pool_gradient_vector(const float* g, const unsigned char* which, float* top,
                                                                float* bottom) {
    const Vec gradient = load(g);
    const IntVec at = load_bytes(which);
    Vec part[4], low, high;
    for (int k = 0; k < 4; ++k) part[k] = at == IntVec{} + k ? gradient : Vec{};
    join_pairs(part[0], part[1], low, high);
    *(Vec*)top = low;
    *(Vec*)(top + LANES) = high;
    join_pairs(part[2], part[3], low, high);
    *(Vec*)bottom = low;
    *(Vec*)(bottom + LANES) = high;
}

template <int W>
struct Width {};

// Rows of W pixels, half a vector of outputs or less: several rows of outputs at once. Returns how many rows are done.
template <int W>
int64_t pool_narrow(Width<W>, const float* x, int64_t rows, float* y, unsigned char* which) {
    constexpr int TOGETHER = 2 * LANES / W;
    int64_t i = 0;
    for (; i + TOGETHER <= rows; i += TOGETHER) {
        float top[2 * LANES], bottom[2 * LANES];
        for (int k = 0; k < TOGETHER; ++k) {
            const float* from = x + 2 * (i + k) * W;
            __builtin_memcpy(top + k * W, from, W * sizeof(float));
            __builtin_memcpy(bottom + k * W, from + W, W * sizeof(float));
        }
        pool_vector(top, bottom, y + i * (W / 2), which + i * (W / 2));
    }
    return i;
}

template <int W>
int64_t pool_gradient_narrow(Width<W>, const float* g, const unsigned char* which, int64_t rows, float* dx) {
    constexpr int TOGETHER = 2 * LANES / W;
    int64_t i = 0;
    for (; i + TOGETHER <= rows; i += TOGETHER) {
        float top[2 * LANES], bottom[2 * LANES];
        pool_gradient_vector(g + i * (W / 2), which + i * (W / 2), top, bottom);
        for (int k = 0; k < TOGETHER; ++k) {
            float* to = dx + 2 * (i + k) * W;
            __builtin_memcpy(to, top + k * W, W * sizeof(float));
            __builtin_memcpy(to + W, bottom + k * W, W * sizeof(float));
        }
    }
    return i;
}

// f(Width<w>) if rows of w pixels are narrow; else 0 rows are done.
template <typename F>
int64_t if_narrow(int64_t w, const F& f) {
    if (w == 2) return f(Width<2>{});
    if (w == 4) return f(Width<4>{});
    if constexpr (LANES >= 8)
        if (w == 8) return f(Width<8>{});
    if constexpr (LANES >= 16)
        if (w == 16) return f(Width<16>{});
    return 0;
}

void pool(const float* x, int64_t h, int64_t w, float* y, unsigned char* which) {
    const int64_t rows = h / 2, columns = w / 2;
    int64_t i = if_narrow(w, [&](auto width) { return pool_narrow(width, x, rows, y, which); });
    for (; i < rows; ++i) {
        const float *top = x + 2 * i * w, *bottom = top + w;
        float* to = y + i * columns;
        unsigned char* taken = which + i * columns;
        int64_t j = 0;
        for (; j + LANES <= columns; j += LANES) pool_vector(top + 2 * j, bottom + 2 * j, to + j, taken + j);
        for (; j < columns; ++j) pool_one(top + 2 * j, bottom + 2 * j, to + j, taken + j);
    }
}

void pool_gradient(const float* g, const unsigned char* which, int64_t h, int64_t w, float* dx) {
    const int64_t rows = h / 2, columns = w / 2;
    int64_t i = if_narrow(w, [&](auto width) { return pool_gradient_narrow(width, g, which, rows, dx); });
    for (; i < rows; ++i) {
        const float* from = g + i * columns;
        const unsigned char* taken = which + i * columns;
        float *top = dx + 2 * i * w, *bottom = top + w;
        int64_t j = 0;
        for (; j + LANES <= columns; j += LANES) pool_gradient_vector(from + j, taken + j, top + 2 * j, bottom + 2 * j);
        for (; j < columns; ++j) {
            float* const to[4] = {top + 2 * j, top + 2 * j + 1, bottom + 2 * j, bottom + 2 * j + 1};
            for (int k = 0; k < 4; ++k) *to[k] = taken[j] == k ? from[j] : 0.0f;
        }
        if (w % 2) top[w - 1] = bottom[w - 1] = 0.0f;
    }
    if (h % 2)
        for (int64_t j = 0; j < w; ++j) dx[(h - 1) * w + j] = 0.0f;
}
