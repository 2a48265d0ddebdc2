// The inner loops, compiled once for each instruction set. The including file sets the target and defines, in its own
// namespace: Vec (a vector of LANES floats at any address), Four (of four), IntVec (as many int32_t as Vec has floats),
// MAX_TILE, MAX_DOT and MAX_PAIR (vectors in the largest tiles that leave registers for the rest), SHARED (how many
// rows of four vectors do), and
//   keep(vector): holds it in a register, where compilers would read memory once for each use
//   transpose(in, stride, rows, columns, out): out[p][i] = in[i * stride + p] for i < rows, p < columns, else 0, or
//       garbage in columns that do not exist
//   store_first(vector, out, count): the first count floats; load_first(from, count): they, and zeros
//   STREAMS, store_past_cache(vector, out), fence(): whether and how a vector fills a cache line without reading it
//   load_bytes(from), store_bytes(vector, to): LANES unsigned char as an IntVec, and back (compilers do it one by one)
//   fused(a, b, c): a * b + c of vectors and of floats, rounded once where the instruction set can
//   split_pairs(a, b, even, odd): every second of the 2 LANES floats of a and b; join_pairs: the way back
//   sums4(a, b, c, d): the sums of four vectors, each by the same additions
// and, if it can, GRANET_LANE_MASKS and
//   load_masked(from, mask): the lanes of the mask, and zeros, from memory of which the others need not exist

// Arrays indexed by constants become registers.
#if defined(__clang__)
#define GRANET_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GRANET_UNROLL _Pragma("GCC unroll 32")
#endif

// Sums of narrow tiles are split: so many chains of additions hide the latency of one, and round less.
template <int TH, int TW>
constexpr int chains = TH * TW * 2 <= MAX_TILE ? 2 : 1;

template <int TH, int TW>
inline __attribute__((always_inline)) void add_weight(Vec (&acc)[TH][TW], const TileArgs& t, ptrdiff_t j) {
    constexpr ptrdiff_t step = sizeof(Vec);
    const char* source = t.source + t.offset[j];
    const float value = t.value[j];
    GRANET_UNROLL
    for (int a = 0; a < TH; ++a)
        GRANET_UNROLL
        for (int b = 0; b < TW; ++b) acc[a][b] += value * *(const Vec*)(source + a * t.source_pitch + b * step);
}

inline int64_t row_at(const uint8_t* order, int64_t i) { return order ? i / ORDERED * ORDERED + order[i] : i; }

template <int TH, int TW>
void tile(const TileArgs& args) {
    constexpr int N = chains<TH, TW>;
    const TileArgs t = args;  // a copy that the stores below cannot alias
    for (int64_t i = 0; i < t.rows; ++i) {
        const int64_t row = row_at(t.order, i);
        char* out = t.out + row * t.out_row;
        Vec acc[N][TH][TW] = {};
        const float start = t.bias ? t.bias[row] : 0.0f;
        const ptrdiff_t end = t.ptr[row + 1];  // as wide as addresses, which are made of it
        ptrdiff_t j = t.ptr[row];
        for (; j + N <= end; j += N) {
            GRANET_UNROLL
            for (int k = 0; k < N; ++k) add_weight(acc[k], t, j + k);
        }
        for (; j < end; ++j) add_weight(acc[N - 1], t, j);
        GRANET_UNROLL
        for (int a = 0; a < TH; ++a)
            GRANET_UNROLL
            for (int b = 0; b < TW; ++b) {
                GRANET_UNROLL
                for (int k = 1; k < N; ++k) acc[0][a][b] += acc[k][a][b];
                Vec* to = (Vec*)(out + a * t.out_pitch + b * t.out_step);
                *to = acc[0][a][b] + (t.accumulate ? *to : start - Vec{});
            }
    }
}

