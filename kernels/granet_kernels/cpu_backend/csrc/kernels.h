// What the inner loops look like from outside: one KernelSet an instruction set, chosen at run time.
//
// A vector holds `lanes` images (or, for 1 x 1 convolutions, pixels) of one channel and pixel. A tile is a group of
// th x tw vectors that stay in registers while a row of the sparse weight passes by.
#pragma once

#include <cstddef>
#include <cstdint>

namespace granet {

// Short rows are taken in groups of so many, within each by rising length, so that the processor foresees their ends.
constexpr int64_t ORDERED = 32;
static_assert(ORDERED <= 256);  // a place in a group is a byte

// A tap of a 3 x 3 kernel on rows of pixels, see near_panel.h: where it reads, in bytes from the row of the panel where
// the tile's source begins, less its number; and which lanes it reads of a vector at the left or right end of its row,
// or alone in it.
using LaneMask = uint16_t;
struct Tap {
    ptrdiff_t shift;
    LaneMask left, right, alone;
};
constexpr int32_t TAP_UNIT = 16;  // bytes: the offset of an entry is a multiple, plus the number of its tap

// out[a][b] (+)= sum_j value[j] * source[offset[j] + a * source_pitch + b vectors], for each row of the weight.
// Offsets and pitches are in bytes. Row r owns the entries [ptr[r], ptr[r + 1]) and writes to out + r * out_row.
//
// The kernels for shared rows take R rows at once, which have their kept weights in the same places, and load each
// vector of the source once for all of them: rows r to r + R - 1 own [ptr[r], ptr[r + R]), R values for each offset.
struct TileArgs {
    const char* source;
    ptrdiff_t source_pitch;
    const int32_t* offset;
    const float* value;
    const int32_t* ptr;
    const uint8_t* order;  // the i-th row to take is i / ORDERED * ORDERED + order[i]; NULL: i, as for shared rows
    int64_t rows;
    const float* bias;  // one a row, or NULL
    bool accumulate;    // add to what `out` holds, not to bias
    char* out;
    ptrdiff_t out_row, out_pitch, out_step;  // of a row of the weight, of a, of b
    const Tap* taps;      // of a NearKernel, by number
    const char* ahead;    // by it, so many bytes of what is read next are prefetched in each row
    int64_t ahead_step;
};

// sum[j] += sum over the tile of gradient[row of j] * source[offset[j]].
struct DotArgs {
    const char* source;
    ptrdiff_t source_pitch;
    const char* gradient;
    ptrdiff_t gradient_row, gradient_pitch;  // of a row of the weight, of a
    const int32_t* offset;
    const int32_t* ptr;
    const uint8_t* order;  // as above
    int64_t rows;
    float* sum;
    const Tap* taps;  // these three as above
    const char* ahead;
    int64_t ahead_step;
};

// Gradients of linear layers. Row r is an input, and owns the entries [ptr[r], ptr[r + 1]), whose offsets lead to
// vectors of the incoming gradient. Rows of `input` and `out` lie one behind the other.
//   out[b] = sum_j value[j] * source[offset[j] + b vectors],  sum[j] += sum over b of input[b] * the same vector
struct PairArgs {
    const char* source;
    const int32_t* offset;
    const float* value;
    const int32_t* ptr;
    int64_t rows;
    const char* input;
    char* out;
    float* sum;
};
struct PairKernel {
    void (*tile)(const PairArgs&);  // out alone, sum alone, and both
    void (*dot)(const PairArgs&);
    void (*both)(const PairArgs&);
};

// Kernels for 3 x 3 convolutions of whole images, `side` pixels wide and high, `groups` vectors a pixel: see whole.inl.
// Row r owns the entries [ptr[9 r], ptr[9 r + 9]), ordered by tap.
constexpr int WHOLE_TAPS = 9;
struct WholeKernel {
    int side, groups;
    void (*tile)(const TileArgs&);  // NULL: too few registers
    void (*dot)(const DotArgs&);
};

// Kernels for 3 x 3 convolutions to images `width` pixels wide, `height` rows at a time, which lie one behind the other
// in the source, the gradient and the destination: near.inl. The offset of an entry has the number of its tap in it.
struct NearKernel {
    int width, height;
    void (*tile)(const TileArgs&);
    void (*dot)(const DotArgs&);
};

// Batch norm, one channel at a time: `runs` images of `count` pixels, `stride` floats apart.
struct Channel {
    int64_t runs, stride, count;
};
struct NormApply {
    const float *x, *residual;  // residual: added before the activation, or NULL
    float* y;
    float scale, shift;
    bool relu, stream;
};
struct NormGradient {
    const float *g, *x, *y;  // y: what the activation gave, or NULL: then it is computed again from x
    float scale, shift, mean;
    float *dx, *dresidual;  // dresidual may be NULL
    bool relu, stream;
};

// The same for images in channels_last: `count` pixels of so many channels, `stride` floats apart. What was one number
// above is an array of one a channel here.
struct Rows {
    int64_t count, channels, stride;
};
struct RowsApply {
    const float *x, *residual;
    float* y;
    const float *scale, *shift;
    bool relu, stream;
};
struct RowsGradient {
    const float *g, *x, *y;
    const float *scale, *shift, *mean;
    float *dx, *dresidual;
    bool relu, stream;
};

// Moves between images in memory and vectors. `lane` is the distance between images, in floats; `valid` <= lanes.
//
// pack_pixels: `count` consecutive pixels of one channel, vector p goes to panel + at[p] bytes (at[p] < 0: nowhere).
// pack_channels: `count` consecutive channels of one pixel, vector c goes to panel + c * step bytes.
// next: how far from here, in floats, the run lies that is asked for after this one: it is prefetched; 0: the same run.
// unpack: the way back, `count` consecutive pixels or channels from vectors that lie `step` bytes apart. stream: the
// images will not be read soon, write them past the cache (and fence).
struct KernelSet {
    int lanes;
    int max_tile, max_dot;  // vectors in the largest tile of each kind
    int shared_rows;        // R
    bool streams;           // whether a whole vector goes past the cache where that is asked for
    static constexpr int max_th = 4, max_tw = 28;
    void (*tiles[max_th][max_tw])(const TileArgs&);  // [th - 1][tw - 1]; NULL: no such tile
    void (*dots[max_th][max_tw])(const DotArgs&);
    static constexpr int max_shared = 4;  // vectors in the largest tile for shared rows
    void (*shared_tiles[max_shared][max_shared])(const TileArgs&);
    void (*shared_dots[max_shared][max_shared])(const DotArgs&);
    // The kernel for th x tw vectors, of rows that share their entries or of any.
    auto tile(int th, int tw, bool shared) const { return (shared ? shared_tiles[th - 1] : tiles[th - 1])[tw - 1]; }
    auto dot(int th, int tw, bool shared) const { return (shared ? shared_dots[th - 1] : dots[th - 1])[tw - 1]; }
    static constexpr int max_pair = 8;  // vectors of a row
    int most_pairs;                     // of them those that leave registers for the rest
    PairKernel pairs[max_pair];         // [vectors - 1]
    WholeKernel whole[5];
    const WholeKernel* find_whole(int64_t side, int groups) const {
        for (const WholeKernel& each : whole)
            if (each.side == side && each.groups == groups) return &each;
        return nullptr;
    }
    NearKernel near[3];  // of width 0 where there is none
    const NearKernel* find_near(int64_t h, int64_t w) const {
        for (const NearKernel& each : near)
            if (each.width > 0 && each.width == w && h % each.height == 0) return &each;
        return nullptr;
    }
    void (*pack_pixels)(const float* image, ptrdiff_t lane, int valid, int64_t count, ptrdiff_t next, char* panel,
                        const int32_t* at);
    void (*pack_channels)(const float* image, ptrdiff_t lane, int valid, int64_t count, ptrdiff_t next, char* panel,
                          ptrdiff_t step);
    void (*unpack)(const char* vectors, ptrdiff_t step, float* image, ptrdiff_t lane, int valid, int64_t count,
                   bool stream);
    // Every second of `floats` floats, beginning with the first, and the others, unless NULL; and the way back, the
    // others being zero.
    void (*take_second)(const float* from, int64_t floats, float* to, float* others);
    void (*put_second)(const float* from, int64_t floats, float* to);
    void (*copy)(const char* vectors, float* image, int64_t count, bool stream);  // `count` whole vectors in a row
    // to[c * to_row + r] = from[r * from_row + c]
    void (*transpose)(const float* from, ptrdiff_t from_row, int64_t rows, int64_t columns, float* to, ptrdiff_t to_row,
                      bool stream);
    void (*fence)();  // after streaming: what was written is there for other threads
    // Values and a mask of bytes, 1 = kept. is_zero_off: whether all bits off the mask are 0. to: may be the values.
    bool (*is_zero_off)(const float* values, const unsigned char* mask, int64_t count);
    void (*mask_values)(const float* values, const unsigned char* mask, int64_t count, float* to);
    void (*pool)(const float* x, int64_t h, int64_t w, float* y, unsigned char* which);
    void (*pool_gradient)(const float* g, const unsigned char* which, int64_t h, int64_t w, float* dx);
    double (*norm_sum)(const Channel&, const float* x);
    double (*norm_squares)(const Channel&, const float* x, float mean);  // of x - mean
    void (*norm_apply)(const Channel&, const NormApply&);
    void (*norm_gradient_sums)(const Channel&, const NormGradient&, double* sum, double* product);
    void (*norm_gradient_apply)(const Channel&, const NormGradient&, float factor, float offset);
    void (*rows_moments)(const Rows&, const float* x, double* sum, double* squares);  // squares: of x less its mean
    void (*rows_apply)(const Rows&, const RowsApply&);
    void (*rows_gradient_sums)(const Rows&, const RowsGradient&, double* sum, double* product);
    void (*rows_gradient_apply)(const Rows&, const RowsGradient&, const float* factor, const float* offset);
};

const KernelSet& kernels_portable();
const KernelSet& kernels_avx2();
const KernelSet& kernels_avx512();
const KernelSet& kernels();  // of the instruction set in use

}  // namespace granet
