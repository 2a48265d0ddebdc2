// A matrix transposed, tile by tile. Included by kernels.inl.

template <bool STREAM>
inline __attribute__((always_inline)) void transpose_tile(const float* from, ptrdiff_t from_row, float* to,
                                                          ptrdiff_t to_row) {
    Vec out[LANES];
    transpose(from, from_row, LANES, LANES, out);
    GRANET_UNROLL
    for (int k = 0; k < LANES; ++k) {
        if constexpr (STREAM)
            store_past_cache(out[k], to + k * to_row);
        else
            *(Vec*)(to + k * to_row) = out[k];
    }
}

inline __attribute__((noinline)) void transpose_rest(const float* from, ptrdiff_t from_row, int rows, int columns,
                                                     float* to, ptrdiff_t to_row) {
    Vec out[LANES];
    transpose(from, from_row, rows, columns, out);
    for (int k = 0; k < columns; ++k) store_first(out[k], to + k * to_row, rows);
}

template <bool STREAM>
void transpose_as(const float* from, ptrdiff_t from_row, int64_t rows, int64_t columns, float* to, ptrdiff_t to_row) {
    for (int64_t c = 0; c < columns; c += LANES) {
        const int width = columns - c < LANES ? int(columns - c) : LANES;
        int64_t r = 0;
        for (; width == LANES && r + LANES <= rows; r += LANES)
            transpose_tile<STREAM>(from + r * from_row + c, from_row, to + c * to_row + r, to_row);
        for (; r < rows; r += LANES)
            transpose_rest(from + r * from_row + c, from_row, rows - r < LANES ? int(rows - r) : LANES, width,
                           to + c * to_row + r, to_row);
    }
}

// to[c * to_row + r] = from[r * from_row + c]
void transpose_matrix(const float* from, ptrdiff_t from_row, int64_t rows, int64_t columns, float* to, ptrdiff_t to_row,
                      bool stream) {
    const bool lines = STREAMS && ((uintptr_t)to | (uintptr_t)(to_row * sizeof(float))) % sizeof(Vec) == 0;
    stream && lines ? transpose_as<STREAMS>(from, from_row, rows, columns, to, to_row)
                    : transpose_as<false>(from, from_row, rows, columns, to, to_row);
}
