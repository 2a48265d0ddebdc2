// Batch norm of rows of channels: a vector holds consecutive channels of one pixel. Included by kernels.inl. (What is a
// channel here may be one pixel of it, where a row is an image in NCHW: see norm_few.cpp.)

// Channels that are computed together: as many as a vector holds, or one.
struct Several {
    using T = Vec;
    static constexpr int WIDTH = LANES;
    static T load(const float* p) { return *(const Vec*)p; }
    static void store(T value, float* p) { *(Vec*)p = value; }
};
struct Single {
    using T = float;
    static constexpr int WIDTH = 1;
    static T load(const float* p) { return *p; }
    static void store(T value, float* p) { *p = value; }
};

// Columns of a row that are summed together: N times that, in CHAINS sums over every so many rows each, to hide the
// latency of an addition. A piece has as many rows as a float may sum: see FLOAT_ADDITIONS.
template <typename Lanes_, int N_>
struct Columns {
    using Lanes = Lanes_;
    using T = typename Lanes::T;
    static constexpr int N = N_, CHAINS = 4 / N, STEP = Lanes::WIDTH, WIDTH = N * STEP;
    static constexpr int64_t PIECE = FLOAT_ADDITIONS * CHAINS;
};

// Calls f(Columns, first channel) until all channels are covered. Where they fill no whole number of vectors, the last
// one overlaps the one before it; where they fill none, they go one by one.
template <typename F>
inline __attribute__((always_inline)) void for_columns(int64_t channels, const F& f) {
    int64_t c = 0;
    for (; c + 4 * LANES <= channels; c += 4 * LANES) f(Columns<Several, 4>{}, c);
    for (; c + 2 * LANES <= channels; c += 2 * LANES) f(Columns<Several, 2>{}, c);
    for (; c + LANES <= channels; c += LANES) f(Columns<Several, 1>{}, c);
    if (c < channels && channels >= LANES) return f(Columns<Several, 1>{}, channels - LANES);
    for (; c < channels; ++c) f(Columns<Single, 1>{}, c);
}

// Calls add(row, chain) for rows [begin, end).
template <typename C, typename F>
inline __attribute__((always_inline)) void for_chains(int64_t begin, int64_t end, const F& add) {
    int64_t r = begin;
    for (; r + C::CHAINS <= end; r += C::CHAINS) {
        GRANET_UNROLL
        for (int k = 0; k < C::CHAINS; ++k) add(r + k, k);
    }
    for (; r < end; ++r) add(r, 0);
}

// out[channel] = the sum of the chains.
template <typename C>
inline __attribute__((always_inline)) void store_chains(const typename C::T (&acc)[C::CHAINS][C::N], float* out) {
    GRANET_UNROLL
    for (int j = 0; j < C::N; ++j) {
        typename C::T sum = acc[0][j];
        GRANET_UNROLL
        for (int k = 1; k < C::CHAINS; ++k) sum += acc[k][j];
        C::Lanes::store(sum, out + j * C::STEP);
    }
}

// Per channel, the sum of a block of rows and the sum of squares about its mean, and what that takes.
template <typename C>
struct Moments {
    double sum[C::WIDTH] = {}, squares[C::WIDTH] = {};

    // Adds `count` rows to the `before` rows so far. They have the sum `total`; less `pivot`, which is near their mean,
    // they have the sum `rest` and the sum of squares `about`: no large mean cancels in those.
    void add(int64_t before, int64_t count, const float* total, const float* pivot, const float* rest,
             const float* about) {
        const double m = double(count), each = 1 / m, so_far = before ? 1 / double(before) : 0.0;
        const double weight = m * double(before) / (m + double(before));
        for (int i = 0; i < C::WIDTH; ++i) {
            const double r = double(rest[i]), exact = m * double(pivot[i]) + r;
            const double piece = r == r ? exact : double(total[i]);  // inf - inf is no part of a sum
            const double own = double(about[i]) - r * r * each;
            const double distance = piece * each - sum[i] * so_far;
            squares[i] += (own < 0 ? 0 : own) + distance * distance * weight;
            sum[i] += piece;
        }
    }
};

