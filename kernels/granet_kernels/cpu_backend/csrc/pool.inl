// Max-pooling of 2 x 2 pixels, one image of one channel at a time. Included by kernels.inl.

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

void pool(const float* x, int64_t h, int64_t w, float* y, unsigned char* which) {
    const int64_t rows = h / 2, columns = w / 2;
    for (int64_t i = 0; i < rows; ++i) {
        const float *top = x + 2 * i * w, *bottom = top + w;
        int64_t j = 0;
        for (; j + LANES <= columns; j += LANES) {
            Vec best, others[3];
            split_pairs(load(top + 2 * j), load(top + 2 * j + LANES), best, others[0]);
            split_pairs(load(bottom + 2 * j), load(bottom + 2 * j + LANES), others[1], others[2]);
            IntVec at{};
            for (int k = 0; k < 3; ++k) pool_take(best, at, others[k], k + 1);
            *(Vec*)(y + i * columns + j) = best;
            *(ByteVec*)(which + i * columns + j) = __builtin_convertvector(at, ByteVec);
        }
        for (; j < columns; ++j)
            pool_one(top + 2 * j, bottom + 2 * j, y + i * columns + j, which + i * columns + j);
    }
}

void pool_gradient(const float* g, const unsigned char* which, int64_t h, int64_t w, float* dx) {
    const int64_t rows = h / 2, columns = w / 2;
    for (int64_t i = 0; i < rows; ++i) {
        float *top = dx + 2 * i * w, *bottom = top + w;
        int64_t j = 0;
        for (; j + LANES <= columns; j += LANES) {
            const Vec gradient = load(g + i * columns + j);
            const IntVec at = __builtin_convertvector(*(const ByteVec*)(which + i * columns + j), IntVec);
            Vec part[4], low, high;
            for (int k = 0; k < 4; ++k) part[k] = at == IntVec{} + k ? gradient : Vec{};
            join_pairs(part[0], part[1], low, high);
            *(Vec*)(top + 2 * j) = low;
            *(Vec*)(top + 2 * j + LANES) = high;
            join_pairs(part[2], part[3], low, high);
            *(Vec*)(bottom + 2 * j) = low;
            *(Vec*)(bottom + 2 * j + LANES) = high;
        }
        for (; j < columns; ++j) {
            float* const to[4] = {top + 2 * j, top + 2 * j + 1, bottom + 2 * j, bottom + 2 * j + 1};
            for (int k = 0; k < 4; ++k) *to[k] = which[i * columns + j] == k ? g[i * columns + j] : 0.0f;
        }
        if (w % 2) top[w - 1] = bottom[w - 1] = 0.0f;
    }
    if (h % 2)
        for (int64_t j = 0; j < w; ++j) dx[(h - 1) * w + j] = 0.0f;
}