// SHARED rows at a time: each vector of the source is loaded once for all of them.
template <int TH, int TW>
void shared_tile(const TileArgs& args) {
    constexpr ptrdiff_t step = sizeof(Vec);
    const TileArgs t = args;
    char* out = t.out;
    for (int64_t row = 0; row < t.rows; row += SHARED, out += SHARED * t.out_row) {
        Vec acc[SHARED][TH][TW] = {};
        const int32_t end = t.ptr[row + SHARED];
        for (int32_t j = t.ptr[row]; j < end; j += SHARED) {
            const char* source = t.source + t.offset[j / SHARED];
            GRANET_UNROLL
            for (int a = 0; a < TH; ++a)
                GRANET_UNROLL
                for (int b = 0; b < TW; ++b) {
                    const Vec x = *(const Vec*)(source + a * t.source_pitch + b * step);
                    GRANET_UNROLL
                    for (int r = 0; r < SHARED; ++r) acc[r][a][b] += t.value[j + r] * x;
                }
        }
        GRANET_UNROLL
        for (int r = 0; r < SHARED; ++r) {
            const float start = t.bias ? t.bias[row + r] : 0.0f;
            GRANET_UNROLL
            for (int a = 0; a < TH; ++a)
                GRANET_UNROLL
                for (int b = 0; b < TW; ++b) {
                    Vec* to = (Vec*)(out + r * t.out_row + a * t.out_pitch + b * t.out_step);
                    *to = acc[r][a][b] + (t.accumulate ? *to : start - Vec{});
                }
        }
    }
}

template <int N>
inline __attribute__((always_inline)) void add_sums(const Vec (&v)[N], float* out) {
    if constexpr (N == 4) {
        *(Four*)out += sums4(v[0], v[1], v[2], v[3]);
    } else {
        // By the same additions, so that a weight's gradient does not depend on where its row begins.
        for (int k = 0; k < N; ++k) out[k] += sums4(v[k], Vec{}, Vec{}, Vec{})[0];
    }
}

// N weights at a time: as many chains of additions as hide the latency of one.
template <int TH, int TW, int N>
inline __attribute__((always_inline)) void dot_group(const Vec (&g)[TH][TW], const DotArgs& t, int32_t j) {
    constexpr ptrdiff_t step = sizeof(Vec);
    Vec acc[N];
    const char* source[N];
    GRANET_UNROLL
    for (int k = 0; k < N; ++k) {
        acc[k] = Vec{};
        source[k] = t.source + t.offset[j + k];
    }
    GRANET_UNROLL
    for (int a = 0; a < TH; ++a)
        GRANET_UNROLL
        for (int b = 0; b < TW; ++b)
            GRANET_UNROLL
            for (int k = 0; k < N; ++k) acc[k] += g[a][b] * *(const Vec*)(source[k] + a * t.source_pitch + b * step);
    add_sums<N>(acc, t.sum + j);
}

template <int TH, int TW>
void dot(const DotArgs& args) {
    constexpr ptrdiff_t step = sizeof(Vec);
    const DotArgs t = args;
    for (int64_t i = 0; i < t.rows; ++i) {
        const int64_t row = row_at(t.order, i);
        int32_t j = t.ptr[row];
        const int32_t end = t.ptr[row + 1];
        if (j == end) continue;
        Vec g[TH][TW];
        GRANET_UNROLL
        for (int a = 0; a < TH; ++a)
            GRANET_UNROLL
            for (int b = 0; b < TW; ++b)
                g[a][b] = *(const Vec*)(t.gradient + row * t.gradient_row + a * t.gradient_pitch + b * step);
        for (; j + 4 <= end; j += 4) dot_group<TH, TW, 4>(g, t, j);
        for (; j < end; ++j) dot_group<TH, TW, 1>(g, t, j);
    }
}

template <int TH, int TW>
void shared_dot(const DotArgs& args) {
    constexpr ptrdiff_t step = sizeof(Vec);
    const DotArgs t = args;
    for (int64_t row = 0; row < t.rows; row += SHARED) {
        const int32_t end = t.ptr[row + SHARED];
        if (t.ptr[row] == end) continue;
        Vec g[SHARED][TH][TW];
        GRANET_UNROLL
        for (int r = 0; r < SHARED; ++r)
            GRANET_UNROLL
            for (int a = 0; a < TH; ++a)
                GRANET_UNROLL
                for (int b = 0; b < TW; ++b)
                    g[r][a][b] =
                        *(const Vec*)(t.gradient + (row + r) * t.gradient_row + a * t.gradient_pitch + b * step);
        for (int32_t j = t.ptr[row]; j < end; j += SHARED) {
            const char* source = t.source + t.offset[j / SHARED];
            Vec acc[SHARED] = {};
            GRANET_UNROLL
            for (int a = 0; a < TH; ++a)
                GRANET_UNROLL
                for (int b = 0; b < TW; ++b) {
                    const Vec x = *(const Vec*)(source + a * t.source_pitch + b * step);
                    GRANET_UNROLL
                    for (int r = 0; r < SHARED; ++r) acc[r] += g[r][a][b] * x;
                }
            add_sums<SHARED>(acc, t.sum + j);
        }
    }
}