template <typename C>
void column_moments(const Rows& rows, const float* x, double* sum, double* squares) {
    using T = typename C::T;
    Moments<C> moments;
    float total[C::WIDTH], pivot[C::WIDTH], rest[C::WIDTH], about[C::WIDTH];
    for (int64_t begin = 0; begin < rows.count; begin += C::PIECE) {
        const int64_t end = rows.count - begin < C::PIECE ? rows.count : begin + C::PIECE;
        T sums[C::CHAINS][C::N] = {}, squared[C::CHAINS][C::N] = {}, mean[C::N];
        for_chains<C>(begin, end, [&](int64_t r, int k) __attribute__((always_inline)) {
            GRANET_UNROLL
            for (int j = 0; j < C::N; ++j) sums[k][j] += C::Lanes::load(x + r * rows.stride + j * C::STEP);
        });
        store_chains<C>(sums, total);
        GRANET_UNROLL
        for (int j = 0; j < C::N; ++j) {
            mean[j] = C::Lanes::load(total + j * C::STEP) * (1 / float(end - begin));
            C::Lanes::store(mean[j], pivot + j * C::STEP);
            GRANET_UNROLL
            for (int k = 0; k < C::CHAINS; ++k) sums[k][j] = T{};
        }
        for_chains<C>(begin, end, [&](int64_t r, int k) __attribute__((always_inline)) {
            GRANET_UNROLL
            for (int j = 0; j < C::N; ++j) {
                const T d = C::Lanes::load(x + r * rows.stride + j * C::STEP) - mean[j];
                sums[k][j] += d;
                squared[k][j] += d * d;
            }
        });
        store_chains<C>(sums, rest);
        store_chains<C>(squared, about);
        moments.add(begin, end - begin, total, pivot, rest, about);
    }
    for (int i = 0; i < C::WIDTH; ++i) {
        sum[i] = moments.sum[i];
        squares[i] = moments.squares[i];
    }
}

void rows_moments(const Rows& rows, const float* x, double* sum, double* squares) {
    for_columns(rows.channels, [&](auto columns, int64_t c) {
        column_moments<decltype(columns)>(rows, x + c, sum + c, squares + c);
    });
}

// Calls f(Several or Single, first channel) for each vector of a row, as for_columns does.
template <typename F>
inline __attribute__((always_inline)) void for_vectors(int64_t channels, const F& f) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) f(Several{}, c);
    if (c < channels && channels >= LANES) return f(Several{}, channels - LANES);
    for (; c < channels; ++c) f(Single{}, c);
}

// Whether a result of such rows can be written past the cache: then all of its vectors are aligned.
inline bool rows_stream(const Rows& rows, bool stream, const float* to) {
    return STREAMS && stream && rows.channels % LANES == 0 && rows.stride % LANES == 0 && (uintptr_t)to % sizeof(Vec) == 0;
}

template <bool STREAM, typename L>
inline __attribute__((always_inline)) void store_row(typename L::T value, float* to) {
    if constexpr (STREAM && L::WIDTH == LANES)
        store_past_cache(value, to);
    else
        L::store(value, to);
}

template <bool RESIDUAL, bool RELU, bool STREAM>
void rows_apply_to(const Rows& rows, const RowsApply& a) {
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t begin = r * rows.stride;
        for_vectors(rows.channels, [&](auto lanes, int64_t c) __attribute__((always_inline)) {
            using L = decltype(lanes);
            auto y = fused(L::load(a.x + begin + c), L::load(a.scale + c), L::load(a.shift + c));
            if constexpr (RESIDUAL) y += L::load(a.residual + begin + c);
            if constexpr (RELU) y = y < 0.0f ? typename L::T{} : y;  // NaN stays
            store_row<STREAM, L>(y, a.y + begin + c);
        });
    }
}

template <bool RESIDUAL, bool RELU>
void rows_apply_as(const Rows& rows, const RowsApply& a) {
    rows_stream(rows, a.stream, a.y) ? rows_apply_to<RESIDUAL, RELU, STREAMS>(rows, a)
                                     : rows_apply_to<RESIDUAL, RELU, false>(rows, a);
}

void rows_apply(const Rows& rows, const RowsApply& a) {
    if (a.residual)
        a.relu ? rows_apply_as<true, true>(rows, a) : rows_apply_as<true, false>(rows, a);
    else
        a.relu ? rows_apply_as<false, true>(rows, a) : rows_apply_as<false, false>(rows, a);
}

