// Batch norm of one channel: runs of `count` pixels, `stride` floats apart, one run an image. Included by kernels.inl.

// Sums are kept in vectors of float for so many additions a lane, and in double from there on.
constexpr int64_t FLOAT_ADDITIONS = 32;

inline double sum_of_lanes(Vec v) {
    double sum = 0;
    for (int k = 0; k < LANES; ++k) sum += double(v[k]);
    return sum;
}

// Calls piece(begin, count) for the runs, cut into pieces short enough for float, and flush() whenever it is due.
template <typename Piece, typename Flush>
inline __attribute__((always_inline)) void for_pieces(const Channel& c, int vectors, const Piece& piece,
                                                      const Flush& flush) {
    const int64_t longest = FLOAT_ADDITIONS * vectors * LANES;
    int64_t additions = 0;
    for (int64_t r = 0; r < c.runs; ++r) {
        for (int64_t i = 0; i < c.count; i += longest) {
            const int64_t count = c.count - i < longest ? c.count - i : longest;
            piece(r * c.stride + i, count);
            additions += count / (vectors * LANES) + 1;
            if (additions >= FLOAT_ADDITIONS) {
                flush();
                additions = 0;
            }
        }
    }
    flush();
}

template <typename Term>
inline __attribute__((always_inline)) double sum_runs(const Channel& c, const Term& term) {
    double total = 0;
    Vec acc[4] = {};
    const auto piece = [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
        int64_t i = 0;
        for (; i + 4 * LANES <= count; i += 4 * LANES) {
            GRANET_UNROLL
            for (int k = 0; k < 4; ++k) acc[k] += term.vector(begin + i + k * LANES);
        }
        for (int k = 0; i + LANES <= count; i += LANES, ++k) acc[k] += term.vector(begin + i);
        for (; i < count; ++i) total += double(term.scalar(begin + i));
    };
    for_pieces(c, 4, piece, [&]() __attribute__((always_inline)) {
        total += sum_of_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
        for (int k = 0; k < 4; ++k) acc[k] = Vec{};
    });
    return total;
}

inline Vec load(const float* p) { return *(const Vec*)p; }

double norm_sum(const Channel& c, const float* x) {
    struct Term {
        const float* x;
        Vec vector(int64_t i) const { return load(x + i); }
        float scalar(int64_t i) const { return x[i]; }
    };
    return sum_runs(c, Term{x});
}

double norm_squares(const Channel& c, const float* x, float mean) {
    struct Term {
        const float* x;
        float mean;
        Vec vector(int64_t i) const {
            const Vec d = load(x + i) - mean;
            return d * d;
        }
        float scalar(int64_t i) const { return (x[i] - mean) * (x[i] - mean); }
    };
    return sum_runs(c, Term{x, mean});
}

// y = act(x * scale + shift + residual)
template <bool RESIDUAL, bool RELU, typename T>
inline __attribute__((always_inline)) T norm_value(T x, T residual, T scale, T shift) {
    T y = fused(x, scale, shift);
    if constexpr (RESIDUAL) y += residual;
    if constexpr (RELU) y = y < 0.0f ? T{} : y;  // NaN stays
    return y;
}

template <bool RESIDUAL, bool RELU>
void norm_apply_as(const Channel& c, const NormApply& a) {
    const Vec scale = Vec{} + a.scale, shift = Vec{} + a.shift;
    for (int64_t r = 0; r < c.runs; ++r) {
        const int64_t begin = r * c.stride;
        const bool stream = STREAMS && a.stream && (uintptr_t)(a.y + begin) % sizeof(Vec) == 0;
        int64_t i = begin;
        for (; i + LANES <= begin + c.count; i += LANES) {
            const Vec y = norm_value<RESIDUAL, RELU>(load(a.x + i), RESIDUAL ? load(a.residual + i) : Vec{}, scale,
                                                     shift);
            if (stream)
                store_past_cache(y, a.y + i);
            else
                *(Vec*)(a.y + i) = y;
        }
        for (; i < begin + c.count; ++i)
            a.y[i] = norm_value<RESIDUAL, RELU>(a.x[i], RESIDUAL ? a.residual[i] : 0.0f, a.scale, a.shift);
    }
}