#include "pair.inl"
#include "whole.inl"
#if defined(GRANET_LANE_MASKS)
#include "near.inl"
#endif

// Asks for `rows` lines that a later call to transpose will read.
inline void prefetch(const float* in, ptrdiff_t stride, int rows) {
    for (int i = 0; i < rows; ++i) __builtin_prefetch(in + i * stride, 0, 3);
}

// The last, partial vectors of a run.
inline __attribute__((noinline)) void pack_pixels_tail(const float* image, ptrdiff_t lane, int valid, int columns,
                                                       char* panel, const int32_t* at) {
    Vec out[LANES];
    transpose(image, lane, valid, columns, out);
    for (int i = 0; i < columns; ++i)
        if (at[i] >= 0) *(Vec*)(panel + at[i]) = out[i];
}

void pack_pixels(const float* image, ptrdiff_t lane, int valid, int64_t count, ptrdiff_t next, char* panel,
                 const int32_t* at) {
    int64_t p = 0;
    if (valid == LANES) {
        for (; p + LANES <= count; p += LANES) {
            prefetch(image + p + next, lane, LANES);
            Vec out[LANES];
            transpose(image + p, lane, LANES, LANES, out);
            GRANET_UNROLL
            for (int k = 0; k < LANES; ++k)
                if (at[p + k] >= 0) *(Vec*)(panel + at[p + k]) = out[k];
        }
    }
    for (; p < count; p += LANES)
        pack_pixels_tail(image + p, lane, valid, count - p < LANES ? int(count - p) : LANES, panel, at + p);
}

inline __attribute__((noinline)) void pack_channels_tail(const float* image, ptrdiff_t lane, int valid, int columns,
                                                         char* panel, ptrdiff_t step) {
    Vec out[LANES];
    transpose(image, lane, valid, columns, out);
    for (int i = 0; i < columns; ++i) *(Vec*)(panel + i * step) = out[i];
}

void pack_channels(const float* image, ptrdiff_t lane, int valid, int64_t count, ptrdiff_t next, char* panel,
                   ptrdiff_t step) {
    int64_t c = 0;
    const ptrdiff_t ahead = next ? next : 2 * LANES;  // what the next call packs, or this one will
    if (valid == LANES) {
        for (; c + LANES <= count; c += LANES) {
            prefetch(image + c + ahead, lane, LANES);
            Vec out[LANES];
            transpose(image + c, lane, LANES, LANES, out);
            GRANET_UNROLL
            for (int k = 0; k < LANES; ++k) *(Vec*)(panel + (c + k) * step) = out[k];
        }
    }
    for (; c < count; c += LANES)
        pack_channels_tail(image + c, lane, valid, count - c < LANES ? int(count - c) : LANES, panel + c * step, step);
}

inline __attribute__((noinline)) void unpack_tail(const char* vectors, ptrdiff_t step, float* image, ptrdiff_t lane,
                                                  int valid, int columns) {
    Vec out[LANES];
    transpose((const float*)vectors, step / ptrdiff_t(sizeof(float)), columns, LANES, out);
    for (int i = 0; i < valid; ++i) store_first(out[i], image + i * lane, columns);
}

template <bool STREAM>
int64_t unpack_full(const char* vectors, ptrdiff_t step, float* image, ptrdiff_t lane, int64_t count) {
    int64_t p = 0;
    for (; p + LANES <= count; p += LANES) {
        Vec out[LANES];
        transpose((const float*)(vectors + p * step), step / ptrdiff_t(sizeof(float)), LANES, LANES, out);
        GRANET_UNROLL
        for (int k = 0; k < LANES; ++k) {
            if constexpr (STREAM)
                store_past_cache(out[k], image + k * lane + p);
            else
                *(Vec*)(image + k * lane + p) = out[k];
        }
    }
    return p;
}