template <Gate GATE, typename L, typename T = typename L::T>
inline __attribute__((always_inline)) T row_gradient(const RowsGradient& a, int64_t i, T scale, T shift) {
    const T g = L::load(a.g + i);
    if constexpr (GATE == Gate::none) return g;
    const T out = GATE == Gate::output ? L::load(a.y + i) : fused(L::load(a.x + i), scale, shift);
    return out <= 0.0f ? T{} : g;
}

template <Gate GATE, typename C>
void column_gradient_sums(const Rows& rows, const RowsGradient& a, int64_t c, double* sum, double* product) {
    using T = typename C::T;
    double totals[2][C::WIDTH] = {};
    float piece[2][C::WIDTH];
    T scale[C::N], shift[C::N], mean[C::N];
    GRANET_UNROLL
    for (int j = 0; j < C::N; ++j) {
        scale[j] = C::Lanes::load(a.scale + c + j * C::STEP);
        shift[j] = C::Lanes::load(a.shift + c + j * C::STEP);
        mean[j] = C::Lanes::load(a.mean + c + j * C::STEP);
    }
    for (int64_t begin = 0; begin < rows.count; begin += C::PIECE) {
        const int64_t end = rows.count - begin < C::PIECE ? rows.count : begin + C::PIECE;
        T sums[C::CHAINS][C::N] = {}, products[C::CHAINS][C::N] = {};
        for_chains<C>(begin, end, [&](int64_t r, int k) __attribute__((always_inline)) {
            GRANET_UNROLL
            for (int j = 0; j < C::N; ++j) {
                const int64_t at = r * rows.stride + c + j * C::STEP;
                const T g = row_gradient<GATE, typename C::Lanes>(a, at, scale[j], shift[j]);
                sums[k][j] += g;
                products[k][j] += g * (C::Lanes::load(a.x + at) - mean[j]);
            }
        });
        store_chains<C>(sums, piece[0]);
        store_chains<C>(products, piece[1]);
        for (int i = 0; i < C::WIDTH; ++i) {
            totals[0][i] += double(piece[0][i]);
            totals[1][i] += double(piece[1][i]);
        }
    }
    for (int i = 0; i < C::WIDTH; ++i) {
        sum[c + i] = totals[0][i];
        product[c + i] = totals[1][i];
    }
}

template <Gate GATE>
void rows_gradient_sums_as(const Rows& rows, const RowsGradient& a, double* sum, double* product) {
    for_columns(rows.channels, [&](auto columns, int64_t c) {
        column_gradient_sums<GATE, decltype(columns)>(rows, a, c, sum, product);
    });
}

template <Gate GATE, bool STREAM>
void rows_gradient_apply_to(const Rows& rows, const RowsGradient& a, const float* factor, const float* offset) {
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t begin = r * rows.stride;
        for_vectors(rows.channels, [&](auto lanes, int64_t c) __attribute__((always_inline)) {
            using L = decltype(lanes);
            const auto scale = L::load(a.scale + c);
            const auto g = row_gradient<GATE, L>(a, begin + c, scale, L::load(a.shift + c));
            const auto rest = L::load(a.x + begin + c) * L::load(factor + c) + L::load(offset + c);
            store_row<STREAM, L>(g * scale + rest, a.dx + begin + c);
            if (a.dresidual) L::store(g, a.dresidual + begin + c);
        });
    }
}

template <Gate GATE>
void rows_gradient_apply_as(const Rows& rows, const RowsGradient& a, const float* factor, const float* offset) {
    rows_stream(rows, a.stream, a.dx) ? rows_gradient_apply_to<GATE, STREAMS>(rows, a, factor, offset)
                                      : rows_gradient_apply_to<GATE, false>(rows, a, factor, offset);
}

void rows_gradient_sums(const Rows& rows, const RowsGradient& a, double* sum, double* product) {
    if (!a.relu) return rows_gradient_sums_as<Gate::none>(rows, a, sum, product);
    a.y ? rows_gradient_sums_as<Gate::output>(rows, a, sum, product)
        : rows_gradient_sums_as<Gate::input>(rows, a, sum, product);
}

void rows_gradient_apply(const Rows& rows, const RowsGradient& a, const float* factor, const float* offset) {
    if (!a.relu) return rows_gradient_apply_as<Gate::none>(rows, a, factor, offset);
    a.y ? rows_gradient_apply_as<Gate::output>(rows, a, factor, offset)
        : rows_gradient_apply_as<Gate::input>(rows, a, factor, offset);
}
