// Gradients of linear layers, input by input: what a row's weights gather of the incoming gradient is the gradient of
// that input, and the products of the same vectors with the input itself are the gradients of those weights. Whoever
// wants both loads each vector once.
// Included by kernels.inl.

// N weights at a time: as many chains of additions as hide the latency of one. Of a weight and of an input, the same
// additions in the same order whether both gradients are wanted or one, and wherever in a group the weight lies.
template <int TW, bool TILE, bool DOT, int N>
inline __attribute__((always_inline)) void pair_group(Vec (&acc)[TW], const Vec (&x)[TW], const PairArgs& t,
                                                      ptrdiff_t j) {
    constexpr ptrdiff_t step = sizeof(Vec);
    Vec product[N];
    const char* source[N];
    float value[N];
    GRANET_UNROLL
    for (int k = 0; k < N; ++k) {
        product[k] = Vec{};
        source[k] = t.source + t.offset[j + k];
        if constexpr (TILE) value[k] = t.value[j + k];
    }
    GRANET_UNROLL
    for (int b = 0; b < TW; ++b)
        GRANET_UNROLL
        for (int k = 0; k < N; ++k) {
            Vec g = *(const Vec*)(source[k] + b * step);
            if constexpr (TILE && DOT) keep(g);
            if constexpr (TILE) acc[b] += value[k] * g;
            if constexpr (DOT) product[k] += x[b] * g;
        }
    if constexpr (DOT) add_sums<N>(product, t.sum + j);
}

// A sum of more weights is split, and rounds less.
constexpr ptrdiff_t LONGEST_SUM = 256;

template <int TW, bool TILE, bool DOT>
void pair(const PairArgs& args) {
    constexpr ptrdiff_t step = sizeof(Vec);
    const PairArgs t = args;  // a copy that the stores below cannot alias
    for (int64_t row = 0; row < t.rows; ++row) {
        Vec x[TW] = {};
        if constexpr (DOT) {
            GRANET_UNROLL
            for (int b = 0; b < TW; ++b) x[b] = *(const Vec*)(t.input + (row * TW + b) * step);
        }
        const ptrdiff_t begin = t.ptr[row], end = t.ptr[row + 1];
        ptrdiff_t j = begin;
        do {
            Vec acc[TW] = {};
            const bool first = j == begin;
            const ptrdiff_t stop = end - j > LONGEST_SUM ? j + LONGEST_SUM : end;
            for (; j + 4 <= stop; j += 4) pair_group<TW, TILE, DOT, 4>(acc, x, t, j);
            for (; j < stop; ++j) pair_group<TW, TILE, DOT, 1>(acc, x, t, j);
            if constexpr (TILE) {
                GRANET_UNROLL
                for (int b = 0; b < TW; ++b) {
                    Vec* to = (Vec*)(t.out + (row * TW + b) * step);
                    *to = first ? acc[b] : *to + acc[b];
                }
            }
        } while (j < end);
    }
}

template <int TW = MAX_PAIR>
void fill_pairs(KernelSet& set) {
    static_assert(TW <= KernelSet::max_pair);
    if constexpr (TW > 0) {
        set.pairs[TW - 1] = {pair<TW, true, false>, pair<TW, false, true>, pair<TW, true, true>};
        fill_pairs<TW - 1>(set);
    }
}