void norm_apply(const Channel& c, const NormApply& a) {
    if (a.residual)
        a.relu ? norm_apply_as<true, true>(c, a) : norm_apply_as<true, false>(c, a);
    else
        a.relu ? norm_apply_as<false, true>(c, a) : norm_apply_as<false, false>(c, a);
}

// The gradient behind the activation: where `out`, the value that it was given or gave, is positive. NaN passes.
enum class Gate { none, input, output };

template <Gate GATE>
struct GatedGradient {
    const NormGradient& a;
    Vec vector(int64_t i) const {
        const Vec g = load(a.g + i);
        if constexpr (GATE == Gate::none) return g;
        const Vec out = GATE == Gate::output ? load(a.y + i) : fused(load(a.x + i), Vec{} + a.scale, Vec{} + a.shift);
        return out <= 0.0f ? Vec{} : g;
    }
    float scalar(int64_t i) const {
        if constexpr (GATE == Gate::none) return a.g[i];
        const float out = GATE == Gate::output ? a.y[i] : fused(a.x[i], a.scale, a.shift);
        return out <= 0.0f ? 0.0f : a.g[i];
    }
};

// The sums of g and of g * (x - mean), in one pass.
template <Gate GATE>
void norm_gradient_sums_as(const Channel& c, const NormGradient& a, double* sum, double* product) {
    const GatedGradient<GATE> gate{a};
    double totals[2] = {0, 0};
    Vec sums[2] = {}, products[2] = {};
    const auto add = [&](int64_t at, int k) __attribute__((always_inline)) {
        const Vec g = gate.vector(at);
        sums[k] += g;
        products[k] += g * (load(a.x + at) - a.mean);
    };
    const auto piece = [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
        int64_t i = 0;
        for (; i + 2 * LANES <= count; i += 2 * LANES) {
            add(begin + i, 0);
            add(begin + i + LANES, 1);
        }
        for (; i + LANES <= count; i += LANES) add(begin + i, 0);
        for (; i < count; ++i) {
            const double g = double(gate.scalar(begin + i));
            totals[0] += g;
            totals[1] += g * (double(a.x[begin + i]) - double(a.mean));
        }
    };
    for_pieces(c, 2, piece, [&]() __attribute__((always_inline)) {
        totals[0] += sum_of_lanes(sums[0] + sums[1]);
        totals[1] += sum_of_lanes(products[0] + products[1]);
        for (int k = 0; k < 2; ++k) sums[k] = products[k] = Vec{};
    });
    *sum = totals[0];
    *product = totals[1];
}

// dx = g * scale + x * factor + offset, and the gradient of what was added before the activation.
template <Gate GATE>
void norm_gradient_apply_as(const Channel& c, const NormGradient& a, float factor, float offset) {
    const GatedGradient<GATE> gate{a};
    for (int64_t r = 0; r < c.runs; ++r) {
        const int64_t begin = r * c.stride, end = begin + c.count;
        const bool stream = STREAMS && a.stream && (uintptr_t)(a.dx + begin) % sizeof(Vec) == 0;
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES) {
            const Vec g = gate.vector(i), dx = g * a.scale + (load(a.x + i) * factor + offset);
            if (stream)
                store_past_cache(dx, a.dx + i);
            else
                *(Vec*)(a.dx + i) = dx;
            if (a.dresidual) *(Vec*)(a.dresidual + i) = g;
        }
        for (; i < end; ++i) {
            const float g = gate.scalar(i);
            a.dx[i] = g * a.scale + (a.x[i] * factor + offset);
            if (a.dresidual) a.dresidual[i] = g;
        }
    }
}

void norm_gradient_sums(const Channel& c, const NormGradient& a, double* sum, double* product) {
    if (!a.relu) return norm_gradient_sums_as<Gate::none>(c, a, sum, product);
    a.y ? norm_gradient_sums_as<Gate::output>(c, a, sum, product)
        : norm_gradient_sums_as<Gate::input>(c, a, sum, product);
}

void norm_gradient_apply(const Channel& c, const NormGradient& a, float factor, float offset) {
    if (!a.relu) return norm_gradient_apply_as<Gate::none>(c, a, factor, offset);
    a.y ? norm_gradient_apply_as<Gate::output>(c, a, factor, offset)
        : norm_gradient_apply_as<Gate::input>(c, a, factor, offset);
}