void unpack(const char* vectors, ptrdiff_t step, float* image, ptrdiff_t lane, int valid, int64_t count, bool stream) {
    int64_t p = 0;
    if (valid == LANES) {
        const bool lines = STREAMS && ((uintptr_t)image | (uintptr_t)(lane * sizeof(float))) % sizeof(Vec) == 0;
        p = stream && lines ? unpack_full<STREAMS>(vectors, step, image, lane, count)
                            : unpack_full<false>(vectors, step, image, lane, count);
    }
    for (; p < count; p += LANES)
        unpack_tail(vectors + p * step, step, image + p, lane, valid, count - p < LANES ? int(count - p) : LANES);
}

void copy(const char* vectors, float* image, int64_t count, bool stream) {
    const Vec* from = (const Vec*)vectors;
    if (STREAMS && stream && (uintptr_t)image % sizeof(Vec) == 0) {
        for (int64_t i = 0; i < count; ++i) store_past_cache(from[i], image + i * LANES);
        return;
    }
    for (int64_t i = 0; i < count; ++i) *(Vec*)(image + i * LANES) = from[i];
}

#include "every_second.inl"
#include "norm.inl"
#include "norm_rows.inl"
#include "masked.inl"
#include "pool.inl"
#include "transpose.inl"

// Shapes that the drivers ask for: any small one, and wide single rows.
template <int TH, int TW, int LIMIT>
constexpr bool exists = TH * TW <= LIMIT && (TW <= 16 || (TH == 1 && TW % 4 == 0));

template <int TH, int TW>
void fill(KernelSet& set) {
    if constexpr (TH * TW <= KernelSet::max_shared) {
        set.shared_tiles[TH - 1][TW - 1] = shared_tile<TH, TW>;
        set.shared_dots[TH - 1][TW - 1] = shared_dot<TH, TW>;
    }
    if constexpr (exists<TH, TW, MAX_TILE>) set.tiles[TH - 1][TW - 1] = tile<TH, TW>;
    if constexpr (exists<TH, TW, MAX_DOT>) set.dots[TH - 1][TW - 1] = dot<TH, TW>;
    if constexpr (TW > 1) fill<TH, TW - 1>(set);
}

KernelSet make_set() {
    KernelSet set{};
    set.lanes = LANES;
    set.max_tile = MAX_TILE;
    set.max_dot = MAX_DOT;
    set.shared_rows = SHARED;
    set.streams = STREAMS;
    fill<1, KernelSet::max_tw>(set);
    fill<2, KernelSet::max_tw>(set);
    fill<3, KernelSet::max_tw>(set);
    fill<4, KernelSet::max_tw>(set);
    set.most_pairs = MAX_PAIR;
    fill_pairs(set);
    set.whole[0] = whole_kernel<4, 1>();
    set.whole[1] = whole_kernel<2, 1>();
    set.whole[2] = whole_kernel<2, 2>();
    set.whole[3] = whole_kernel<2, 3>();
    set.whole[4] = whole_kernel<2, 4>();
#if defined(GRANET_LANE_MASKS)
    set.near[0] = {LANES, 16, near_tile<16, 1>, near_dot<16, 1>};
    set.near[1] = {2 * LANES, 8, near_tile<8, 2>, near_dot<8, 2>};
    set.near[2] = {4 * LANES, 4, near_tile<4, 4>, near_dot<4, 4>};
#endif
    set.pack_pixels = pack_pixels;
    set.pack_channels = pack_channels;
    set.unpack = unpack;
    set.take_second = take_second;
    set.put_second = put_second;
    set.copy = copy;
    set.transpose = transpose_matrix;
    set.fence = fence;
    set.is_zero_off = is_zero_off;
    set.mask_values = mask_values;
    set.pool = pool;
    set.pool_gradient = pool_gradient;
    set.norm_sum = norm_sum;
    set.norm_squares = norm_squares;
    set.norm_apply = norm_apply;
    set.norm_gradient_sums = norm_gradient_sums;
    set.norm_gradient_apply = norm_gradient_apply;
    set.rows_moments = rows_moments;
    set.rows_apply = rows_apply;
    set.rows_gradient_sums = rows_gradient_sums;
    set.rows_gradient_apply = rows_gradient_apply;
    return set;
}
